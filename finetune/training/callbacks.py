"""What happens beside the steps: the plan before the first one, a line or a bar, `metrics.jsonl`, the guard; at the end
of each step all ranks agree whether to stop, and on what was not finite."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from finetune.distributed import stop_requests, watchdog
from finetune.distributed.collectives import all_gather_ints, all_gather_object, host_names, run_on_all_ranks
from finetune.distributed.process_setup import enable_gc, keep_freed_blocks
from finetune.training import nonfinite
from finetune.training.loss_breakdown import LossBreakdown
from finetune.training.metrics import append_metrics
from finetune.training.nonfinite import LossScale, NonFiniteCounter
from finetune.training.stragglers import Straggler, Stragglers
from finetune.utils.console import is_rank_0, is_terminal

logger = logging.getLogger(__name__)


class TrainStart(TrainerCallback):
    """Announces the plan once the number of steps is known, and starts the clock."""

    def __init__(self, begin: Callable[[], None], on_plan: Callable[[int], None]) -> None:
        self.begin, self.on_plan = begin, on_plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_plan(state.max_steps)
        enable_gc()
        keep_freed_blocks()
        self.begin()


class PhaseReporter(TrainerCallback):
    """Tells the guard where the rank is; the last of the callbacks, so that what the others decide is known."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watchdog.report_phase("step", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            watchdog.report_phase("save", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


