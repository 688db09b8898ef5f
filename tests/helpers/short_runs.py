"""Runs of a few steps, and what they logged."""

import json
from pathlib import Path

SHORT = (
    "--num_train_epochs 2 --per_device_train_batch_size 1 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --save_strategy no --write_report False"
).split()


LORA = ("--use_lora", "True", "--lora_dropout", "0")


def losses(output: Path, name: str = "loss") -> list[float]:
    """What metrics.jsonl says of each logged step under this name."""
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


KINDS_OF_RESULTS = {
    "full": (),
    "lora": ("--use_lora", "True", "--lora_dropout", "0"),
    "prefix": ("--adapter", "prefix", "--num_virtual_tokens", "3"),
    "prompt": ("--adapter", "prompt", "--num_virtual_tokens", "3"),
}
