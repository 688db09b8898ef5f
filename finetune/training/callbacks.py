"""Callbacks of the Trainer: the phase for the watchdog, progress."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from finetune.distributed import watchdog

logger = logging.getLogger(__name__)


class PhaseReporter(TrainerCallback):
    """Report the phase of this rank to the watchdog; the last callback, so that what the others decide is known."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watchdog.report_phase("step", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            watchdog.report_phase("save", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


class ProgressBar(ProgressCallback):
    """Show loss and supervised tokens per second in a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            rate = f"{logs['supervised_tokens_per_second']:.0f} supervised tokens/s"
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate}")


class ProgressLines(TrainerCallback):
    """Show one line per logged step, where there is no terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            logger.info(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.3g}  {logs['supervised_tokens_per_second']:.0f} supervised tokens/s"
            )
