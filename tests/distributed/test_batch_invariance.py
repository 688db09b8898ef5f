"""What a run learns does not depend on how ranks, accumulation and the form of the batches make up a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import ranks
from tests.helpers.rows import write_rows

# Eleven rows of very different lengths: a second step of three, for which some ranks have nothing.
ROWS = [
    [("human", "ab " * (3 * number % 11 + 1)), ("model", "xy " * (7 * number % 13 + 1)), ("human", "?"), ("model", "r")]
    for number in range(11)
]
# Under SGD weights differ by as little as gradients do; Adam turns the noise of a zero gradient into a whole step.
SGD = (
    "--optim sgd --learning_rate 0.1 --lr_scheduler_type constant --max_grad_norm 0 --num_train_epochs 2 "
    "--logging_steps 1 --save_strategy no --use_cpu True"
).split()
LORA = ("--use_lora", "True", "--lora_dropout", "0")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", ROWS)


@pytest.fixture
def train(tmp_path, tiny_model, rows_file):
    def run(name: str, world_size: int, *flags: str) -> tuple[list[dict], dict]:
        output = tmp_path / name
        argv = ["--model_name_or_path", tiny_model, "--data_path", rows_file, "--output_dir", output, *SGD, *flags]
        outcome = ranks.train(tmp_path / f"{name}-logs", argv, world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        weights = next(output.glob("*model.safetensors"))
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], load_file(weights)

    return run


def assert_same(one: tuple[list[dict], dict], other: tuple[list[dict], dict], steps: int) -> None:
    assert len(one[0]) == len(other[0]) == steps
    for name, tolerance in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4})):
        assert [entry[name] for entry in other[0]] == pytest.approx([entry[name] for entry in one[0]], **tolerance)
    both = one[1].keys() & other[1].keys()  # a tied head may be written beside the embeddings
    assert len(both) > 10 and (one[1].keys() ^ other[1].keys()) <= {"lm_head.weight"}
    assert max((one[1][name] - other[1][name]).abs().max().item() for name in both) < 1e-5


def shape(rows: int, accumulated: int, config: str) -> tuple[str, ...]:
    sizes = ("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulated))
    return (*sizes, "--deepspeed", config)


@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_ranks_accumulation_and_stages_make_up_the_same_steps(train, adapter):
    first = train("1x8", 1, *shape(8, 1, "zero1"), *adapter)
    assert first[0][-1]["loss"] < first[0][0]["loss"]
    assert_same(first, train("2x4", 2, *shape(4, 1, "zero2"), *adapter), steps=4)
    assert_same(first, train("2x2x2", 2, *shape(2, 2, "zero3"), *adapter), steps=4)
    assert_same(first, train("1x1x8", 1, *shape(1, 8, "zero2"), *adapter), steps=4)


def test_conversations_weigh_the_same_on_any_ranks(train):
    by_conversation = ("--loss_weighting", "conversation")
    first = train("1x8", 1, *shape(8, 1, "zero2"), *by_conversation)
    assert_same(first, train("2x2x2", 2, *shape(2, 2, "zero3"), *by_conversation), steps=4)
    by_token = train("tokens", 1, *shape(8, 1, "zero2"))
    assert abs(by_token[0][0]["loss"] - first[0][0]["loss"]) > 1e-3


def test_flat_padded_packed_and_budgeted_batches_learn_the_same(train):
    """All rows are in every step, whatever the form of its batches: eleven rows are three packs of 512 tokens."""
    whole = shape(16, 1, "zero2")
    flat = train("flat", 1, *whole)
    assert_same(flat, train("padded", 2, *shape(8, 1, "zero3"), "--batching", "padded"), steps=2)
    packed = ("--batching", "packed", "--model_max_length", "512")
    assert_same(flat, train("packed", 2, *shape(2, 2, "zero3"), *packed), steps=2)
    budget = ("--deepspeed", "zero2", "--tokens_per_device_batch", "400", "--gradient_accumulation_steps", "8")
    assert_same(flat, train("budget", 2, *budget), steps=2)
    assert_same(flat, train("budget-padded", 2, *budget, "--batching", "padded"), steps=2)


@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_without_deepspeed_the_steps_are_the_same_on_two_ranks_and_alone(train, adapter):
    def plain(rows: int, accumulated: int) -> tuple[str, ...]:
        return shape(rows, accumulated, "zero2")[:-2] + adapter

    zero = train("zero", 2, *shape(2, 2, "zero2"), *adapter)
    assert_same(zero, train("plain", 2, *plain(2, 2)), steps=4)
    assert_same(zero, train("alone", 1, *plain(8, 1)), steps=4)
    assert_same(zero, train("alone-in-parts", 1, *plain(2, 4)), steps=4)
