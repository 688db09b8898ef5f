"""Host memory: of all ranks of the fullest host together, beside GPUs that hold the model."""

from __future__ import annotations

from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

# A process with torch, DeepSpeed and transformers. On a CPU: 525 to 535 MB before the model is built, as seen by
# benchmarks/memory.py. With CUDA's libraries: an allowance.
PROCESS_ON_CPU, PROCESS_WITH_GPU = 550_000_000, 3_000_000_000
# DeepSpeed's estimators count half as much again for host memory: pinned blocks are rounded up to powers of two.
PINNED = 1.5


def loading(shape: ModelSpec, job: RunSpec) -> float:
    """While the model loads. Every rank reads the whole model into host memory first; under ZeRO-3 rank 0 alone does,
    and the others receive their shares. Pages of the files are not counted: the system can take them back."""
    if job.stage == 3:
        share = job.size * shape.parameters / job.ranks if job.offload_parameters != "none" else 0
        return job.on_host * (PROCESS_WITH_GPU + share * PINNED) + shape.stored_bytes
    size = 4 if job.stage is None else job.size
    return job.on_host * (PROCESS_WITH_GPU + size * shape.parameters)


def training(shape: ModelSpec, job: RunSpec) -> float:
    """During the steps: what is offloaded to host memory.

    An offloaded optimizer holds masters, moments and gradients in float32, 16 bytes a trained parameter, and a copy of
    the weights on their way back (stages 1 and 2) or the gradients as they came (stage 3).
    """
    each = 0.0
    ranks = job.ranks if job.stage else 1
    if job.offload_optimizer == "cpu":
        each += (16 + job.size) * shape.trainable / ranks
        each += job.size * max((one.size for one in shape.blocks if one.trained), default=0)
    elif job.offload_optimizer == "nvme":  # five buffers of a sub-group's states, and gradients
        each += 4 * 4 * min(shape.trainable / ranks, job.sub_group) + job.size * shape.trainable / ranks
    if job.offload_parameters == "cpu":
        each += job.size * shape.parameters / job.ranks
    elif job.offload_parameters == "nvme":
        each += job.size * min(shape.parameters / job.ranks, job.max_in_cpu)
    inputs = 0.0
    if job.checkpoint_every and job.checkpoints_to_host:
        layers = -(-shape.layers // job.checkpoint_every)
        inputs = shape.activations.layer_input * layers * job.tokens / job.sequence_parallel
    return job.on_host * (PROCESS_WITH_GPU + (each + inputs) * PINNED)


def saving(shape: ModelSpec, job: RunSpec) -> float:
    """While a checkpoint is written, on top of `training`'s: the weights of what is saved, on rank 0 alone under
    ZeRO-3, which gathers them; under the other stages each rank copies its own. With adapters these are small."""
    whole = job.size * (shape.trainable if shape.adapter else shape.parameters)
    copies = 1 if job.stage == 3 or job.stage is None else job.on_host
    return training(shape, job) + copies * whole
