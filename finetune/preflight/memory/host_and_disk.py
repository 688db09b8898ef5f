"""Memory of the fullest host with all its ranks, while loading, training and saving; bytes on disk."""

from collections.abc import Mapping

from finetune.checkpoint.checkpoint_size import ParameterSizes, checkpoint_parts, saved_model_bytes
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

SMALL_FILES = 20_000_000  # tokenizer, Trainer state, random number state: an allowance
# A process with torch, DeepSpeed and transformers. On a CPU: 525 to 535 MB before the model is built, measured with
# benchmarks/memory.py. With CUDA's libraries: an allowance.
PROCESS_ON_CPU, PROCESS_WITH_GPU = 550_000_000, 3_000_000_000
# As in DeepSpeed's estimators: pinned blocks are rounded up to powers of two.
PINNED = 1.5


def result(model: ModelSpec, run: RunSpec) -> float:
    """Bytes of the trained model or adapter in the output folder."""
    return saved_model_bytes(_sizes(model, run), run.stage)


def checkpoint(model: ModelSpec, run: RunSpec) -> dict[str, float]:
    """Bytes of one checkpoint by part, of all ranks together."""
    return checkpoint_parts(_sizes(model, run), run.stage, only_model=run.only_model)


def kept(model: ModelSpec, run: RunSpec) -> float | None:
    """Bytes that the output folder takes at most: the result, the checkpoints that are kept, and one more, because the
    oldest is removed only after the newest is complete. None: every checkpoint is kept."""
    if not run.keep_checkpoints:
        return None
    each = sum(checkpoint(model, run).values()) + SMALL_FILES
    return result(model, run) + (run.keep_checkpoints + 1) * each


def _sizes(model: ModelSpec, run: RunSpec) -> ParameterSizes:
    weight_size = 4 if run.stage is None else run.size
    return ParameterSizes(
        total=model.weight_bytes(weight_size),
        trained=weight_size * model.trainable,
        num_trained=model.trainable,
        tied=weight_size * model.embedding if model.tied else 0,
        has_adapter=model.adapter,
        state_bytes=model.state_bytes(run),
    )


def cpu_hosts(model: ModelSpec, run: RunSpec, totals: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the bytes while loading, training and saving, of ranks that train on the CPU.

    `totals` is the growth of a rank's process in each phase.
    """
    loading = PROCESS_ON_CPU + totals["loading"]
    training = PROCESS_ON_CPU + max(total for name, total in totals.items() if name != "loading")
    copies = 1 if run.stage in (3, None) else run.on_host
    return run.on_host * loading, run.on_host * training, run.on_host * training + copies * result(model, run)


def gpu_hosts(model: ModelSpec, run: RunSpec) -> tuple[float, float, float]:
    """Return the bytes while loading, training and saving, of ranks whose model is on a GPU.

    A checkpoint takes a copy of the saved weights: on rank 0 only under ZeRO-3, on every rank under the other stages.
    """
    training = _training(model, run)
    saved = run.size * (model.trainable if model.adapter else model.parameters)
    copies = 1 if run.stage in (3, None) else run.on_host
    return _loading(model, run), training, training + copies * saved


def _loading(model: ModelSpec, run: RunSpec) -> float:
    """Every rank reads the whole model into host memory; under ZeRO-3 only rank 0 does, and the others receive their
    shares. Pages of the files do not count: the system can reclaim them."""
    if run.stage == 3 and model.bits is None:
        share = run.size * model.parameters / run.ranks if run.offload_parameters != "none" else 0
        return run.on_host * (PROCESS_WITH_GPU + share * PINNED) + model.stored_bytes
    size = 4 if run.stage is None and not model.adapter else run.size
    return run.on_host * (PROCESS_WITH_GPU + model.weight_bytes(size))


def _training(model: ModelSpec, run: RunSpec) -> float:
    """What is offloaded to host memory.

    An offloaded optimizer holds masters, moments and gradients in float32, 16 bytes for each trained parameter, and a
    copy of the weights on their way back (stages 1 and 2) or the gradients as they came (stage 3).
    """
    offloaded = 0.0
    ranks = run.ranks if run.stage else 1
    if run.offload_optimizer == "cpu":
        offloaded += (
            8 + model.state_bytes(run) + run.size
        ) * model.trainable / ranks + run.size * model.largest_trained
    elif run.offload_optimizer == "nvme":  # five buffers of a sub-group's states, and gradients
        offloaded += 4 * 4 * min(model.trainable / ranks, run.sub_group) + run.size * model.trainable / ranks
    if run.offload_parameters == "cpu":
        offloaded += model.weight_bytes(run.size) / run.ranks
    elif run.offload_parameters == "nvme":
        offloaded += run.size * min(model.parameters / run.ranks, run.max_in_cpu)
    if run.checkpoints_to_host:
        inputs = model.activations.layer_input * run.checkpointed_layers(model.layers)
        offloaded += inputs * run.tokens / run.sequence_parallel
    return run.on_host * (PROCESS_WITH_GPU + offloaded * PINNED)
