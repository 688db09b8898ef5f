"""What happens beside the steps: the plan in front of the first one, a line or a bar, `metrics.jsonl`, the guard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from finetune import guard
from finetune.console import is_rank_0, is_terminal, say
from finetune.hardware import resume_collection
from finetune.metrics import append_metrics


class Beginning(TrainerCallback):
    """Announces the plan once the number of steps is known, and starts the clock."""

    def __init__(self, begin: Callable[[], None], on_plan: Callable[[int], None]) -> None:
        self.begin, self.on_plan = begin, on_plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_plan(state.max_steps)
        resume_collection()
        self.begin()


class Whereabouts(TrainerCallback):
    """Tells the guard where the rank is; the last of the callbacks, so that what the others decide is known."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guard.phase("step", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            guard.phase("save", state.global_step)


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl`, one line per logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.touch()  # also for a run that goes on from its last step, and logs none

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append_metrics(self.path, {"step": state.global_step, **logs})


class Progress(ProgressCallback):
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
