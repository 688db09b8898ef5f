"""`SupervisedTrainer` and its callbacks.

The stock Trainer with batches of our own sampler, a loss that is a mean over the whole step whatever the cluster's
shape, token rates, metrics and whole adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.adapters import InitialLora, whole_virtual_tokens
from finetune.batches import MicroBatches, MicroBatchLoader, Totals
from finetune.collation import LOSS_KEYS
from finetune.console import is_rank_0, is_terminal, say
from finetune.errors import ConfigError, FinetuneError, NumericsError
from finetune.hardware import resume_collection
from finetune.losses import supervised_loss
from finetune.metrics import ModelFlops, StepMeter, append_metrics, peak_memory_bytes
from finetune.results import METRICS_FILE


def start_processes(backend: str, values: dict[str, Any], *, sequence_parallel_size: int = 1) -> TrainingArguments:
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
    if sequence_parallel_size > 1:
        values = {**values, "parallelism_config": _sequence_parallelism(sequence_parallel_size)}
    try:
        return TrainingArguments(**values)
    except ValueError as error:
        raise ConfigError(f"the training flags contradict each other: {error}") from None


def _sequence_parallelism(size: int) -> Any:
    from accelerate.parallelism_config import ParallelismConfig

    return ParallelismConfig(sp_backend="deepspeed", sp_size=size)


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


def first_of_all_ranks(reason: str | None) -> str | None:
    """What the lowest rank that has a reason says, on every rank; None when none has one."""
    if not dist.is_initialized():
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((one for one in reasons if one is not None), None)


class SupervisedTrainer(Trainer):
    """The stock Trainer, but for where batches come from and what the loss is.

    Args:
        micro_batches: of this rank.
        flops: what the model costs, and `peak_flops` what one device can do in a second (None: unknown).
        initial_lora: the LoRA matrices as PiSSA left them, when that is how they were initialised.
        on_plan: called by every rank with the number of steps before the first one.
    """

    def __init__(
        self,
        *,
        micro_batches: MicroBatches,
        flops: ModelFlops,
        peak_flops: float | None,
        initial_lora: InitialLora | None = None,
        on_plan: Callable[[int], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=micro_batches, data_collator=micro_batches.collate, **kwargs)
        self.flops, self.peak_flops = flops, peak_flops
        self.initial_lora = initial_lora
        self.loss_is_scaled_for_ga = True  # by `compute_loss`, over the whole step
        self.sharing_ranks = self.args.world_size // micro_batches.sampler.shape.world_size
        if self.sharing_ranks > 1:
            self._share_rows()
        self.gradient_was_lost = False
        self.meter = StepMeter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Beginning(self.meter, on_plan))
        self.add_callback(_MetricsFile(Path(self.args.output_dir) / METRICS_FILE))
        self.add_callback(_Progress())

    def _share_rows(self) -> None:
        """Groups of ranks share each row: Ulysses exchanges its tokens for attention heads around our own attention.

        Each rank's collator cuts out its part of the row that all of its group load, so that accelerate's adapter,
        which sends the rows of one rank to the others in turn, is left out.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        handler = self.accelerator.parallelism_config.sp_handler
        handler.sp_attn_implementation = base.config._attn_implementation
        self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader

    def get_sp_size(self) -> int:
        """1: an epoch has as many micro-batches as the loader says, whoever shares their rows."""
        return 1

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forwards and backwards; what it returns is averaged over all ranks to be logged."""
        return super().training_step(*args, **kwargs) * (self.args.world_size / self._ranks_averaged_over())

    def _ranks_averaged_over(self) -> int:
        """By how many ranks the sum of their gradients is divided. Where ranks share rows, DeepSpeed divides by the
        groups of them, but in stage 3's reduce-scatter (0.19.8) by all ranks."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        divides_by_all = plugin is not None and plugin.zero_stage == 3
        return self.args.world_size // (1 if divides_by_all else self.sharing_ranks)

    def get_train_dataloader(self) -> MicroBatchLoader:
        """This rank's micro-batches; nothing is left to shard, to repeat or to gather."""
        args = self.args
        return MicroBatchLoader(
            self.train_dataset,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The micro-batches of one optimizer step; what they count for is known without asking other ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if batches:
            step = batches[0]["counts"].step
            self.meter.add(step.tokens, step.supervised_tokens, self._flops_of(step))
        return batches, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's part of the mean over the whole step, times the ranks by which the gradients are divided."""
        counts = inputs.pop("counts")
        targets, positions, beside = (inputs.pop(name, None) for name in LOSS_KEYS)
        ranks = self._ranks_averaged_over()
        outputs = model(**inputs)
        loss = supervised_loss(
            outputs.logits,
            targets,
            scale=ranks / counts.denominator,
            target_positions=None if "logits_to_keep" in inputs else positions,
            weights=None if beside is None else 1 / beside,
            smoothing=self.args.label_smoothing_factor,
        )
        balance = getattr(outputs, "aux_loss", None)  # of a mixture of experts that is told to keep its load even
        if balance is not None:
            share = ranks * counts.tokens / self.sharing_ranks / max(counts.step.tokens, 1)
            loss = loss + balance.to(loss) * self.model.config.get_text_config().router_aux_loss_coef * share
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Of one micro-batch, forward and backward; transformers' own count is 0 under ZeRO-3."""
        counts = inputs["counts"]
        return self._flops_of(counts.step) * counts.tokens / max(counts.step.tokens, 1)

    def _flops_of(self, step: Totals) -> float:
        logits = step.supervised_tokens if self.train_dataset.collate.selects_logits else step.tokens
        return self.flops.of(tokens=step.tokens, logits=logits, pairs=step.pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates and peak memory of all ranks to what a training step logs.

        Raises:
            NumericsError: the numbers are no longer finite, on every rank.
        """
        if "loss" in logs:
            logs |= self._rates()
        super().log(logs, start_time)
        self._check_numbers(logs)

    def _check_numbers(self, logs: dict[str, float]) -> None:
        """Stop where the loss is not finite, or the gradient at two logged steps in a row: after one of them alone
        DeepSpeed leaves the step out and may recover. In fp16 it does so while it looks for its loss scale."""
        found = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name) or 0.0)]
        again = found == ["grad_norm"] and self.gradient_was_lost and not self.args.fp16
        self.gradient_was_lost = "grad_norm" in found
        if "loss" in found or again:
            name = found[0]
            raise NumericsError(
                f"step {self.state.global_step}: {name} is {logs[name]}: lower --learning_rate, warm up longer "
                "(--warmup_steps), or look at the data of this step; nothing was saved after it"
            )

    def _rates(self) -> dict[str, float]:
        peak = torch.tensor([peak_memory_bytes()], device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        rates = self.meter.rates(self.peak_flops and self.peak_flops * self.args.world_size)
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
        resume_collection()
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
