"""What a GPU, or the process of a rank on a CPU, holds: one dict of named parts for each phase of a step.

Read from DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py and stage3.py, partitioned_param_coordinator.py, and
coalesced_collectives.py. N is what is trained, P all parameters, G the ranks, b the bytes of a weight.
"""

from __future__ import annotations

from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

Parts = dict[str, float]
WEIGHTS, GRADIENTS, MASTERS, ADAM = "parameters", "gradients", "float32 masters", "optimizer states"
BUCKETS, GATHERED = "communication buckets", "gathered parameters"
ACTIVATIONS, LOGITS, FRAMEWORK = "activations", "logits and loss", "framework"
NAMES = (WEIGHTS, MASTERS, ADAM, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS, LOGITS, FRAMEWORK)
# A CUDA context with the kernels of torch, NCCL's channels, cuBLAS' workspace: an allowance, not measured here.
GPU_CONTEXT = 1_500_000_000
GPU_FRAGMENTATION = 0.04  # of what the caching allocator hands out: an allowance too


def states(shape: ModelSpec, job: RunSpec) -> Parts:
    """Bytes of parameters, masters and optimizer states that a rank holds throughout a run.

    Sources: without ZeRO 16N (2 + 2 + 12; gradients are counted elsewhere), 4N + 12N/G under stage 1, 2N + 14N/G under
    stage 2, 16N/G under stage 3 (Rajbhandari et al., ZeRO, 2020, section 3). DeepSpeed keeps masters in float32
    training too: the partition of the flattened weights is cloned. Plain torch without DeepSpeed has none, and its
    weights are float32 whatever the precision; autocast then keeps a half copy of them while it runs.
    """
    trained, size, ranks = shape.trainable, job.size, job.ranks
    if job.stage is None:
        weights = 4 * shape.parameters + (0 if size == 4 else size * shape.parameters)
        return {WEIGHTS: weights, MASTERS: 0, ADAM: 8 * trained}
    share = trained / (ranks if job.stage else 1)
    split = ranks if job.stage == 3 else 1
    on_device = job.offload_optimizer == "none"
    masters = 0 if job.stage == 0 and size == 4 else 4 * share
    weights = size * shape.parameters / split if job.offload_parameters == "none" else 0
    if job.stage == 3 and job.hpz > 1:
        weights += size * shape.parameters / job.hpz
    return {WEIGHTS: weights, MASTERS: masters * on_device, ADAM: 8 * share * on_device}


def buckets(shape: ModelSpec, job: RunSpec) -> tuple[float, float]:
    """Bytes of the buffers for gradients, and of the copy that is made of them while they are reduced.

    Stages 1 and 2 make a buffer of `reduce_bucket` elements in each backward pass; a CPU lends only what is written to.
    """
    size, trained = job.size, shape.trainable
    if job.stage is None:  # DDP's hold the gradients themselves
        return 4 * trained * (job.ranks > 1), 0
    if job.stage == 0:
        return size * trained * (job.ranks > 1), 0
    if job.stage == 3:
        largest = max((one.size for one in shape.blocks if one.trained), default=0)
        bucket = min(reduce_bucket(shape, job), trained)
        return size * bucket, size * (max(bucket, largest) + (largest if largest > bucket else 0))
    bucket = reduce_bucket(shape, job)
    filled = min(bucket, trained)
    return size * (filled if job.use_cpu else bucket) * (2 if job.overlap_comm else 1), size * filled


def reduce_bucket(shape: ModelSpec, job: RunSpec) -> int:
    """Elements; transformers writes hidden x hidden where the config says "auto"."""
    return shape.hidden**2 if job.reduce_bucket is None else job.reduce_bucket


def gathered(shape: ModelSpec, job: RunSpec) -> tuple[float, float]:
    """Bytes of whole parameters under ZeRO-3 at the end of the forward pass, and what gathering a module takes beside.

    Once the order of modules is known (from the second step on), a parameter is kept whose next use lies within
    `max_live` elements. Forwards and back again each is met twice, so that the last half of `max_live` stays. The small
    ones always stay. A gathered module exists twice for a moment: as all ranks sent it, and put together. A single rank
    uses its share as it is.
    """
    if job.stage != 3 or (job.ranks == 1 and job.offload_parameters == "none"):
        return 0.0, 0.0
    threshold = 10 * shape.hidden if job.persistence_threshold is None else job.persistence_threshold
    prefetch = int(0.9 * shape.hidden**2) if job.prefetch_bucket is None else job.prefetch_bucket
    kept = min(shape.parameters, job.max_live / 2 + prefetch + shape.elements(up_to=threshold))
    kept = max(kept, min(shape.parameters, shape.largest_module))
    return job.size * kept, job.size * shape.largest_module


