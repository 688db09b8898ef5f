"""Callbacks of the Trainer: its own hooks, the watchdog, metrics.jsonl, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import ProgressCallback

from finetune.distributed import watchdog
from finetune.training.loss_breakdown import LossBreakdown
from finetune.training.metrics import append_metrics
from finetune.utils.console import is_rank_0, is_terminal

logger = logging.getLogger(__name__)


class StepHooks(TrainerCallback):
    """Call the Trainer's own methods around its steps.

    Args:
        before_training: called with the number of steps once it is known.
        before_step: called before each optimizer step.
        after_step: called with `TrainerControl` after each optimizer step.
        after_epoch: called with `TrainerControl` at the end of an epoch.
    """

    def __init__(
        self,
        before_training: Callable[[int], None],
        before_step: Callable[[], None],
        after_step: Callable[[TrainerControl], None],
        after_epoch: Callable[[TrainerControl], None],
    ) -> None:
        self.before_training, self.before_step = before_training, before_step
        self.after_step, self.after_epoch = after_step, after_epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_training(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_epoch(control)


class PhaseReporter(TrainerCallback):
    """Report the phase of this rank to the watchdog; the last callback, so that what the others decide is known."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watchdog.report_phase("step", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            watchdog.report_phase("save", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


class MetricsWriter(TrainerCallback):
    """Write `metrics.jsonl`, one line per logged step, with the loss breakdown."""

    def __init__(self, path: Path, parts: LossBreakdown, held_out: Any) -> None:
        self.path, self.parts, self.held_out = path, parts, held_out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.touch()  # also for a run that resumes from its last step and logs none

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append_metrics(self.path, {"step": state.global_step, **logs, **self.parts.logged})
        elif state.is_world_process_zero and logs and "eval_loss" in logs:
            parts = {f"eval_{name}": means for name, means in self.held_out.parts.logged.items()}
            append_metrics(self.path, {"step": state.global_step, **logs, **parts})


class ProgressBar(ProgressCallback):
    """Show loss and supervised tokens per second in a bar; one line per logged step without a terminal."""

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
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate} supervised tokens/s")
        else:
            logger.info(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.3g}  {rate} supervised tokens/s"
            )
