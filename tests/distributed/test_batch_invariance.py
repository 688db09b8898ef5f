"""What a run learns does not depend on how ranks, accumulation and the form of the batches make up a step."""

import json

import pytest

from tests.helpers.batch_runs import LORA, assert_same, shape

ON_HEAD = (*LORA, "--lora_target_modules", "q_proj", "lm_head")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), LORA, ON_HEAD], ids=["full", "lora", "lora on the head"])
def test_ranks_accumulation_and_stages_make_up_the_same_steps(train_shaped, adapter):
    first = train_shaped("1x8", 1, *shape(8, 1, "zero1"), *adapter)
    assert first[0][-1]["loss"] < first[0][0]["loss"]
    assert_same(first, train_shaped("2x4", 2, *shape(4, 1, "zero2"), *adapter), steps=4)
    assert_same(first, train_shaped("2x2x2", 2, *shape(2, 2, "zero3"), *adapter), steps=4)
    assert_same(first, train_shaped("1x1x8", 1, *shape(1, 8, "zero2"), *adapter), steps=4)


@pytest.mark.slow
def test_conversations_weigh_the_same_on_any_ranks(train_shaped):
    by_conversation = ("--loss_weighting", "conversation")
    first = train_shaped("1x8", 1, *shape(8, 1, "zero2"), *by_conversation)
    assert_same(first, train_shaped("2x2x2", 2, *shape(2, 2, "zero3"), *by_conversation), steps=4)
    by_token = train_shaped("tokens", 1, *shape(8, 1, "zero2"))
    assert abs(by_token[0][0]["loss"] - first[0][0]["loss"]) > 1e-3


def test_weights_of_turns_count_the_same_on_two_ranks_and_alone(train_shaped, rows_file, tmp_path):
    rows = json.loads(rows_file.read_text())
    for row, weight in {1: 0.3, 4: 2.5, 9: 0}.items():  # batches without any weight stand beside others
        rows[row]["conversations"][1]["weight"] = weight
    (weighted := tmp_path / "weighted.json").write_text(json.dumps(rows))
    alone = train_shaped("alone", 1, *shape(8, 1, "zero2")[:-2], rows=weighted)
    assert_same(alone, train_shaped("2x2x2", 2, *shape(2, 2, "zero2")[:-2], rows=weighted), steps=4)


def test_flat_padded_packed_and_budgeted_batches_learn_the_same(train_shaped):
    """All rows are in every step, whatever the form of its batches: eleven rows are three packs of 512 tokens."""
    whole = shape(16, 1, "zero2")
    flat = train_shaped("flat", 1, *whole)
    assert_same(flat, train_shaped("padded", 2, *shape(8, 1, "zero3"), "--batching", "padded"), steps=2)
    packed = ("--batching", "packed", "--model_max_length", "512")
    assert_same(flat, train_shaped("packed", 2, *shape(2, 2, "zero3"), *packed), steps=2)
    budget = ("--deepspeed", "zero2", "--tokens_per_device_batch", "400", "--gradient_accumulation_steps", "8")
    assert_same(flat, train_shaped("budget", 2, *budget), steps=2)
    assert_same(flat, train_shaped("budget-padded", 2, *budget, "--batching", "padded"), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_without_deepspeed_the_steps_are_the_same_on_two_ranks_and_alone(train_shaped, adapter):
    def plain(rows: int, accumulated: int) -> tuple[str, ...]:
        return shape(rows, accumulated, "zero2")[:-2] + adapter

    zero = train_shaped("zero", 2, *shape(2, 2, "zero2"), *adapter)
    assert_same(zero, train_shaped("plain", 2, *plain(2, 2)), steps=4)
    assert_same(zero, train_shaped("alone", 1, *plain(8, 1)), steps=4)
    assert_same(zero, train_shaped("alone-in-parts", 1, *plain(2, 4)), steps=4)
