"""Runs over the same rows in other shapes, and a strict comparison."""

import pytest

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


def assert_same(one: tuple[list[dict], dict], other: tuple[list[dict], dict], steps: int) -> None:
    assert len(one[0]) == len(other[0]) == steps
    for name, tolerance in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4})):
        assert [entry[name] for entry in other[0]] == pytest.approx([entry[name] for entry in one[0]], **tolerance)
    both = one[1].keys() & other[1].keys()  # a tied head may be written beside the embeddings
    assert len(both) > 5 and (one[1].keys() ^ other[1].keys()) <= {"lm_head.weight"}
    assert max((one[1][name] - other[1][name]).abs().max().item() for name in both) < 1e-5


def shape(rows: int, accumulated: int, config: str) -> tuple[str, ...]:
    sizes = ("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulated))
    return (*sizes, "--deepspeed", config)