class ComputeTimer:
    """The seconds of a step that a rank works on its own, up to where it first waits for others.

    They begin where the last exchange, save or logged line ended, so that loading data counts. They end behind the
    forward pass: ZeRO-2 reduces gradients in each backward pass, so that it is the first one's; ZeRO-1 in the last.
    Some forward passes wait for others themselves (over gloo in plain sight): under ZeRO-3, where ranks share rows, and
    in DDP, which sends buffers around. There only what comes before the first one counts, and a slow one is not seen.
    """

    def __init__(self, device: Any, *, waits_in_forward: bool, waits_in_each_backward: bool) -> None:
        self.waits_in_forward, self.waits_in_each_backward = waits_in_forward, waits_in_each_backward
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Here the next step begins."""
        self.began, self.own = self._now(), None

    def forward_begins(self) -> None:
        if self.waits_in_forward and self.own is None:
            self.own = self._now()

    def forward_ended(self) -> None:
        if not self.waits_in_forward and not (self.waits_in_each_backward and self.own is not None):
            self.own = self._now()

    def seconds(self) -> float:
        """Of this step; on a GPU the longer of the host's and the GPU's, which must have come so far."""
        if self.own is None:
            return 0.0
        host = self.own[0] - self.began[0]
        return max(host, self.began[1].elapsed_time(self.own[1]) / 1000) if self.on_gpu else host

    def _now(self) -> tuple[float, Any]:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        return time.perf_counter(), event


class StepMonitor(TrainerCallback):
    """The end of each step: one exchange of three integers between all ranks, and what follows from it, alike on each.

    The host looks at losses here and nowhere else: DeepSpeed waits for the device at a step's end anyway.

    Attributes:
        count: steps that were not finite.
        verdict: why the run cannot go on, to be raised once this step is logged.
    """

    def __init__(self, trainer: Any, path: Path, own_time: ComputeTimer) -> None:
        self.trainer, self.path, self.own_time = trainer, path, own_time
        self.count, self.stragglers = NonFiniteCounter(), Stragglers()
        self.verdict: str | None = None
        self.losses: list[torch.Tensor] = []
        self.grad_norm: Any = None
        self.is_left_out = self.save_is_due = self.has_begun = False
        self.hosts: list[str] = []
        self.scale: LossScale | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hosts, self.scale = host_names(), self._scale()
        self._guard_optimizer()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.has_begun:
            stop_requests.watch_stop_file(Path(args.output_dir) / stop_requests.STOP_FILE)
            self.has_begun = True
        self.losses, self.grad_norm, self.is_left_out = [], None, False
        self.loss_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = [float(one) for one in torch.stack(self.losses).tolist()]
        norm = None if self.grad_norm is None else float(self.grad_norm)
        left_out = self.is_left_out or self.trainer.accelerator.optimizer_step_was_skipped
        bits = nonfinite.finite_flags(losses, norm, left_out=left_out, scale=self.scale)
        mine = [int(stop_requests.stop_requested()), bits, int(self.own_time.seconds() * 1e6)]
        asked, found, own = zip(*all_gather_ints(mine, args.device), strict=True)
        self.scale = self._scale()
        straggler = self.stragglers.add([one / 1e6 for one in own], time.perf_counter() - self.own_time.began[0])
        if straggler is not None:
            self._name(straggler)
        if nonfinite.is_loss_scale_search(found):
            logger.warning(
                f"step {state.global_step} was left out: its gradients are too large for fp16 though each loss is "
                f"finite; the loss scale is {self.scale.value:g} now"
            )
        elif not nonfinite.all_finite(found):
            self._not_finite(state, control, found, losses, norm)
        else:
            self.count.in_a_row = 0
            control.should_save = control.should_save or self.save_is_due
            self.save_is_due = False
        if any(asked) and self.verdict is None and state.global_step < state.max_steps:
            self._stop(control)
        self.own_time.restart()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by is not None:
            control.should_save = False  # it was saved when the step ended
        elif self.count.in_a_row:
            self._save_later(state, control)

    def _stop(self, control: Any) -> None:
        control.should_save = control.should_training_stop = True
        reasons = all_gather_object(stop_requests.stop_reason())
        self.trainer.stopped_by = next(f"{one} on rank {rank}" for rank, one in enumerate(reasons) if one is not None)

    def _not_finite(self, state: Any, control: Any, found: tuple, losses: list[float], norm: float | None) -> None:
        """Count the step, say which rows it holds, leave its loss out of the mean; end the run where it is too many."""
        step, any_loss = state.global_step, any(one & nonfinite.LOSS for one in found)
        records = self._records(step, losses, only_lost=any_loss)
        run_on_all_ranks(
            lambda: nonfinite.append_records(self.path, records) if self.trainer.saver.disk.is_writer else None
        )
        if any_loss:
            self.trainer._tr_loss.copy_(self.loss_before)
            self.count.lost_since_log += 1
        why = self.count.add(step, state.max_steps)
        what, rows = nonfinite.describe_nonfinite(found, records, norm), nonfinite.describe_rows(records)
        was_made = not any(one & nonfinite.LEFT_OUT for one in found)
        logger.warning(
            f"step {step}: {what}; rows {rows}; "
            + ("its gradient is finite and was learned from" if was_made else "the step was left out, no weight moved")
            + f"; {self.count.steps} of {step} steps were not finite"
        )
        if why is None:
            self._save_later(state, control)
            return
        control.should_log, control.should_save = True, False
        self.verdict = (
            f"step {step}: {what}: lower --learning_rate, warm up longer (--warmup_steps), or leave these rows out: "
            f"{rows}. The run ends because {why}. {self.advice()}"
        )

    def _save_later(self, state: Any, control: Any) -> None:
        """Not in a step that was not finite: a run that ends for it is to begin again in front of it."""
        if control.should_save and state.global_step < state.max_steps:
            control.should_save, self.save_is_due = False, True

    def advice(self) -> str:
        """Where the run can go on, and how."""
        newest, lineage = self.trainer.saver.newest, self.trainer.lineage
        where, resume = "there is no checkpoint yet", "auto"
        if newest is not None:
            where = f"the newest checkpoint is {newest.name}"
        elif lineage.manifest is not None:
            where = f"the newest checkpoint is that of step {lineage.manifest.step}"
            resume = "auto" if lineage.folder.parent == self.path.parent else str(lineage.folder)
        if not self.count.steps:
            return f"{where}: --resume_from_checkpoint {resume} goes on there"
        return (
            f"The rows, with their text, are in {self.path}, and {where}: to go on without them, give "
            f"--skip_rows {self.path} --resume_from_checkpoint {resume}"
        )

    def _records(self, step: int, losses: list[float], *, only_lost: bool) -> list[dict[str, Any]]:
        """The rows of the micro-batches with a lost loss, or of all where only the gradient was lost; of all ranks."""
        trainer, batches = self.trainer, self.trainer.train_dataset
        epoch, place = batches.sampler.position(step - 1)
        mine = []
        for number, loss in enumerate(losses):
            is_lost = not math.isfinite(loss)
            if only_lost and not is_lost:
                continue
            seen = {"step": step, "rank": trainer.args.process_index, "micro_batch": number}
            part = loss / trainer.args.world_size
            seen |= {"found": str(loss), "loss": None} if is_lost else {"found": None, "loss": part}
            described = batches.describe(batches.rows(epoch, place, number), trainer.processing_class.decode)
            mine += [{**one, **seen} for one in described]
        every = [one for records in all_gather_object(mine) for one in records]
        known = {(one["source"], one["row"], one["micro_batch"], one["text"]): one for one in every}
        return list(known.values())  # ranks that share rows found the same ones

    def _name(self, slow: Straggler) -> None:
        host = self.hosts[slow.rank]
        logger.warning(
            f"rank {slow.rank} on {host} is slow: it works {slow.seconds:.2f} s of each step on its own, the others "
            f"{slow.others:.2f} s, and all wait for it: {slow.cost:.2f} of {slow.step_seconds:.2f} s a step"
        )

    def _scale(self) -> LossScale | None:
        """fp16's, where it moves."""
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            return LossScale(scaler.get_scale(), 1.0)
        optimizer = getattr(self.trainer.model_wrapped, "optimizer", None)
        config = getattr(optimizer, "loss_scale_config", None)  # without ZeRO
        if getattr(config, "dynamic_loss_scale", False):
            return LossScale(config.cur_scale, config.min_loss_scale)
        scaler = getattr(optimizer, "loss_scaler", None)
        return LossScale(scaler.cur_scale, scaler.min_scale) if getattr(scaler, "dynamic", False) else None

    def _guard_optimizer(self) -> None:
        """Let an optimizer that nobody guards make no step from gradients that are not finite: DeepSpeed's own do so
        under ZeRO, the scaler in fp16; plain torch and DeepSpeed's stage 0 do not."""
        engines = getattr(self.trainer.model_wrapped, "optimizer", None)
        if hasattr(engines, "overflow"):
            return
        optimizer = self.trainer.optimizer.optimizer if engines is None else engines
        optimizer = getattr(optimizer, "optimizer", optimizer)  # in DeepSpeed's for bf16 without ZeRO

        def drop(optimizer: Any, *_: Any) -> None:
            trained = [one for group in optimizer.param_groups for one in group["params"]]
            norm = torch.nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None])
            self.is_left_out = not math.isfinite(norm)
            self.trainer.optimizer._is_overflow = self.is_left_out  # so that the learning rate waits, as in DeepSpeed
            if self.is_left_out:
                for one in trained:
                    one.grad = None

        optimizer.register_step_pre_hook(drop)


class MetricsWriter(TrainerCallback):
    """Writes `metrics.jsonl`, one line per logged step, with the parts that the loss is made of."""

    def __init__(self, path: Path, parts: LossBreakdown, held_out: Any) -> None:
        self.path, self.parts, self.held_out = path, parts, held_out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.touch()  # also for a run that goes on from its last step, and logs none

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append_metrics(self.path, {"step": state.global_step, **logs, **self.parts.logged})
        elif state.is_world_process_zero and logs and "eval_loss" in logs:
            parts = {f"eval_{name}": means for name, means in self.held_out.parts.logged.items()}
            append_metrics(self.path, {"step": state.global_step, **logs, **parts})


class ProgressBar(ProgressCallback):
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
            logger.info(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.3g}  {rate} learned tokens/s"
            )
