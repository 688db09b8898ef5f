"""The resident set of a rank whose device is the CPU: what it grows by while a model is loaded and trained.

What is lent but never written to does not count (most of a gradient bucket), and what is freed may stay: blocks above
32 MiB go back to the system at once, smaller ones stay in glibc's heap. Its aligned blocks, which torch asks for, leave
cracks that small objects settle in, so that a freed block often does not serve the next one of its size; how much is
lost so can only be measured.
"""

from __future__ import annotations

from finetune.preflight.memory.device_memory import (
    ACTIVATIONS,
    ADAM,
    BUCKETS,
    FRAMEWORK,
    GATHERED,
    GRADIENTS,
    LOGITS,
    MASTERS,
    WEIGHTS,
    Parts,
    activations,
    buckets,
    gathered,
    states,
    updating,
)
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

FILES = "files that are read"
HEAP_BLOCK = 32 << 20  # bytes; glibc's limit for what it keeps in the heap, and what process.keep_freed_blocks sets
# Measured on glibc 2.36, see benchmarks/README.md: the share of what a forward pass frees that the heap does not use
# again, the same of what checkpointing drops, and of the room between gathered parameters where activations are kept in
# between; and what gradients take of the heap, to their own bytes.
LOST_OF_PASSING, LOST_OF_RECOMPUTED, LOST_OF_GATHERED, GRADIENTS_TAKE = 0.3, 0.15, 0.6, 1.15
# Modules that are imported late, the engine's tables, threads and buffers of gloo; measured with a model of 60 kB.
LIBRARIES = 70_000_000


def process_phases(shape: ModelSpec, job: RunSpec) -> dict[str, Parts]:
    """The resident set of a rank in the phases of its run, beyond what it was before the model was built."""
    found = {"loading": _loading(shape, job), "building": _building(shape, job), **_steps(shape, job)}
    return {name: {**parts, FRAMEWORK: LIBRARIES} for name, parts in found.items()}


def _loading(shape: ModelSpec, job: RunSpec) -> Parts:
    """The weights, and the pages of the files that they are read from, which stay mapped until all are read.

    Experts are stored one by one and joined to one tensor of a layer: while that goes on, they are there twice.
    """
    if job.stage == 3:
        return {WEIGHTS: job.size * shape.parameters / job.ranks, FILES: shape.stored_bytes}
    size = 4 if job.stage is None else job.size
    return {WEIGHTS: size * (shape.parameters + shape.expert_parameters), FILES: shape.stored_bytes}


def _building(shape: ModelSpec, job: RunSpec) -> Parts:
    """Stages 1 and 2 flatten what is trained beside the old weights, then copy a share of it twice."""
    if job.stage == 3:
        share = shape.trainable / job.ranks
        return {WEIGHTS: job.size * shape.parameters / job.ranks, MASTERS: 4 * share, GRADIENTS: (job.size + 4) * share}
    if job.stage in (None, 0):
        return {WEIGHTS: 4 * shape.parameters}
    flattening = job.size * (shape.parameters + shape.trainable)
    share = 4 * shape.trainable / job.ranks
    return {WEIGHTS: max(flattening, job.size * shape.parameters + 2 * share)}


def _steps(shape: ModelSpec, job: RunSpec) -> dict[str, Parts]:
    held = states(shape, job)
    if job.offload_optimizer != "none":  # the host is the device
        share = shape.trainable / (job.ranks if job.stage else 1)
        held = {**held, MASTERS: 4 * share, ADAM: 8 * share, GRADIENTS: 4 * share}
    if job.offload_parameters != "none":
        held[WEIGHTS] = job.size * shape.parameters / job.ranks
    bucket, copy = buckets(shape, job)
    kept, gathering = gathered(shape, job)
    heap, logits = _heap(shape, job, kept)
    with_gradients = max(heap, _heap_of_gradients(shape, job))
    large = 4 * shape.elements(trained=True, above=HEAP_BLOCK // 4)
    share = 4 * shape.trainable / (job.ranks if job.stage else 1)
    waits = job.accumulation > 1
    if job.stage in (None, 0):
        own = large if job.stage == 0 or job.ranks == 1 else 0
        return {"update": {**held, GRADIENTS: own, BUCKETS: bucket, ACTIVATIONS: with_gradients}}
    if job.stage == 3:
        heap_parts = {ACTIVATIONS: heap, GATHERED: kept}
        largest = 4 * max((one.size for one in shape.blocks if one.trained), default=0)
        return {
            "forward": {**held, **heap_parts, GRADIENTS: share, BUCKETS: bucket, LOGITS: max(logits, gathering)},
            "backward": {**held, **heap_parts, GRADIENTS: share + largest, BUCKETS: bucket + copy},
            "update": {**held, **heap_parts, GRADIENTS: updating(shape, job), GATHERED: 0},
        }
    own = share * waits if job.stage == 2 else 0
    whole = {**held, ACTIVATIONS: with_gradients if job.stage == 1 else heap}
    return {
        "forward": {**whole, GRADIENTS: own, LOGITS: logits},
        "backward": {**whole, GRADIENTS: large * (job.stage == 1) + own, BUCKETS: bucket * (job.stage == 2)},
        "reduction": {**whole, GRADIENTS: own, BUCKETS: bucket + copy},
        "update": {**whole, GRADIENTS: updating(shape, job)},
    }


def _heap_of_gradients(shape: ModelSpec, job: RunSpec) -> float:
    """Bytes of the heap when all gradients that it holds are there: they take the room where activations were."""
    in_heap = 4 * shape.elements(trained=True, up_to=HEAP_BLOCK // 4)
    return GRADIENTS_TAKE * in_heap + _lost(shape, job)


def _heap(shape: ModelSpec, job: RunSpec, kept: float) -> tuple[float, float]:
    """Bytes that activations make the heap grow by, and those of logits too large for it."""
    at_head, in_layer = activations(shape, job)
    heap = max(at_head[ACTIVATIONS], in_layer[ACTIVATIONS]) + _lost(shape, job)
    if job.stage == 3:
        heap += LOST_OF_GATHERED * min(kept, at_head[ACTIVATIONS])
    logits = at_head[LOGITS]
    return (heap + logits, 0.0) if logits < HEAP_BLOCK else (heap, logits)


def _lost(shape: ModelSpec, job: RunSpec) -> float:
    """Bytes of the heap that lie between blocks and serve nobody."""
    each = LOST_OF_PASSING * shape.activations.passing * shape.layers
    if job.checkpoint_every:
        each += LOST_OF_RECOMPUTED * shape.activations.layer * -(-shape.layers // job.checkpoint_every)
    return each * job.tokens / job.sequence_parallel
