"""Train: build the Trainer from what is loaded, and run it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatFormat
from finetune.checkpoint.saver import RunIdentity
from finetune.config.hardware import HardwareConfig, measured_matmul_rate, peak_flops
from finetune.dataset.prepare import PreparedData
from finetune.distributed.collectives import run_on_rank_0
from finetune.models.adapters import InitialLora
from finetune.run_dir.run_json import update_run_json
from finetune.training.dataloaders import Dataloaders
from finetune.training.plan import summarize_plan
from finetune.utils.console import section
from finetune.utils.errors import ConfigError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from finetune.training.trainer import SupervisedTrainer


@dataclass(frozen=True)
class TrainingInputs:
    """What is loaded before the first step."""

    model: Any
    tokenizer: Any
    chat_format: ChatFormat
    data: PreparedData
    loaders: Dataloaders
    arguments: TrainingArguments


@dataclass(frozen=True)
class FitOptions:
    """What the Trainer needs of the configuration beyond `TrainingArguments`.

    Attributes:
        keep_checkpoints: complete checkpoints that stay; None or 0: all.
        keeps_initial_lora: the adapter's initialisation changes base weights, and is saved relative to them.
        plan_settings: `RunConfig.plan_settings()`.
    """

    hardware: HardwareConfig
    keep_checkpoints: int | None
    keeps_initial_lora: bool
    early_stopping_patience: int | None
    early_stopping_threshold: float
    plan_settings: Mapping[str, Any]


def fit(inputs: TrainingInputs, identity: RunIdentity, options: FitOptions) -> SupervisedTrainer:
    """Train to the end, or to a stop that was requested; the plan is shown once the number of steps is known.

    Raises:
        ConfigError: the Trainer refuses the flags: a tracker that is not installed, evaluation without data.
    """
    from finetune.training.callbacks import PhaseReporter
    from finetune.training.evaluator import EarlyStopping
    from finetune.training.trainer import SupervisedTrainer

    def announce(steps: int) -> None:
        plan = summarize_plan(
            options.plan_settings,
            inputs.model,
            inputs.data,
            inputs.loaders,
            chat_format=inputs.chat_format.name,
            steps=steps,
        )
        logger.info(section("Plan", plan.lines()) + "\n")
        warmup = inputs.arguments.get_warmup_steps(steps)
        if warmup >= steps:
            logger.warning(f"--warmup_steps {warmup}: the run has {steps} steps: --learning_rate is never reached")
        run_on_rank_0(lambda: update_run_json(Path(str(inputs.arguments.output_dir)), {"plan": asdict(plan)}))

    try:
        trainer = SupervisedTrainer(
            model=inputs.model,
            args=inputs.arguments,
            loaders=inputs.loaders,
            identity=identity,
            peak_flops=_peak_flops(options.hardware),
            keep=options.keep_checkpoints,
            processing_class=inputs.tokenizer,
            initial_lora=InitialLora(inputs.model) if options.keeps_initial_lora else None,
            on_plan=announce,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the Trainer refuses these flags: {error}") from error
    if options.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(options.early_stopping_patience, options.early_stopping_threshold))
    trainer.add_callback(PhaseReporter())
    trainer.train(resume_from_checkpoint=str(identity.folder) if identity.folder else None)
    return trainer


def _peak_flops(hardware: HardwareConfig) -> float | None:
    """Peak rate of one rank's device, floating point operations per second; measured on a CPU."""
    if hardware.use_cpu:
        return measured_matmul_rate()
    import torch

    return peak_flops(torch.cuda.get_device_name(), hardware.precision, hardware.tf32)
