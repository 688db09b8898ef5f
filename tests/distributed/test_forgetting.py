"""What a tune has forgotten, asked of real results: beside the base, on two ranks, of a broken model."""

import json

import pytest
import torch
import torch.nn.functional as F

from finetune.chat_templates import prompt_ids, select_chat_format
from finetune.cli import evaluate
from finetune.conversation import Conversation, Turn
from finetune.evaluation import forgetting
from finetune.evaluation.forgetting import CATEGORIES, load_questions
from finetune.evaluation.question_answering import answers_of, scores_of
from finetune.evaluation.token_losses import MeasuredModel
from finetune.inference.generate import AnswerGenerator
from finetune.run_dir.eval_results import read_sections
from finetune.utils.errors import FinetuneError
from tests.helpers import ranks
from tests.helpers.paths import PRETRAINED
from tests.helpers.tiers import mostly_slow

QUESTIONS = load_questions()


@pytest.fixture(scope="module")
def small(smol_tokenizer):
    """The small model in float32 and its chat format."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32).eval()
    return model, select_chat_format(smol_tokenizer)[0]


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


@pytest.mark.parametrize("kind", mostly_slow(["lora", "prompt"], ["lora"]))
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


@pytest.mark.slow
def test_two_ranks_answer_as_one(trained, few, tmp_path):
    output = trained("lora")
    evaluate.main([str(output), "--forgetting"])
    alone = json.loads((output / "forgetting.json").read_text(encoding="utf-8"))
    argv, ids = [str(output), "--forgetting"], [one.id for one in few]
    outcome = ranks.run(tmp_path, _few_on_a_rank, (argv, ids), world_size=2)
    assert outcome.succeeded, outcome.outputs
    together = json.loads((output / "forgetting.json").read_text(encoding="utf-8"))
    assert together["answers"] == alone["answers"] and together["groups"] == alone["groups"]


@pytest.mark.slow
def test_a_broken_model_is_seen(small):
    """Weights of the small model with noise on them: it has forgotten, and the verdict says so."""
    model, chat_format = small
    chosen = [one for one in QUESTIONS if one.category == "choice" and one.language == "en"][::3]
    asked = MeasuredModel("base", model, chat_format, 2, [2])
    before = forgetting.ask_questions(asked, chosen)
    torch.manual_seed(0)
    kept = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    after = forgetting.ask_questions(asked, chosen)
    model.load_state_dict(kept)
    pairs = list(zip(chosen, before, after, strict=True))
    group = forgetting._group("all questions", pairs)
    assert group["base"] > 0.5 and group["interval"][1] < 0 and group["p"] < 0.05


def test_scores_are_those_of_whole_conversations_one_by_one(tiny_model, smol_tokenizer):
    """In float64, with wide weights, so that nothing but rounding may differ."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    chat_format, _ = select_chat_format(smol_tokenizer)
    asked = [(one.text, one.candidates) for one in QUESTIONS if one.candidates][::20]
    assert len(asked) > 5
    for kind in (False, True):  # from the cache; and whole, as behind virtual tokens
        measured = MeasuredModel("tuned", model, chat_format, 2, has_virtual_tokens=kind)
        found = scores_of(measured, asked, batch_size=5, done=lambda count: None)
        for (question, candidates), scores in zip(asked, found, strict=True):
            wanted = [stock_score(model, chat_format, question, candidate) for candidate in candidates]
            assert scores == pytest.approx(wanted, abs=1e-5) and max(wanted) - min(wanted) > 1e-3


def stock_score(model, chat_format, question, candidate):
    tokenizer = chat_format.plain.tokenizer
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": candidate}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    begin = len(prompt_ids(chat_format, Conversation((Turn("human", question),))))
    stop = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>")) - 1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    total = F.cross_entropy(logits[begin - 1 : stop - 1], torch.tensor(ids[begin:stop]), reduction="sum").item()
    return -total / len(candidate.encode())


@pytest.mark.slow
def test_answers_written_together_are_those_written_alone(small, monkeypatch):
    model, chat_format = small
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)  # of a base; answers are greedy
    questions = [one.text for one in QUESTIONS if one.is_written][::36]
    measured = MeasuredModel("tuned", model, chat_format, 2, [2])
    together = answers_of(measured, questions, max_new_tokens=8, batch_size=8, done=lambda count: None)
    alone = AnswerGenerator(model, chat_format, [2])
    assert together == [alone.answer([Turn("human", one)], max_new_tokens=8) for one in questions]
