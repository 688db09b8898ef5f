"""Bytes of a checkpoint on disk, computed from the sizes of its parameters."""

from dataclasses import dataclass

MODEL, MODEL_STATES, OPTIMIZER = "saved model", "DeepSpeed's copy of it", "optimizer states"


@dataclass(frozen=True)
class ParameterSizes:
    """Bytes of a model's parameters, each whole, whatever the partitioning."""

    total: float  # of all weights, a tied head counted once
    trained: float
    num_trained: int  # how many parameters these are
    tied: float = 0  # of the weight that head and embeddings share
    has_adapter: bool = False  # the trained weights are those of an adapter, and only these are saved
    state_bytes: float = 8  # of optimizer states for each trained parameter


def saved_model_bytes(sizes: ParameterSizes, stage: int | None) -> float:
    """Return the bytes of the saved model or adapter.

    Under DeepSpeed's stages 0 to 2 accelerate copies each tensor before it is saved, so a tied head is written twice.

    Args:
        stage: of ZeRO; None without DeepSpeed.
    """
    if sizes.has_adapter:
        return sizes.trained
    return sizes.total + (sizes.tied if stage in (0, 1, 2) else 0)


def checkpoint_parts(sizes: ParameterSizes, stage: int | None, *, only_model: bool = False) -> dict[str, float]:
    """Return the bytes of a checkpoint by part, the files of all ranks together.

    Below ZeRO-3 DeepSpeed writes a second copy of the model. It leaves out the frozen weights that it knows by name,
    which does not include a tied head. Under ZeRO-3 that copy is part of the optimizer shards. The optimizer states
    are a float32 master copy and what the optimizer keeps, for Adam two float32 moments, for each trained parameter.
    There is no master copy without DeepSpeed, nor under stage 0 in float32.
    """
    parts = {MODEL: saved_model_bytes(sizes, stage)}
    if only_model:
        return parts
    if stage is None:
        return {**parts, OPTIMIZER: sizes.state_bytes * sizes.num_trained}
    has_masters = stage > 0 or sizes.trained < 4 * sizes.num_trained
    copy = sizes.trained + sizes.tied if sizes.has_adapter else sizes.total
    optimizer = (4 * has_masters + sizes.state_bytes) * sizes.num_trained
    return {**parts, MODEL_STATES: 0 if stage == 3 else copy, OPTIMIZER: optimizer}
