"""What a tune has forgotten, asked of real results: beside the base, on two ranks, of a broken model."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.chat_templates import select_chat_format
from finetune.cli import evaluate
from finetune.evaluation import forgetting
from finetune.evaluation.forgetting_questions import CATEGORIES, load_questions
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.run_dir.eval_results import read_sections
from finetune.utils.errors import FinetuneError
from tests.helpers import ranks
from tests.helpers.paths import PRETRAINED

QUESTIONS = load_questions()


@pytest.fixture(scope="module")
def small(smol_tokenizer):
    """The small model in float32 and its chat format."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32).eval()
    return model, select_chat_format(smol_tokenizer, human_token_ids=[3], model_token_ids=[4])[0]


@pytest.fixture
def few(monkeypatch):
    """Two questions of each kind and language."""
    chosen = [
        one
        for kind in CATEGORIES
        for language in ("en", "zh")
        for one in [one for one in QUESTIONS if (one.category, one.language) == (kind, language)][:2]
    ]
    monkeypatch.setattr(forgetting, "load_questions", lambda: chosen)
    return chosen


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_result_is_asked_beside_its_base(trained, few, kind, capsys):
    output = trained(kind)
    evaluate.main([str(output), "--forgetting"])
    document = json.loads((output / "forgetting.json").read_text(encoding="utf-8"))
    assert len(document["answers"]) == len(few) == document["groups"][0]["questions"]
    assert document["fell"] == pytest.approx(-100 * document["groups"][0]["difference"])
    assert "What the base could do" in capsys.readouterr().out
    assert "Forgetting" in [one.title for one in read_sections(output)]
    document["fell"] = 7.5
    with pytest.raises(FinetuneError, match="7.5 points below its base, --fail_below allows 5") as failure:
        evaluate._fail_if_below(document, 5)
    assert failure.value.status == 1
    evaluate._fail_if_below(document, 8)


def _few_on_a_rank(argv, ids):
    forgetting.load_questions = lambda: [QUESTIONS[number] for number in ids]
    evaluate.main(argv)


def test_two_ranks_answer_as_one(trained, few, tmp_path):
    output = trained("lora")
    evaluate.main([str(output), "--forgetting"])
    alone = json.loads((output / "forgetting.json").read_text(encoding="utf-8"))
    argv, ids = [str(output), "--forgetting"], [one.id for one in few]
    outcome = ranks.run(tmp_path, _few_on_a_rank, (argv, ids), world_size=2)
    assert outcome.succeeded, outcome.outputs
    together = json.loads((output / "forgetting.json").read_text(encoding="utf-8"))
    assert together["answers"] == alone["answers"] and together["groups"] == alone["groups"]


def test_a_broken_model_is_seen(small, tmp_path, trained):
    """Weights of the small model with noise on them: it has forgotten, and the verdict says so."""
    model, chat_format = small
    opened = load_for_inference(read_result(trained("lora")))
    chosen = [one for one in QUESTIONS if one.category == "choice" and one.language == "en"][::3]
    opened.chat_format, opened.tokenizer = chat_format, chat_format.plain.tokenizer

    def ask():
        from contextlib import nullcontext

        class Bar:
            update = staticmethod(lambda count: None)

        return forgetting.ask_questions(opened, model, chosen, label="base", bar=lambda *_: nullcontext(Bar))

    before = ask()
    torch.manual_seed(0)
    kept = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    after = ask()
    model.load_state_dict(kept)
    pairs = list(zip(chosen, before, after, strict=True))
    group = forgetting._group("all questions", pairs)
    assert group["base"] > 0.5 and group["interval"][1] < 0 and group["p"] < 0.05
