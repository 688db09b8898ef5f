"""Resident set of a rank that trains on the CPU: its growth while a model is loaded and trained.

Memory that is allocated but never written does not count (most of a gradient bucket). Freed memory may stay: blocks
above 32 MiB return to the system at once, smaller ones stay in glibc's heap, where fragmentation keeps torch's aligned
blocks from being reused. How much is lost to it is measured.
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
# Measured on glibc 2.36, see benchmarks/README.md. Shares of freed memory that the heap does not reuse: of what a
# forward pass frees, of what checkpointing drops, of gathered parameters with activations in between. Then the heap
# that gradients take, as a multiple of their bytes.
LOST_OF_PASSING, LOST_OF_RECOMPUTED, LOST_OF_GATHERED, GRADIENTS_TAKE = 0.3, 0.15, 0.6, 1.15
# Late imports, the engine's tables, threads and buffers of gloo; measured with a model of 60 kB.
LIBRARIES = 70_000_000


def cpu_phases(model: ModelSpec, run: RunSpec) -> dict[str, Parts]:
    """Return the growth of a rank's resident set in each phase, from before the model is built."""
    phases = {"loading": _loading(model, run), "building": _building(model, run), **_steps(model, run)}
    return {name: {**parts, FRAMEWORK: LIBRARIES} for name, parts in phases.items()}


def _loading(model: ModelSpec, run: RunSpec) -> Parts:
    """Weights, and the pages of their files, which stay mapped until all are read.

    Experts are stored one by one and joined to one tensor of a layer, so they exist twice for a while.
    """
    if run.stage == 3:
        return {WEIGHTS: run.size * model.parameters / run.ranks, FILES: model.stored_bytes}
    size = 4 if run.stage is None else run.size
    return {WEIGHTS: size * (model.parameters + model.expert_parameters), FILES: model.stored_bytes}


def _building(model: ModelSpec, run: RunSpec) -> Parts:
    """Stages 1 and 2 flatten the trained weights beside the old ones, then copy a share of them twice."""
    if run.stage == 3:
        share = model.trainable / run.ranks
        return {WEIGHTS: run.size * model.parameters / run.ranks, MASTERS: 4 * share, GRADIENTS: (run.size + 4) * share}
    if run.stage in (None, 0):
        return {WEIGHTS: 4 * model.parameters}
    flattening = run.size * (model.parameters + model.trainable)
    share = 4 * model.trainable / run.ranks
    return {WEIGHTS: max(flattening, run.size * model.parameters + 2 * share)}


def _steps(model: ModelSpec, run: RunSpec) -> dict[str, Parts]:
    held = states(model, run)
    if run.offload_optimizer != "none":  # the host is the device
        share = model.trainable / (run.ranks if run.stage else 1)
        held = {**held, MASTERS: 4 * share, ADAM: 8 * share, GRADIENTS: 4 * share}
    if run.offload_parameters != "none":
        held[WEIGHTS] = run.size * model.parameters / run.ranks
    bucket, copy = buckets(model, run)
    kept, gathering = gathered(model, run)
    heap, logits = _heap(model, run, kept)
    with_gradients = max(heap, _heap_of_gradients(model, run))
    large = 4 * model.elements(trained=True, above=HEAP_BLOCK // 4)
    share = 4 * model.trainable / (run.ranks if run.stage else 1)
    waits = run.accumulation > 1
    if run.stage in (None, 0):
        own = large if run.stage == 0 or run.ranks == 1 else 0
        return {"update": {**held, GRADIENTS: own, BUCKETS: bucket, ACTIVATIONS: with_gradients}}
    if run.stage == 3:
        heap_parts = {ACTIVATIONS: heap, GATHERED: kept}
        largest = 4 * model.largest_trained
        return {
            "forward": {**held, **heap_parts, GRADIENTS: share, BUCKETS: bucket, LOGITS: max(logits, gathering)},
            "backward": {**held, **heap_parts, GRADIENTS: share + largest, BUCKETS: bucket + copy},
            "update": {**held, **heap_parts, GRADIENTS: updating(model, run), GATHERED: 0},
        }
    waiting = share * waits if run.stage == 2 else 0
    whole = {**held, ACTIVATIONS: with_gradients if run.stage == 1 else heap}
    return {
        "forward": {**whole, GRADIENTS: waiting, LOGITS: logits},
        "backward": {**whole, GRADIENTS: large * (run.stage == 1) + waiting, BUCKETS: bucket * (run.stage == 2)},
        "reduction": {**whole, GRADIENTS: waiting, BUCKETS: bucket + copy},
        "update": {**whole, GRADIENTS: updating(model, run)},
    }


def _heap_of_gradients(model: ModelSpec, run: RunSpec) -> float:
    """Return the bytes of the heap when all its gradients are there, in the place of activations."""
    in_heap = 4 * model.elements(trained=True, up_to=HEAP_BLOCK // 4)
    return GRADIENTS_TAKE * in_heap + _lost(model, run)


def _heap(model: ModelSpec, run: RunSpec, kept: float) -> tuple[float, float]:
    """Return the growth of the heap by activations, and the bytes of logits too large for it."""
    at_head, in_layer = activations(model, run)
    heap = max(at_head[ACTIVATIONS], in_layer[ACTIVATIONS]) + _lost(model, run)
    if run.stage == 3:
        heap += LOST_OF_GATHERED * min(kept, at_head[ACTIVATIONS])
    logits = at_head[LOGITS]
    return (heap + logits, 0.0) if logits < HEAP_BLOCK else (heap, logits)


def _lost(model: ModelSpec, run: RunSpec) -> float:
    """Return the bytes of the heap lost to fragmentation."""
    each = LOST_OF_PASSING * model.activations.passing * model.layers
    each += LOST_OF_RECOMPUTED * model.activations.layer * run.checkpointed_layers(model.layers)
    return each * run.tokens / run.sequence_parallel
