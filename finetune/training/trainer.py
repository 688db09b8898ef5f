"""`SupervisedTrainer`: the stock Trainer with our batches, loss and metrics."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl

from finetune.checkpoint import Manifest, remove_universal
from finetune.checkpoint.saver import RunIdentity, resume_advice
from finetune.dataset.collator import pop_targets, to_device
from finetune.dataset.dataloader import MicroBatchDataLoader, Prefetcher, StepTotals
from finetune.distributed import stop_requests
from finetune.distributed.collectives import all_gather_object
from finetune.distributed.process_setup import enable_gc, keep_freed_blocks
from finetune.models.adapters import InitialLora
from finetune.models.loss import supervised_loss
from finetune.models.model_config import router_loss_weight
from finetune.models.module_kinds import ModuleKinds
from finetune.run_dir.run_json import METRICS_FILE, library_versions, now
from finetune.training.callbacks import ProgressBar, ProgressLines
from finetune.training.checkpoint_trainer import CheckpointTrainer
from finetune.training.compat import (
    configure_ddp,
    current_loss_scale,
    enable_sequence_parallel,
    separate_step_counters,
    skip_nonfinite_steps,
    zero_stage,
)
from finetune.training.dataloaders import Dataloaders
from finetune.training.evaluator import HeldOutEvaluator
from finetune.training.hyperparameters import Hyperparameters
from finetune.training.loss_breakdown import LossBreakdown
from finetune.training.metrics import StepMeter, append_metrics, model_flops, peak_memory
from finetune.training.nonfinite import (
    MINIMUM_SCALE_ERROR,
    NONFINITE_ROWS_FILE,
    LossScale,
    NonFiniteCounter,
    finite_or_none,
)
from finetune.training.step_monitor import ComputeTimer, StepMonitor, StepReport
from finetune.training.weight_proof import WeightChanges, WeightProof
from finetune.utils.console import is_terminal
from finetune.utils.errors import NumericsError


class SupervisedTrainer(CheckpointTrainer, TrainerCallback):
    """The Trainer with micro-batches of our sampler and a loss that is exact over the whole step on any ranks.

    It is a callback of its own, for what happens around its steps.

    Args:
        peak_flops: of one device per second; None: unknown.
        keep: how many checkpoints stay; None or 0: all.
        initial_lora: the LoRA matrices as PiSSA or OLoRA initialised them.
        on_plan: called by every rank with the number of steps before the first one.
    """

    def __init__(
        self,
        *,
        loaders: Dataloaders,
        kinds: ModuleKinds,
        identity: RunIdentity,
        peak_flops: float | None,
        keep: int | None,
        initial_lora: InitialLora | None = None,
        on_plan: Callable[[int], None],
        **kwargs: Any,
    ) -> None:
        batches, held_out = loaders.train, loaders.held_out
        super().__init__(train_dataset=batches, eval_dataset=held_out, data_collator=batches.collate, **kwargs)
        self.held_out = None if held_out is None else HeldOutEvaluator(held_out, self.args.device)
        self.selects_logits = loaders.layout.selects_logits
        self.flops, self.peak_flops = model_flops(self.model, kinds), peak_flops
        self.loss_is_scaled_for_ga = True  # by `compute_loss`, over the whole step
        self.zero_stage = zero_stage(self.accelerator)
        configure_ddp(self.model, self.accelerator, self.args.ddp_find_unused_parameters)
        self.sharing_ranks = self.args.world_size // batches.sampler.shape.world_size
        if self.sharing_ranks > 1:
            enable_sequence_parallel(self.model, self.accelerator)
        self.init_saver(identity, keep, initial_lora, self.zero_stage)
        self.meter = StepMeter()
        self.breakdown = LossBreakdown(batches.cells.sources, self.args.device)
        self.stopped_by: str | None = None  # the request that ended the run early
        self.kinds = kinds
        self.error: str | None = None  # why the run cannot continue, raised once the step is logged
        self.monitor = StepMonitor(
            self.args.device,
            self.args.process_index,
            self.args.world_size,
            self.output_dir / NONFINITE_ROWS_FILE,
            writes=identity.storage.is_writer,
        )
        sends_buffers = not (self.is_deepspeed_enabled or self.args.world_size == 1)
        self.timer = ComputeTimer(
            self.args.device,
            waits_in_forward=self.zero_stage == 3 or sends_buffers or self.sharing_ranks > 1,
            waits_in_each_backward=self.zero_stage == 2,
        )
        self.on_plan, self.logged_at = on_plan, 0
        self.prefetcher = Prefetcher(pins=self.args.dataloader_pin_memory and self.args.device.type != "cpu")
        self._micro_losses: list[torch.Tensor] = []
        self._grad_norm: Any = None
        self._step_rate = 0.0
        self._is_skipped = self._save_is_due = self.has_stepped = False
        self._loss_scale: LossScale | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(self)
        if is_terminal():
            self.add_callback(ProgressBar())
        self.add_callback(ProgressLines(has_bar=is_terminal()))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; no thread or process that builds batches is left."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.prefetcher.close()

    def get_sp_size(self) -> int:
        """Return 1: the loader counts the micro-batches of an epoch, whichever ranks share them."""
        return 1

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch forward and backward; return the loss that is averaged over all ranks for the log."""
        try:
            loss = super().training_step(*args, **kwargs) * (self.args.world_size / self._ranks_averaged_over())
        except Exception as error:
            if MINIMUM_SCALE_ERROR not in str(error):
                raise
            raise NumericsError(
                f"step {self.state.global_step + 1}: the gradients overflow fp16 even at the minimum loss scale: give "
                f"--bf16 True, or lower --learning_rate; {self.resume_advice()}"
            ) from None
        self._micro_losses.append(loss)
        return loss

    def _ranks_averaged_over(self) -> int:
        """Number of ranks that the sum of gradients is divided by.

        Where ranks share rows, DeepSpeed divides by the number of groups, but in stage 3's reduce-scatter by all
        ranks (0.19.8).
        """
        return self.args.world_size // (1 if self.zero_stage == 3 else self.sharing_ranks)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule, and note the hyperparameters of this run before a checkpoint is loaded over them."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # else DeepSpeed is still building its own optimizer
            self._hyperparameters = Hyperparameters.read(self.optimizer, scheduler)
        return scheduler

    def get_train_dataloader(self) -> MicroBatchDataLoader:
        """Return the micro-batches of this rank; nothing needs sharding, repeating or gathering."""
        args = self.args
        return MicroBatchDataLoader(
            self.train_dataset,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=stop_requests.ignore_in_worker,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Return the micro-batches of one optimizer step; their totals are known without a collective."""
        batches = self.prefetcher.take(epoch_iterator, num_batches)
        if batches:
            step = batches[0]["counts"].step
            self.meter.add(step.tokens, step.supervised_tokens, self._flops_of(step))
            if not step.supervised_tokens:  # --skip_rows skipped all of it: its loss of 0 does not count
                self.monitor.count.lost_since_log += 1
        return batches, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return to_device(inputs, self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this rank's part of the mean over the whole step, times the number that gradients are divided by."""
        counts = inputs.pop("counts")
        targets = pop_targets(inputs)
        each = None if targets.cells is None else torch.empty(len(targets.tokens), device=targets.tokens.device)
        ranks = self._ranks_averaged_over()
        self.timer.before_forward()
        scale, smoothing = ranks / counts.denominator, self.args.label_smoothing_factor
        loss, outputs = supervised_loss(model, inputs, targets, scale=scale, smoothing=smoothing, each=each)
        if each is not None:
            self.breakdown.add(targets.cells, each)
        balance = getattr(outputs, "aux_loss", None)  # load-balancing loss of a mixture of experts
        if balance is not None:
            share = ranks * counts.tokens / self.sharing_ranks / max(counts.step.tokens, 1)
            loss = loss + balance.to(loss) * router_loss_weight(self.model.config) * share
        self.timer.after_forward()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of one micro-batch, forward and backward; transformers' own count is 0 under ZeRO-3."""
        counts = inputs["counts"]
        return round(self._flops_of(counts.step) * counts.tokens / max(counts.step.tokens, 1))

    def _flops_of(self, step: StepTotals) -> float:
        logits = step.supervised_tokens if self.selects_logits else step.tokens
        return self.flops.of(tokens=step.tokens, logits=logits, pairs=step.pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates and peak memory of all ranks to what a step logs; end the run on all where it cannot continue."""
        if "loss" in logs:
            count = self.monitor.count
            logs["loss"] = count.mean_without(logs["loss"], self.state.global_step - self.logged_at)
            logs |= {"non_finite_steps": count.steps, **self._rates()}
            self.logged_at, count.lost_since_log = self.state.global_step, 0
            self.breakdown.take()
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            parts = self.held_out.parts if self.held_out and "eval_loss" in logs else self.breakdown
            append_metrics(self.output_dir / METRICS_FILE, {"step": self.state.global_step, **logs, **parts.logged})
        self.state.log_history[-1] = {name: finite_or_none(value) for name, value in self.state.log_history[-1].items()}
        if self.error is not None:
            raise NumericsError(self.error)
        self.timer.restart()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as transformers does; of a schedule-free optimizer the averaged weights."""
        control = self.control
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self.optimizer.eval()  # type: ignore[union-attr]  # each training step returns to those that it trains
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_learning_rate(self) -> float:
        """Return the rate of this step: a schedule that DeepSpeed steps is past it when transformers asks."""
        return self._step_rate

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm, and keep it for the end of the step."""
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def _rates(self) -> dict[str, float]:
        memory = peak_memory(self.args.device)
        peak = torch.tensor([*memory.values()], device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rates, self.meter = self.meter.rates(self.peak_flops and self.peak_flops * self.args.world_size), StepMeter()
        return {**rates, **dict(zip(memory, peak.tolist(), strict=True))}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate and log the loss on the held-out conversations. All ranks."""
        assert self.held_out is not None  # the Trainer calls this with an eval_dataset only
        metrics = self.held_out.loss(self.model_wrapped, self._prepare_inputs, self.state.global_step)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.after_pause(metrics["eval_seconds"])
        return metrics

    def _restore_state(self) -> None:
        """Restore the sums since the last logged step, which belong to the next line, and the hyperparameters."""
        if self.saver.storage.is_writer:
            remove_universal(self.saver.output_dir)
        manifest = self.identity.manifest
        if manifest is not None and manifest.world_size == self.args.world_size:
            self._tr_loss += manifest.loss_since_log[self.args.process_index]
            self.breakdown.restore(manifest.parts_since_log, is_first=self.args.process_index == 0)
            self._globalstep_last_logged = manifest.last_logged
            self.monitor.count = NonFiniteCounter(**manifest.non_finite)
        elif manifest is not None and self.is_deepspeed_enabled:
            separate_step_counters(self.model_wrapped.optimizer)
            self.monitor.count = NonFiniteCounter(**{**manifest.non_finite, "lost_since_log": 0})
        if manifest is not None:
            self._hyperparameters.apply(self.optimizer, self.lr_scheduler)
        self.logged_at = self._globalstep_last_logged
        self.meter = StepMeter()

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Show the plan, restore the state of a checkpoint, and watch for non-finite steps."""
        self.on_plan(state.max_steps)
        self.weight_proof = WeightProof(self.model, self.kinds)
        if self.is_world_process_zero():
            (self.output_dir / METRICS_FILE).touch()  # also for a run that resumes from its last step and logs none
        enable_gc()
        keep_freed_blocks()
        self._restore_state()
        self._loss_scale = current_loss_scale(self.accelerator, self.model_wrapped)
        skip_nonfinite_steps(self.optimizer, self.model_wrapped, partial(setattr, self, "_is_skipped"))

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.prefetcher.end_epoch()

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.loading.close()
        self.has_stepped = True
        stop_requests.watch_stop_file(self.output_dir / stop_requests.STOP_FILE)  # a stop can wait for the step's end
        self._micro_losses, self._grad_norm, self._is_skipped = [], None, False
        rates = self._hyperparameters.base_rates  # the first group, whose rate is read, may have one of its own
        self._step_rate = super()._get_learning_rate() * (self.args.learning_rate / rates[0] if rates else 1)
        self._loss_before = self._tr_loss.clone()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the step over all ranks, and apply what they decide."""
        if args.logging_strategy != "no" and state.global_step in (1, state.max_steps):
            control.should_log = True
        scale = current_loss_scale(self.accelerator, self.model_wrapped)
        report = StepReport(
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            losses=[float(loss) for loss in torch.stack(self._micro_losses).tolist()],
            grad_norm=None if self._grad_norm is None else float(self._grad_norm),
            skipped=self._is_skipped or self.accelerator.optimizer_step_was_skipped,
            scale=self._loss_scale,
            next_scale=scale,
            describe_rows=self._describe_rows,
        )
        decision = self.monitor.end_step(report, self.timer)
        self._loss_scale = scale
        if decision.loss_is_lost:
            self._tr_loss.copy_(self._loss_before)
        if decision.error is not None:
            control.should_log, control.should_save = True, False
            self.error = f"{decision.error} {self.resume_advice()}"
        elif not decision.is_finite:
            self._save_later(control)
        elif decision.is_clean:
            control.should_save = control.should_save or self._save_is_due
            self._save_is_due = False
        if decision.stopped_by is not None:
            control.should_save = control.should_training_stop = True
            self.stopped_by = decision.stopped_by
        self.timer.restart()

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped_by is not None:
            control.should_save = False  # it was saved when the step ended
        elif self.monitor.count.in_a_row:
            self._save_later(control)

    def _save_later(self, control: TrainerControl) -> None:
        """Postpone a save that is due in a non-finite step: a run that ends for it resumes from before it."""
        if control.should_save and self.state.global_step < self.state.max_steps:
            control.should_save, self._save_is_due = False, True

    def _describe_rows(self, step: int, micro_batch: int) -> list[dict[str, Any]]:
        batches = self.train_dataset
        epoch, step_of_epoch = batches.sampler.position(step - 1)
        return batches.describe(
            batches.rows(epoch, step_of_epoch, micro_batch), lambda ids: str(self.processing_class.decode(ids))
        )

    def describe_step(self, step: int) -> Manifest:
        epoch, place = self.train_dataset.sampler.position(step)
        return Manifest(
            run_id=self.identity.run_id,
            step=step,
            world_size=self.args.world_size,
            step_rows=self.identity.step_rows,
            position={"epoch": epoch, "step": place},
            last_logged=self._globalstep_last_logged,
            loss_since_log=all_gather_object(float(self._tr_loss)),
            parts_since_log=self.breakdown.total(),
            facts=self.identity.facts,
            trained=self.trained,
            versions=library_versions(),
            disks=self.identity.storage.all_groups,
            written=now(),
            is_resumable=not self.args.save_only_model,
            non_finite=asdict(self.monitor.count),
        )

    def resume_advice(self) -> str:
        """Return where the run can resume, and how."""
        rows_file = self.monitor.rows_file if self.monitor.count.steps else None
        return resume_advice(self.saver.newest, self.identity, self.output_dir, rows_file)

    def after_pause(self, seconds: float) -> None:
        """Leave a save or an evaluation out of the seconds of a step."""
        self.meter.since += seconds
        self.timer.restart()

    def weight_changes(self) -> WeightChanges | None:
        """Compare the weights with those before the first step of this process; None if it ran none. All ranks."""
        return self.weight_proof.compare() if self.has_stepped else None

    def loss_of(self, example: dict[str, Any]) -> float:
        """Return the mean loss over the supervised tokens of one example, without dropout. All ranks.

        Each rank computes the whole example: Ulysses shares rows in training only.
        """
        collate = replace(self.train_dataset.collate, part=(0, 1))
        batch = self._prepare_inputs(collate([example]))
        targets = pop_targets(batch)
        self.model.eval()
        with torch.no_grad():
            return float(supervised_loss(self.model_wrapped, batch, targets, scale=1 / len(targets.tokens))[0])