def activations(shape: ModelSpec, job: RunSpec) -> tuple[Parts, Parts]:
    """Bytes at the end of the forward pass with the head's work, and at the worst moment inside a layer after that.

    Tokens and logits are shared by the ranks that share rows.
    """
    kept, tokens = shape.activations, job.tokens / job.sequence_parallel
    learned = job.learned / job.sequence_parallel
    checkpointed = -(-shape.layers // job.checkpoint_every) if job.checkpoint_every else 0
    inputs = kept.layer_input * checkpointed * (0 if job.checkpoints_to_host else 1)
    frozen = kept.frozen_inputs if job.stage == 3 else 0.0
    held = kept.outside + (kept.layer + frozen) * (shape.layers - checkpointed) + inputs
    fixed = job.rows * job.longest**2 if job.padded and job.longest else 0  # the mask
    fixed += kept.fixed * (shape.layers - checkpointed)
    layer = kept.recomputing + frozen if checkpointed else kept.working
    logits = kept.logit * learned
    at_head = {ACTIVATIONS: tokens * held + fixed, LOGITS: logits + kept.logit_working * learned}
    in_layer = {ACTIVATIONS: tokens * (held + layer) + fixed + kept.fixed, LOGITS: 0.0}
    return at_head, in_layer


def phases(shape: ModelSpec, job: RunSpec) -> dict[str, Parts]:
    """What the GPU of a rank holds in each phase of a step, states included, the framework left out.

    forward    its end: all that is kept, and the logits
    backward   inside a layer: gradients come, activations go
    reduction  of the gradients among the ranks, activations are gone
    update     of the weights
    """
    held = states(shape, job)
    bucket, copy = buckets(shape, job)
    at_head, in_layer = activations(shape, job)
    kept, gathering = gathered(shape, job)
    waiting, whole = gradients(shape, job)
    largest = max((one.size for one in shape.blocks if one.trained), default=0)
    stays = job.stage in (None, 3)
    # Where the bucket holds all, nothing is reduced before all gradients are there.
    early = 0 if job.stage in (1, 2) and reduce_bucket(shape, job) >= shape.trainable else copy
    found = {
        "forward": {GRADIENTS: waiting, BUCKETS: bucket * stays, GATHERED: kept + gathering, **at_head},
        "backward": {
            GRADIENTS: max(waiting, job.size * largest),
            BUCKETS: bucket + early,
            GATHERED: kept + gathering,
            **in_layer,
        },
        "reduction": {GRADIENTS: whole, BUCKETS: bucket + (0 if job.stage == 1 else copy), GATHERED: kept},
        "update": {GRADIENTS: updating(shape, job), BUCKETS: bucket * stays},
    }
    # Without ZeRO-3 and with offloaded optimizer states, gradients leave the GPU through a buffer of the largest one.
    leaving = job.size * largest if job.offload_optimizer != "none" and job.stage in (1, 2) else 0
    return {name: {**held, **parts, BUCKETS: parts[BUCKETS] + leaving} for name, parts in found.items()}


def gradients(shape: ModelSpec, job: RunSpec) -> tuple[float, float]:
    """Bytes of gradients that wait from one micro-batch for the next, and that there are while they are reduced; beside
    what lies in `buckets`."""
    size, trained, accumulates = job.size, shape.trainable, job.accumulation > 1
    if job.stage is None and job.ranks > 1:
        return 0, 0
    if job.stage in (None, 0):
        each = 4 if job.stage is None or size == 4 else size + 4  # stage 0 adds them up in float32
        return each * trained * accumulates, each * trained
    share = size * trained / job.ranks
    offloads = job.offload_optimizer != "none"
    if job.stage == 1:
        return size * trained * accumulates, size * trained
    if job.stage == 2:
        is_early = reduce_bucket(shape, job) < trained
        return (0, 0) if offloads else (share * accumulates, share * accumulates + share * (is_early or accumulates))
    return (0, 0) if offloads else (share, share)


def updating(shape: ModelSpec, job: RunSpec) -> float:
    """Bytes of gradients while the optimizer works: a rank's share, the same flattened, and that in float32."""
    if job.stage in (None, 0):
        return gradients(shape, job)[1]
    if job.offload_optimizer != "none":
        return 0
    share = shape.trainable / job.ranks
    worked_on = min(share, job.sub_group) if job.stage == 3 else share
    return job.size * (share + worked_on) + (4 * worked_on if job.size != 4 else 0)
