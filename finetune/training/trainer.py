"""`SupervisedTrainer`.

The stock Trainer with batches of our own sampler, a loss that is a mean over the whole step whatever the cluster's
shape, token rates, metrics and whole adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedSchedulerWrapper
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.checkpoint import Manifest, remove_universal, steps_in
from finetune.checkpoint.saver import RunIdentity, Saver, checkpoint_bytes, checkpoint_engine, trained_shapes
from finetune.dataset.collator import pop_targets
from finetune.dataset.dataloader import MicroBatchDataLoader, MicroBatchDataset, StepTotals
from finetune.distributed import stop_requests
from finetune.distributed.collectives import all_gather_object
from finetune.models.adapters import InitialLora, gather_virtual_tokens
from finetune.run_dir.run_json import METRICS_FILE, library_versions, now, update_run_json
from finetune.training.callbacks import ComputeTimer, MetricsWriter, ProgressBar, StepMonitor, TrainStart
from finetune.training.evaluator import HeldOutEvaluator, best_checkpoint
from finetune.training.loss import supervised_loss
from finetune.training.loss_breakdown import LossBreakdown
from finetune.training.metrics import ModelFlops, StepMeter, peak_memory_bytes
from finetune.training.nonfinite import (
    NONFINITE_ROWS_FILE,
    NonFiniteCounter,
    check_weights,
    finite_or_none,
    is_minimum_scale_error,
)
from finetune.training.parallelism import (
    enable_sequence_parallel,
    fix_universal_optimizer_state,
    use_gradient_views,
    zero_stage,
)
from finetune.utils.console import is_rank_0
from finetune.utils.errors import ConfigError, NumericsError


class SupervisedTrainer(Trainer):
    """The stock Trainer, but for where batches come from and what the loss is.

    Args:
        micro_batches: of this rank.
        flops: what the model costs, and `peak_flops` what one device can do in a second (None: unknown).
        lineage: which run this is, and from which checkpoint it goes on.
        keep: how many checkpoints stay; None or 0: all.
        held_out: conversations to evaluate on.
        initial_lora: the LoRA matrices as PiSSA left them, when that is how they were initialised.
        on_plan: called by every rank with the number of steps before the first one.
    """

    def __init__(
        self,
        *,
        micro_batches: MicroBatchDataset,
        flops: ModelFlops,
        peak_flops: float | None,
        lineage: RunIdentity,
        keep: int | None,
        held_out: MicroBatchDataset | None = None,
        initial_lora: InitialLora | None = None,
        on_plan: Callable[[int], None],
        **kwargs: Any,
    ) -> None:
        data = {"train_dataset": micro_batches, "eval_dataset": held_out, "data_collator": micro_batches.collate}
        super().__init__(**data, **kwargs)
        self.held_out = None if held_out is None else HeldOutEvaluator(held_out, self.args.device)
        self.flops, self.peak_flops = flops, peak_flops
        self.initial_lora = initial_lora
        self.loss_is_scaled_for_ga = True  # by `compute_loss`, over the whole step
        self.zero_stage = zero_stage(self.accelerator)
        use_gradient_views(self.model, self.accelerator)
        self.sharing_ranks = self.args.world_size // micro_batches.sampler.shape.world_size
        if self.sharing_ranks > 1:
            enable_sequence_parallel(self.model, self.accelerator)
        self.group_settings: list[dict[str, Any]] = []
        self.lineage = lineage
        self.trained = trained_shapes(self.model)
        lineage.check_trained(self.trained)
        share = len(lineage.disk.ranks) / self.args.world_size
        size = checkpoint_bytes(
            self.model, self.trained, stage=self.zero_stage, share=share, only_model=self.args.save_only_model
        )
        self.saver = Saver(Path(self.args.output_dir), lineage.disk, keep, size, self._manifest)
        self.meter = StepMeter()
        self.parts = LossBreakdown(micro_batches.cells.sources, self.args.device)
        self.stopped_by: str | None = None  # the request that ended the run early, in words
        self.step_end = self._step_end()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(TrainStart(self._begin, on_plan))
        self.add_callback(self.step_end)
        self.add_callback(MetricsWriter(Path(self.args.output_dir) / METRICS_FILE, self.parts, self.held_out))
        self.add_callback(ProgressBar())

    def _step_end(self) -> StepMonitor:
        gathers, sends_buffers = self.zero_stage == 3, not (self.is_deepspeed_enabled or self.args.world_size == 1)
        own_time = ComputeTimer(
            self.args.device,
            waits_in_forward=gathers or sends_buffers or self.sharing_ranks > 1,
            waits_in_each_backward=self.zero_stage == 2,
        )
        return StepMonitor(self, Path(self.args.output_dir) / NONFINITE_ROWS_FILE, own_time)

    def get_sp_size(self) -> int:
        """1: an epoch has as many micro-batches as the loader says, whoever shares their rows."""
        return 1

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forwards and backwards; what it returns is averaged over all ranks to be logged.

        Raises:
            NumericsError: in fp16 the gradients overflow even at the least loss scale.
        """
        try:
            loss = super().training_step(*args, **kwargs) * (self.args.world_size / self._ranks_averaged_over())
        except Exception as error:
            if not is_minimum_scale_error(error):
                raise
            raise NumericsError(
                f"step {self.state.global_step + 1}: the gradients overflow fp16 at the least loss scale too: give "
                f"--bf16 True, or lower --learning_rate; {self.step_end.advice()}"
            ) from None
        self.step_end.losses.append(loss)
        return loss

    def _ranks_averaged_over(self) -> int:
        """By how many ranks the sum of their gradients is divided. Where ranks share rows, DeepSpeed divides by the
        groups of them, but in stage 3's reduce-scatter (0.19.8) by all ranks."""
        return self.args.world_size // (1 if self.zero_stage == 3 else self.sharing_ranks)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; what each group of parameters is to have is remembered for `_begin`.

        Raises:
            ConfigError: its package is not installed.
        """
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except ImportError as error:
            raise ConfigError(f"--optim {self.args.optim.value}: {error}") from None
        self.group_settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in getattr(optimizer, "param_groups", ())  # DeepSpeed makes its own where its JSON names one
        ]
        return optimizer

    def get_train_dataloader(self) -> MicroBatchDataLoader:
        """This rank's micro-batches; nothing is left to shard, to repeat or to gather."""
        args = self.args
        return MicroBatchDataLoader(
            self.train_dataset,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=stop_requests.ignore_in_worker,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The micro-batches of one optimizer step; what they count for is known without asking other ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if batches:
            step = batches[0]["counts"].step
            self.meter.add(step.tokens, step.supervised_tokens, self._flops_of(step))
            if not step.supervised_tokens:  # --skip_rows left nothing of it: that is no loss of 0
                self.step_end.count.lost_since_log += 1
        return batches, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's part of the mean over the whole step, times the ranks by which the gradients are divided."""
        counts = inputs.pop("counts")
        targets = pop_targets(inputs)
        each = None if targets.cells is None else torch.empty(len(targets.tokens), device=targets.tokens.device)
        ranks = self._ranks_averaged_over()
        self.step_end.own_time.forward_begins()
        outputs = model(**inputs)
        loss = supervised_loss(
            outputs.logits,
            targets.tokens,
            scale=ranks / counts.denominator,
            target_positions=targets.positions,
            weights=None if targets.beside is None else 1 / targets.beside,
            smoothing=self.args.label_smoothing_factor,
            each=each,
        )
        if each is not None:
            self.parts.add(targets.cells, each)
        balance = getattr(outputs, "aux_loss", None)  # of a mixture of experts that is told to keep its load even
        if balance is not None:
            share = ranks * counts.tokens / self.sharing_ranks / max(counts.step.tokens, 1)
            loss = loss + balance.to(loss) * self.model.config.get_text_config().router_aux_loss_coef * share
        self.step_end.own_time.forward_ended()
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Of one micro-batch, forward and backward; transformers' own count is 0 under ZeRO-3."""
        counts = inputs["counts"]
        return self._flops_of(counts.step) * counts.tokens / max(counts.step.tokens, 1)

    def _flops_of(self, step: StepTotals) -> float:
        logits = step.supervised_tokens if self.train_dataset.collate.selects_logits else step.tokens
        return self.flops.of(tokens=step.tokens, logits=logits, pairs=step.pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates and peak memory of all ranks to what a training step logs.

        Raises:
            NumericsError: the numbers are no longer finite, on every rank.
        """
        if "loss" in logs:
            count = self.step_end.count
            logs["loss"] = count.mean_without(logs["loss"], self.state.global_step - self.logged_at)
            logs |= {"non_finite_steps": count.steps, **self._rates()}
            self.logged_at, count.lost_since_log = self.state.global_step, 0
            self.parts.take()
        super().log(logs, start_time)
        self.state.log_history[-1] = {name: finite_or_none(value) for name, value in self.state.log_history[-1].items()}
        if self.step_end.verdict is not None:
            raise NumericsError(self.step_end.verdict)
        self.step_end.own_time.restart()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As transformers does; the end of the step looks at it."""
        self.step_end.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.step_end.grad_norm

    def _rates(self) -> dict[str, float]:
        peak = torch.tensor([peak_memory_bytes()], device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rates = self.meter.rates(self.peak_flops and self.peak_flops * self.args.world_size)
        self.meter.restart()
        return {**rates, "peak_memory_bytes": peak.item()}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, seal, and only then remove an older checkpoint.

        Raises:
            NumericsError: on every rank; the weights are not finite.
            StorageError: on every rank; what was written is removed, older checkpoints are untouched.
        """
        began, step = time.perf_counter(), self.state.global_step
        check_weights(self.model, f"step {step}", self.step_end.advice())
        folder = self.saver.begin(step, self.lineage.run_id)
        if self.is_deepspeed_enabled:
            self._guard_files_of(self.model_wrapped)
        with self.saver.recording(folder):
            super()._save_checkpoint(model, trial)
        best = self.best()
        self.saver.seal(folder, step, keep_also=() if best is None else (best[0],))
        if is_rank_0():
            update_run_json(Path(self.args.output_dir), {"last_checkpoint": step})
        self.meter.since += time.perf_counter() - began  # saving is not part of a step's seconds
        self.step_end.own_time.restart()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the held-out conversations, logged; all ranks."""
        metrics = self.held_out.loss(self.model_wrapped, self._prepare_inputs, self.state.global_step)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.since += metrics["eval_seconds"]  # not part of a step's seconds
        self.step_end.own_time.restart()
        return metrics

    def best(self) -> tuple[int, float] | None:
        """The step of the checkpoint with the lowest held-out loss, and that loss."""
        return best_checkpoint(self.state.log_history, steps_in(self.saver.output_dir))

    def _guard_files_of(self, engine: Any) -> None:
        """DeepSpeed's files go through the `Saver`, and no scripts are left beside them: a checkpoint is not code."""
        engine.checkpoint_engine = checkpoint_engine(self.saver)
        engine._copy_recovery_script = lambda folder: None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers does, but that the tag DeepSpeed looks for is written on each disk."""
        if not self.is_deepspeed_enabled:
            with self.saver.recording(Path(output_dir)):
                super()._save_optimizer_and_scheduler(output_dir)
            return
        tag = f"global_step{self.model_wrapped.global_steps}"
        self.model_wrapped.save_checkpoint(
            output_dir, tag=tag, save_latest=False, exclude_frozen_parameters=hasattr(self.model, "peft_config")
        )
        with self.saver.recording(Path(output_dir)):
            if self.args.should_save:
                Path(output_dir, "latest").write_text(tag, encoding="utf-8")
                if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                    torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        self.saver.claim(Path(output_dir, name))
        with self.saver.recording(Path(output_dir, name)):
            super()._save_rng_state(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model and its tokenizer; no `training_args.bin`: it is a pickle, and run.json says what ran."""
        folder = Path(output_dir or self.args.output_dir)
        with gather_virtual_tokens(self.model, saves=self.args.should_save), self.saver.recording(folder):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.model.save_pretrained(folder, state_dict=state_dict)
                self.processing_class.save_pretrained(folder)
                if self.initial_lora is not None:
                    self.initial_lora.rewrite(folder)

    def save_result(self) -> None:
        """The trained model and the Trainer's state in `output_dir`; all ranks.

        Raises:
            NumericsError: on every rank; the weights are not finite.
            StorageError: on every rank; what was written is removed.
        """
        check_weights(self.model, "the result", self.step_end.advice())
        with self.saver.saving_result():
            self.save_model()
            with self.saver.recording(Path(self.args.output_dir)):
                self.save_state()

    def _manifest(self, step: int) -> Manifest:
        epoch, place = self.train_dataset.sampler.position(step)
        return Manifest(
            run_id=self.lineage.run_id,
            step=step,
            world_size=self.args.world_size,
            step_rows=self.lineage.step_rows,
            position={"epoch": epoch, "step": place},
            last_logged=self._globalstep_last_logged,
            loss_since_log=all_gather_object(float(self._tr_loss)),
            parts_since_log=self.parts.total(),
            facts=self.lineage.facts,
            trained=self.trained,
            versions=library_versions(),
            disks=self.lineage.disk.all_groups,
            written=now(),
            is_resumable=not self.args.save_only_model,
            non_finite=asdict(self.step_end.count),
        )

    def _begin(self) -> None:
        """What was added up between the last logged step and the checkpoint belongs to the next line that is logged."""
        if self.saver.disk.is_writer:
            remove_universal(self.saver.output_dir)
        manifest = self.lineage.manifest
        if manifest is not None and manifest.world_size == self.args.world_size:
            self._tr_loss += manifest.loss_since_log[self.args.process_index]
            self.parts.go_on_from(manifest.parts_since_log, is_first=self.args.process_index == 0)
            self._globalstep_last_logged = manifest.last_logged
            self.step_end.count = NonFiniteCounter(**manifest.non_finite)
        elif manifest is not None and self.is_deepspeed_enabled:
            fix_universal_optimizer_state(self.model_wrapped.optimizer, self.group_settings)
            self.step_end.count = NonFiniteCounter(**{**manifest.non_finite, "lost_since_log": 0})
        self.logged_at = self._globalstep_last_logged
        self.meter.restart()

    def loss_of(self, example: dict[str, Any]) -> float:
        """The mean loss over the learned tokens of one example, without dropout; all ranks.

        Each rank computes the whole example: Ulysses shares rows among ranks in training only.
        """
        collate = replace(self.train_dataset.collate, part=(0, 1))
        batch = self._prepare_inputs(collate([example]))
        targets = pop_targets(batch)
        self.model.eval()
        with torch.no_grad():
            loss = supervised_loss(
                self.model_wrapped(**batch).logits,
                targets.tokens,
                scale=1 / len(targets.tokens),
                target_positions=targets.positions,
            )
        return float(loss)
