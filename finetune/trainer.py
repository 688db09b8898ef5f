"""`SupervisedTrainer` and its callbacks: the stock Trainer, with token rates, metrics and whole adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.adapters import InitialLora, whole_virtual_tokens
from finetune.console import is_rank_0, is_terminal, say
from finetune.errors import ConfigError, FinetuneError
from finetune.metrics import StepMeter, append_metrics, peak_memory_bytes
from finetune.results import METRICS_FILE


def start_processes(backend: str, values: dict[str, Any]) -> TrainingArguments:
    """Join this process to the run and build its `TrainingArguments` from plain values.

    DeepSpeed's process group comes first: built before it on a CPU, `TrainingArguments` starts torch's group alone,
    and under ZeRO-3 the model is then partitioned for a world of one.

    Raises:
        ConfigError: a value that transformers refuses.
    """
    if values.get("deepspeed"):
        import deepspeed

        if not dist.is_initialized():
            timeout = timedelta(seconds=values.get("ddp_timeout", TrainingArguments.ddp_timeout))
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    try:
        return TrainingArguments(**values)
    except ValueError as error:
        raise ConfigError(f"the training flags contradict each other: {error}") from None


def on_rank_0(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait; what it raises is raised by every rank.

    Raises:
        FinetuneError: as `action` did on rank 0.
    """
    failure: list[FinetuneError | None] = [None]
    if is_rank_0():
        try:
            action()
        except FinetuneError as error:
            failure = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


class SupervisedTrainer(Trainer):
    """The stock Trainer, which also counts real tokens and saves PiSSA adapters as plain LoRA.

    Args:
        initial_lora: the LoRA matrices as PiSSA left them, when that is how they were initialised.
        on_plan: called by every rank with the number of steps before the first one.
    """

    def __init__(
        self, *args: Any, initial_lora: InitialLora | None = None, on_plan: Callable[[int], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.initial_lora = initial_lora
        self.meter = StepMeter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Beginning(self.meter, on_plan))
        self.add_callback(_MetricsFile(Path(self.args.output_dir) / METRICS_FILE))
        self.add_callback(_Progress())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, their token counts taken out and added to the meter."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [(batch.pop("num_tokens"), batch.pop("num_supervised_tokens")) for batch in batches]
        self.meter.add(sum(tokens for tokens, _ in counts), sum(supervised for _, supervised in counts))
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add token rates and peak memory of all ranks to what a training step logs."""
        if "loss" in logs:
            logs |= self._rates()
        super().log(logs, start_time)

    def _rates(self) -> dict[str, float]:
        counted = torch.tensor([self.meter.tokens, self.meter.supervised_tokens], device=self.args.device)
        peak = torch.tensor([peak_memory_bytes()], device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(counted)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rates = self.meter.rates(*counted.tolist())
        self.meter.restart()
        return {**rates, "peak_memory_bytes": peak.item()}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.meter.since += time.perf_counter() - began  # saving is not part of a step's seconds

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with whole_virtual_tokens(self.model):
            super()._save(output_dir, state_dict)
        if self.initial_lora is not None and self.args.should_save:
            self.initial_lora.rewrite(Path(output_dir or self.args.output_dir))


class _Beginning(TrainerCallback):
    """Announces the plan once the number of steps is known, and starts the clock."""

    def __init__(self, meter: StepMeter, on_plan: Callable[[int], None]) -> None:
        self.meter = meter
        self.on_plan = on_plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_plan(state.max_steps)
        self.meter.restart()


class _MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl`, one line per logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append_metrics(self.path, {"step": state.global_step, **logs})


class _Progress(ProgressCallback):
    """A bar with loss and learned tokens per second; one line per logged step where there is no terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_terminal():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not is_rank_0() or not logs or "loss" not in logs:
            return
        rate = f"{logs['supervised_tokens_per_second']:.0f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate} learned tokens/s")
        else:
            say(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.3g}  {rate} learned tokens/s"
            )
