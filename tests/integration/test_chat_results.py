"""Results of every kind answer, beside their base: adapters, checkpoints, the LingoWhale format, code of their own."""

import shutil

import pytest

from finetune.conversation import Turn
from finetune.inference.generate import AnswerGenerator
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.utils.errors import CheckpointError, ConfigError
from tests.helpers.tiers import mostly_slow

ASKED = [Turn("human", "Who are you?")]
KINDS = {
    "lora": ["--use_lora", "True"],
    "prefix": ["--adapter", "prefix"],
    "prompt": ["--adapter", "prompt"],
    "lingowhale": ["--chat_template", "lingowhale", "--save_strategy", "epoch", "--save_only_model", "True"],
}


def answer(model, opened, tokens=6):
    answering = AnswerGenerator(model, opened.chat_format, opened.stop_token_ids).stream(ASKED, max_new_tokens=tokens)
    "".join(answering)
    return answering.ids


def by_whole_passes(model, opened, tokens=6):
    """The likeliest token behind all that went before, computed anew each time; and the scores of the first."""
    import torch

    ids, prompt = [], AnswerGenerator(model, opened.chat_format, opened.stop_token_ids).prompt(ASKED)
    scores = []
    while len(ids) < tokens:
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1])
        ids.append(int(scores[-1].argmax()))
        if ids[-1] in opened.stop_token_ids:
            return ids[:-1], scores[0]
    return ids, scores[0]


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft, of its own generate
@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["lora"]))
def test_a_result_and_its_base_answer_in_turn(train, tiny_model, kind, tmp_path):
    output = train(kind, *KINDS[kind], "--deepspeed", "zero2", world_size=1)
    opened = load_for_inference(read_result(output))
    tuned = answer(opened.tuned, opened)
    with opened.base() as base:
        before = answer(base, opened)
        plain, base_scores = by_whole_passes(base, opened)
    assert before == plain
    assert answer(opened.tuned, opened) == tuned == by_whole_passes(opened.tuned, opened)[0]
    assert (by_whole_passes(opened.tuned, opened)[1] - base_scores).abs().max() > 1e-4
    alone = load_for_inference(read_result(output), only_base=True)
    with alone.base() as base:
        assert answer(base, alone) == answer(alone.tuned, alone) == before
    if kind == "lingowhale":
        assert opened.stop_token_ids[0] == opened.tokenizer.eos_token_id
        checkpoint = load_for_inference(read_result(output / "checkpoint-12"))
        assert answer(checkpoint.tuned, checkpoint) == tuned
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    elsewhere = load_for_inference(read_result(output), base_name=str(moved))
    with elsewhere.base() as base:
        assert answer(base, elsewhere) == before
    with pytest.raises(ConfigError, match="its base .*nowhere does not exist: "):
        with load_for_inference(read_result(output), base_name=str(tmp_path / "nowhere"), only_base=True).base():
            pass
    with pytest.raises(CheckpointError, match="holds other weights" if kind == "lingowhale" else "are missing"):
        load_for_inference(read_result(output), base_name=str(output), only_base=True)
