"""What every training driver shares: its arguments, and a watch over the steps of any subclass of `Trainer`.

Each driver runs in an environment of its own; of what they have in common this needs transformers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """What to train: `data` in the project's own form, `messages` the same rows as messages; `cache` is a fresh folder.

    `form` says how batches are made (flat, padded, packed, longest). `steps` are timed after `warm_up` more.
    """

    model: str
    data: Path
    messages: Path
    form: str
    adapter: str
    batch: int
    max_length: int
    warm_up: int
    steps: int
    cache: Path
    output: Path

    @property
    def all_steps(self) -> int:
        """Steps to run."""
        return self.warm_up + self.steps

    @property
    def trainer_flags(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that all contenders are given."""
        return {
            "output_dir": str(self.cache / "output"), "use_cpu": True, "max_steps": self.all_steps,
            "per_device_train_batch_size": self.batch, "gradient_accumulation_steps": 1, "learning_rate": 1e-4,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 7,
        }  # fmt: skip


def given_task() -> Task:
    """The task on the command line; call it before any library is imported, it sets where they cache."""
    parser = argparse.ArgumentParser()
    kinds = {"Path": Path, "str": str, "int": int}
    for name, kind in Task.__annotations__.items():
        parser.add_argument(f"--{name}", required=True, type=kinds[kind])
    task = Task(**vars(parser.parse_args()))
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = os.environ["MODELSCOPE_CACHE"] = str(task.cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return task


@dataclass
class Watch:
    """Seconds, tokens and loss of every step, taken where transformers itself begins and ends one."""

    task: Task
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_step_at: float = 0.0

    def __post_init__(self) -> None:
        from transformers import Trainer
        from transformers.trainer_callback import CallbackHandler

        begin, end, log, step = (
            CallbackHandler.on_step_begin, CallbackHandler.on_step_end, CallbackHandler.on_log, Trainer.training_step,
        )  # fmt: skip

        def on_step_begin(handler: Any, *args: Any, **kwargs: Any) -> Any:
            result = begin(handler, *args, **kwargs)
            self.first_step_at = self.first_step_at or time.time()
            for counts in (self.tokens, self.supervised, self.positions):
                counts.append(0)
            self._began = time.perf_counter()
            return result

        def on_step_end(handler: Any, *args: Any, **kwargs: Any) -> Any:
            self.seconds.append(time.perf_counter() - self._began)
            return end(handler, *args, **kwargs)

        def on_log(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> Any:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
            return log(handler, args, state, control, logs, **kwargs)

        def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._count(inputs)
            return step(trainer, model, inputs, *args, **kwargs)

        CallbackHandler.on_step_begin, CallbackHandler.on_step_end = on_step_begin, on_step_end
        CallbackHandler.on_log, Trainer.training_step = on_log, training_step

    def _count(self, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.positions[-1] += ids.numel()
        if "counts" in inputs:  # this project's batches say it themselves
            self.tokens[-1] += inputs["counts"].tokens
            self.supervised[-1] += len(inputs["targets"])
            return
        is_plain = mask is not None and mask.shape == ids.shape
        self.tokens[-1] += int(mask.sum()) if is_plain else ids.numel()
        self.supervised[-1] += int((inputs["labels"][..., 1:] != -100).sum())

    def report(self) -> None:
        """Leave the figures of the timed steps where the caller reads them."""
        timed = slice(self.task.warm_up, self.task.all_steps)
        facts = {
            "seconds": self.seconds[timed],
            "tokens": self.tokens[timed],
            "supervised_tokens": self.supervised[timed],
            "positions": self.positions[timed],
            "losses": self.losses,
            "first_step_at": self.first_step_at,
            "peak_rss_bytes": _peak_rss_bytes(),
        }
        self.task.output.write_text(json.dumps(facts))


def _peak_rss_bytes() -> int:
    """Of this process since it was started; what getrusage says begins with the size of the one that started it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) << 10
