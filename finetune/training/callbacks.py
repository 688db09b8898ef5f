"""Callbacks of the Trainer: the phase for the watchdog, progress."""

import logging
import time
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
    """Show loss, gradient norm and supervised tokens per second in a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            norm = f", grad norm {logs['grad_norm']:.3g}" if logs.get("grad_norm") is not None else ""
            rate = f"{logs['supervised_tokens_per_second']:.0f} supervised tokens/s"
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}{norm}, {rate}")


class ProgressLines(TrainerCallback):
    """Log a line per logged step, evaluation and checkpoint; under a bar those of the steps go to the file only."""

    def __init__(self, *, has_bar: bool) -> None:
        self.extra = {"file_only": has_bar}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            elapsed = time.monotonic() - self.since
            left = elapsed / max(state.global_step - self.first_step, 1) * (state.max_steps - state.global_step)
            norm = logs.get("grad_norm")
            logger.info(
                f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}  loss {logs['loss']:.4f}  "
                + ("" if norm is None else f"grad norm {norm:.3g}  ")
                + f"lr {logs['learning_rate']:.3g}  {logs['supervised_tokens_per_second']:.0f} supervised tokens/s  "
                f"{duration(elapsed)}, {duration(left)} left",
                extra=self.extra,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if metrics and metrics.get("eval_loss") is not None:
            seconds = duration(metrics["eval_seconds"])
            logger.info(
                f"step {state.global_step}/{state.max_steps}  held-out loss {metrics['eval_loss']:.4f}, {seconds}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logger.info(f"Saved checkpoint-{state.global_step}")


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds.

    >>> duration(59.6), duration(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
