"""Train: build the Trainer from what is loaded, show the plan, and run it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatFormat
from finetune.checkpoint.saver import RunIdentity
from finetune.config.hardware import HardwareConfig, peak_flops
from finetune.config.run_config import RunConfig
from finetune.dataset.prepare import PreparedData
from finetune.distributed.collectives import run_on_rank_0
from finetune.models.adapters import InitialLora, count_parameters
from finetune.models.loader import ModelInfo
from finetune.run_dir.run_json import update_run_json
from finetune.run_dir.training_plan import TrainingPlan
from finetune.training.dataloaders import Dataloaders
from finetune.utils.console import section
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from finetune.training.trainer import SupervisedTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """What is loaded before the first step."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat
    data: PreparedData
    loaders: Dataloaders
    args: TrainingArguments
    base: ModelInfo


def fit(inputs: TrainingInputs, identity: RunIdentity, config: RunConfig) -> SupervisedTrainer:
    """Train to the end, or to a stop that was requested; the plan is shown once the number of steps is known.

    Raises:
        ConfigError: the Trainer refuses the flags.
    """
    from finetune.training.callbacks import PhaseReporter
    from finetune.training.evaluator import EarlyStopping
    from finetune.training.learning_rates import set_learning_rates
    from finetune.training.trainer import SupervisedTrainer

    def announce(steps: int) -> None:
        plan = summarize_plan(config, inputs, steps)
        logger.info(section("Plan", plan.lines()) + "\n")
        warmup = inputs.args.get_warmup_steps(steps)
        if warmup >= steps:
            logger.warning(f"--warmup_steps {warmup}: the run has {steps} steps: --learning_rate is never reached")
        run_on_rank_0(lambda: update_run_json(trainer.output_dir, {"plan": asdict(plan)}))

    # PiSSA and OLoRA change base weights; the adapter is saved relative to the original ones.
    moves_weights = config.adapter.starts_from_weights()
    try:
        trainer = SupervisedTrainer(
            model=inputs.model,
            args=inputs.args,
            loaders=inputs.loaders,
            kinds=inputs.base.kinds,
            identity=identity,
            peak_flops=_peak_flops(config.hardware),
            keep=config.checkpoint.keep,
            processing_class=inputs.tokenizer,
            initial_lora=InitialLora(inputs.model) if moves_weights else None,
            on_plan=announce,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the Trainer refuses these flags: {error}") from error
    set_learning_rates(trainer, config.adapter, inputs.base.kinds)
    trainer.keep_base_tensors(inputs.base)
    if config.run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(config.run.early_stopping_patience, config.run.early_stopping_threshold))
    trainer.add_callback(PhaseReporter())
    trainer.train_from_checkpoint()
    return trainer


def summarize_plan(config: RunConfig, inputs: TrainingInputs, steps: int) -> TrainingPlan:
    """Build the plan of a run of so many optimizer steps."""
    from finetune.dataset.dataloader import padding_share

    trainable, parameters = count_parameters(inputs.model)
    batches, held_out = inputs.loaders.train, inputs.loaders.held_out
    sampler, collator = batches.sampler, batches.collate
    held_out_line = None
    if held_out is not None:
        tokens = int(held_out.lengths.sum())
        held_out_line = f"{len(held_out):,} examples, {tokens:,} tokens, evaluated {config.held_out_schedule}"
    return TrainingPlan(
        model=config.model.model_name_or_path,
        adapter=config.adapter.kind(),
        base_bits=inputs.base.bits,
        zero_stage=config.zero_stage,
        offloads=bool(config.deepspeed and config.deepspeed.offloads),
        world_size=config.batch.world_size,
        sharing=config.batch.sequence_parallel_size,
        device="CPU, gloo" if config.hardware.use_cpu else "GPU, nccl",
        precision=config.hardware.precision,
        checkpointing=config.activation_checkpointing.enabled,
        chat_format=inputs.chat_format.name,
        held_out=held_out_line,
        parameters=parameters,
        trainable=trainable,
        per_device_batch=sampler.shape.per_device_batch,
        accumulation=sampler.shape.accumulation,
        data_ranks=sampler.shape.world_size,
        examples=len(batches),
        groups=None if sampler.capacity is None else sampler.num_units,
        group_tokens=sampler.capacity,
        tokens=int(sampler.lengths.sum()),
        supervised_share=inputs.data.summary.supervised_share,
        batching=sampler.batching,
        padding=padding_share(sampler) if sampler.batching == "padded" else 0.0,
        selects_logits=inputs.loaders.layout.selects_logits,
        notes=inputs.loaders.layout.notes,
        loss_weighting=collator.weighting,
        attention=inputs.model.config._attn_implementation
        + (", per conversation" if sampler.batching != "padded" else ""),
        epochs=steps / sampler.steps_per_epoch,
        steps=steps,
        kinds={kind: count.facts() for kind, count in inputs.base.kinds.count(inputs.model).items()},
    )


def _peak_flops(hardware: HardwareConfig) -> float | None:
    """Peak rate of one rank's GPU, floating point operations per second; None if unknown, and on a CPU."""
    if hardware.use_cpu:
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(), hardware.precision, hardware.tf32)
