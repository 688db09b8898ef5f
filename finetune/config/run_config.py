"""The frozen configs that stages of a run take, resolved from the command line by `config.resolve`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.arguments import DataArguments, ModelArguments, RunArguments
from finetune.config.deepspeed_config import ResolvedDeepSpeedConfig
from finetune.config.hardware import HardwareConfig, Precision


@dataclass(frozen=True)
class RankCounts:
    """Number of ranks of a run, and of those on one host."""

    size: int
    local_size: int


@dataclass(frozen=True)
class SavedStep:
    """World size and rows of one optimizer step of the checkpoint to resume from."""

    world_size: int
    step_rows: int


@dataclass(frozen=True)
class BatchConfig:
    """How conversations become micro-batches and steps; two reasons hold whatever the model supports."""

    batching: Literal["flat", "padded", "packed"]  # as requested
    loss_weighting: Literal["token", "conversation"]
    per_device_batch: int  # rows of a micro-batch; 1 under a token budget, where a row is a group of conversations
    per_device_eval_batch: int  # rows of a held-out micro-batch
    accumulation: int  # micro-batches of a step on each rank
    tokens_per_device: int | None  # token budget of a micro-batch
    sequence_parallel_size: int
    world_size: int
    model_max_length: int
    sampling: str  # `train_sampling_strategy` of transformers
    drop_last: bool
    seed: int
    data_seed: int
    padding_reason: str | None  # why these flags need padded rows
    full_logits_reason: str | None  # why they need logits at all positions

    @property
    def data_ranks(self) -> int:
        """Data-parallel size: ranks, or groups of ranks that share each conversation."""
        return self.world_size // self.sequence_parallel_size

    @property
    def step_rows(self) -> int:
        """Rows, or groups that fill a token budget, of a full optimizer step over all ranks."""
        return self.per_device_batch * self.accumulation * self.data_ranks

    @property
    def deepspeed_batch(self) -> int:
        """The micro-batch size that DeepSpeed is told: one row where ranks share it."""
        return self.per_device_batch if self.sequence_parallel_size == 1 else 1


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run saves, what it keeps, and what it resumes from."""

    output_dir: Path
    overwrite: bool  # an earlier run in `output_dir` is renamed first
    keep: int | None  # complete checkpoints that stay; None or 0: all
    resume_from: str | None  # "auto", the folder of a checkpoint, or None
    allow_inexact: bool  # resume although the numbers will differ
    any_world_size: bool  # resume on another number of ranks
    verify_key: str | None  # the environment variable with the key of the manifests
    world_size_changes: bool  # the newest checkpoint is from another number of ranks


@dataclass(frozen=True)
class ScheduleConfig:
    """How long a run trains and how often it saves, under the names of `TrainingArguments`."""

    max_steps: int
    num_train_epochs: float
    save_strategy: str
    save_steps: float
    save_total_limit: int | None
    save_only_model: bool


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Whether activations are recomputed; of every n-th layer; whether they wait in host memory."""

    enabled: bool
    every_n_layers: int = 1
    offload: bool = False

    def notes(self) -> list[str]:
        """When the options that were given pay."""
        lines = []
        if self.enabled and self.every_n_layers > 1:
            lines.append(
                f"activations of one layer in {self.every_n_layers} are checkpointed, those of the others are kept: "
                "faster where memory is left, by at most a quarter of a step"
            )
        if self.enabled and self.offload:
            lines.append(
                "checkpointed activations are offloaded to host memory: for conversations whose activations do not "
                "fit otherwise; each is copied to the host and back in every step"
            )
        return lines


@dataclass(frozen=True)
class RunConfig:
    """All that a run does, resolved before data or weights are read."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    run: RunArguments
    batch: BatchConfig
    checkpoint: CheckpointConfig
    schedule: ScheduleConfig
    hardware: HardwareConfig
    deepspeed: ResolvedDeepSpeedConfig | None
    activation_checkpointing: ActivationCheckpointing
    training: Mapping[str, Any]  # what `training_values` is made of
    flags: Mapping[str, Any]
    resume_flags: Mapping[str, Any]  # the flags that a resumed run compares, by name
    held_out_schedule: str | None  # when held-out conversations are evaluated, for the plan; None without any
    notes: tuple[str, ...]

    @property
    def zero_stage(self) -> int | None:
        """0 to 3; None without DeepSpeed."""
        return self.deepspeed.stage if self.deepspeed else None

    @property
    def weights_precision(self) -> Precision:
        """The precision to load weights in; without DeepSpeed weights that are trained are float32 under autocast."""
        is_frozen = self.adapter.kind() is not None
        return self.hardware.precision if self.deepspeed or is_frozen else "float32"

    @property
    def adapter_precision(self) -> Precision | None:
        """The precision of what an adapter trains; None: that of the base, of which DeepSpeed keeps float32 copies."""
        return None if self.deepspeed else "float32"

    def facts(self) -> dict[str, Any]:
        """Return what run.json records of it; `chat` and `data` are the flags alone."""
        data = self.data
        return {
            "arguments": dict(self.flags),
            "run_arguments": asdict(self.run),
            "notes": list(self.notes),
            "deepspeed": self.deepspeed.config if self.deepspeed else None,
            "world_size": self.batch.world_size,
            "precision": self.hardware.precision,
            "attention": self.hardware.attention,
            "chat": asdict(data.chat_settings()),
            "data": {"path": data.data_path},
        }

    def training_values(self) -> dict[str, Any]:
        """Return the keyword arguments of `transformers.TrainingArguments`."""
        return {**self.training, "activation_checkpointing": self.activation_checkpointing.enabled}
