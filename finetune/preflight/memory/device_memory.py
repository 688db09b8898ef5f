"""Memory of the device of a rank: bytes by part for each phase of a step, on a GPU and on a CPU.

From DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py and
coalesced_collectives.py. N is the number of trained parameters, G the ranks.

On a CPU it is the growth of the rank's resident set while a model is loaded and trained. Memory that is allocated but
never written does not count (most of a gradient bucket). What activations took stays in glibc's heap once it is freed,
and a part of the heap is lost to fragmentation.
"""

from dataclasses import replace

from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

Parts = dict[str, float]
WEIGHTS, GRADIENTS, MASTERS, ADAM = "parameters", "gradients", "float32 masters", "optimizer states"
BUCKETS, GATHERED = "communication buckets", "gathered parameters"
ACTIVATIONS, LOGITS, FRAMEWORK = "activations", "logits and loss", "framework"
NAMES = (WEIGHTS, MASTERS, ADAM, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS, LOGITS, FRAMEWORK)
# A CUDA context with the kernels of torch, NCCL's channels, cuBLAS' workspace: an allowance, not measured here.
GPU_CONTEXT = 1_500_000_000
GPU_FRAGMENTATION = 0.04  # of what the caching allocator hands out: an allowance too
FILES = "files that are read"
# Lost to fragmentation, as a share of the activations without recomputing: measured on glibc 2.36, see
# docs/explanation/benchmarks.md.
LOST = 0.4
# Late imports, the engine's tables, threads and buffers of gloo; measured with a model of 60 kB.
LIBRARIES = 70_000_000


def states(model: ModelSpec, run: RunSpec) -> Parts:
    """Return the bytes of parameters, masters and optimizer states that a rank holds throughout a run.

    Sources: without ZeRO 16N (2 + 2 + 12; gradients are counted elsewhere), 4N + 12N/G under stage 1, 2N + 14N/G under
    stage 2, 16N/G under stage 3 (Rajbhandari et al., ZeRO, 2020, section 3). DeepSpeed keeps masters in float32
    training too: the partition of the flattened weights is cloned. Plain torch without DeepSpeed has none: trained
    weights are float32 whatever the precision, and autocast keeps a half copy of them while it runs.
    """
    trained, size, ranks = model.trainable, run.size, run.ranks
    if run.stage is None:
        weights_held = model.weight_bytes(size) + (0 if size == 4 else 4 * trained)
        return {WEIGHTS: weights_held, MASTERS: 0, ADAM: model.state_bytes(run) * trained}
    share = trained / (ranks if run.stage else 1)
    split = ranks if run.stage == 3 else 1
    on_device = run.offload_optimizer == "none"
    masters: float = 0 if run.stage == 0 and size == 4 else 4 * share
    weights: float = model.weight_bytes(size) / split if run.offload_parameters == "none" else 0
    if run.stage == 3 and run.hpz > 1:
        weights += model.weight_bytes(size) / run.hpz
    return {WEIGHTS: weights, MASTERS: masters * on_device, ADAM: model.state_bytes(run) * share * on_device}


def buckets(model: ModelSpec, run: RunSpec) -> tuple[float, float]:
    """Return the bytes of the gradient buffers, and of the copy made of them while they are reduced.

    Stages 1 and 2 make a buffer of `reduce_bucket` elements in each backward pass; on a CPU only written bytes count.
    """
    size, trained = run.size, model.trainable
    if run.stage is None:  # DDP's hold the gradients themselves
        return 4 * trained * (run.ranks > 1), 0
    if run.stage == 0:
        return size * trained * (run.ranks > 1), 0
    if run.stage == 3:
        largest = model.largest_trained
        bucket = min(reduce_bucket(model, run), trained)
        return size * bucket, size * (max(bucket, largest) + (largest if largest > bucket else 0))
    bucket = reduce_bucket(model, run)
    filled = min(bucket, trained)
    return size * (filled if run.use_cpu else bucket) * (2 if run.overlap_comm else 1), size * filled


def reduce_bucket(model: ModelSpec, run: RunSpec) -> int:
    """Return elements; transformers writes hidden x hidden where the config says "auto"."""
    return model.hidden**2 if run.reduce_bucket is None else run.reduce_bucket


def gathered(model: ModelSpec, run: RunSpec) -> tuple[float, float]:
    """Return the bytes of gathered parameters under ZeRO-3 at the end of the forward pass, and those that gathering a
    module takes in addition.

    Once the order of modules is known (from the second step), a parameter stays gathered if its next use lies within
    `max_live` elements. The backward pass visits the modules in reverse, so the last half of `max_live` stays. Small
    parameters always stay. While a module is gathered it exists twice: as the ranks sent it, and assembled. A single
    rank uses its share as it is.
    """
    if run.stage != 3 or (run.ranks == 1 and run.offload_parameters == "none"):
        return 0.0, 0.0
    threshold = 10 * model.hidden if run.persistence_threshold is None else run.persistence_threshold
    prefetch = int(0.9 * model.hidden**2) if run.prefetch_bucket is None else run.prefetch_bucket
    kept = min(model.parameters, run.max_live / 2 + prefetch + model.small_parameters(threshold))
    kept = max(kept, min(model.parameters, model.largest_module))
    return model.weight_bytes(run.size, kept), model.weight_bytes(run.size, model.largest_module)


def activations(model: ModelSpec, run: RunSpec) -> tuple[Parts, Parts]:
    """Return the bytes at the end of the forward pass, head included, and at the peak inside a layer after it.

    Ranks that share rows share tokens and logits.
    """
    kept, tokens = model.activations, run.tokens / run.sequence_parallel
    logits = run.logits / run.sequence_parallel  # positions
    checkpointed = run.checkpointed_layers(model.layers)
    inputs = kept.layer_input * checkpointed * (0 if run.checkpoints_to_host else 1)
    frozen = kept.frozen_inputs if model.bits == 8 or (run.stage == 3 and not model.bits) else 0.0
    held = kept.outside + (kept.layer + frozen) * (model.layers - checkpointed) + inputs
    fixed: float = run.rows * run.longest**2 if run.padded and run.longest else 0  # the mask
    fixed += kept.fixed * (model.layers - checkpointed) + run.size * model.unpacked_layer
    pairs = _scored_pairs(model, run) / run.sequence_parallel
    if run.padded:
        fixed += kept.scores * pairs * (model.layers - checkpointed)
    scores = (kept.scores_working + kept.scores * (checkpointed > 0 or not run.padded)) * pairs
    layer = kept.recomputing + frozen if checkpointed else kept.working
    at_head = {ACTIVATIONS: tokens * held + fixed, LOGITS: loss_head(model, run, logits)}
    in_layer = {ACTIVATIONS: tokens * (held + layer) + fixed + kept.fixed + scores, LOGITS: 0.0}
    return at_head, in_layer


def _scored_pairs(model: ModelSpec, run: RunSpec) -> int:
    """Return how many pairs of tokens have scores at once: those of a padded batch, or a block of a conversation."""
    from finetune.models.attention import SCORES_AT_ONCE

    heads = model.activations.scored_heads
    if run.flash_attention or not heads:
        return 0
    whole = run.longest**2
    return run.rows * whole if run.padded else min(whole, SCORES_AT_ONCE * run.sequence_parallel // heads)


def loss_head(model: ModelSpec, run: RunSpec, positions: float) -> float:
    """Return the bytes of a loss at so many positions, computed by the head in chunks (`models.loss`).

    These are the logits of a chunk, part of them in float32, the gradients of all hidden states, and that of the head,
    which is summed in float32.
    """
    from finetune.models.loss import CHUNK_BYTES, GPU_CHUNK_BYTES, GPU_HEAD_BYTES, HEAD_BYTES

    chunk, worked_on = (HEAD_BYTES, CHUNK_BYTES) if run.use_cpu else (GPU_HEAD_BYTES, GPU_CHUNK_BYTES)
    logits = (model.activations.logit + model.activations.logit_working) * positions
    elements = model.hidden * model.vocabulary
    gradient = elements if model.largest_trained >= elements else 0
    each = 4 if logits > chunk else run.size
    return min(logits, chunk + worked_on) + 2 * run.size * model.hidden * positions + each * gradient


def gpu_phases(model: ModelSpec, run: RunSpec) -> dict[str, Parts]:
    """Return the bytes of a rank's GPU in each phase of a step, and while a packed model is loaded under ZeRO-3."""
    phases = _step_phases(model, run)
    if run.stage == 3 and model.bits:  # each rank packs the whole model before it is partitioned
        whole = model.weight_bytes(run.size) + run.size * model.unpacked_layer
        phases["loading"] = {**states(model, run), WEIGHTS: whole}
    return {
        name: {**parts, FRAMEWORK: GPU_CONTEXT + GPU_FRAGMENTATION * sum(parts.values())}
        for name, parts in phases.items()
    }


def cpu_phases(model: ModelSpec, run: RunSpec) -> dict[str, Parts]:
    """Return the growth of a rank's resident set in each phase, from before the model is built.

    Nothing is offloaded: the host is the device. While the model is loaded, the pages of its files stay mapped until
    all are read, and experts, which are stored one by one and joined to one tensor of a layer, exist twice.
    """
    run = replace(run, offload_optimizer="none", offload_parameters="none")
    phases = _step_phases(model, run)
    if run.stage == 3 and model.bits is None:
        weights = run.size * model.parameters / run.ranks
    else:
        size = 4 if run.stage is None else run.size
        weights = model.weight_bytes(size) + size * (model.expert_parameters + model.unpacked_layer)
    all_kept = activations(model, replace(run, checkpoint_every=0))
    heap = max(parts.get(ACTIVATIONS, 0) for parts in phases.values())
    heap += LOST * max(parts[ACTIVATIONS] for parts in all_kept)
    phases = {name: {**parts, ACTIVATIONS: heap} for name, parts in phases.items()}
    phases["loading"] = {WEIGHTS: weights, FILES: model.stored_bytes}
    return {name: {**parts, FRAMEWORK: LIBRARIES} for name, parts in phases.items()}


def _step_phases(model: ModelSpec, run: RunSpec) -> dict[str, Parts]:
    """Return the bytes of the tensors of a rank in each phase of a step.

    forward    at its end: all activations, and the logits
    backward   inside a layer: gradients appear, activations are freed
    reduction  of the gradients over the ranks; activations are freed
    update     of the weights
    """
    held = states(model, run)
    bucket, copy = buckets(model, run)
    at_head, in_layer = activations(model, run)
    kept, gathering = gathered(model, run)
    waiting, whole = gradients(model, run)
    largest = model.largest_trained
    stays = run.stage in (None, 3)
    # If the bucket holds all gradients, nothing is reduced before all of them are there.
    early = 0 if run.stage in (1, 2) and reduce_bucket(model, run) >= model.trainable else copy
    found = {
        "forward": {GRADIENTS: waiting, BUCKETS: bucket * stays, GATHERED: kept + gathering, **at_head},
        "backward": {
            GRADIENTS: max(waiting, run.size * largest),
            BUCKETS: bucket + early,
            GATHERED: kept + gathering,
            **in_layer,
        },
        "reduction": {GRADIENTS: whole, BUCKETS: bucket + (0 if run.stage == 1 else copy), GATHERED: kept},
        "update": {GRADIENTS: updating(model, run), BUCKETS: bucket * stays},
    }
    # Without ZeRO-3 and with offloaded optimizer states, gradients leave the GPU through a buffer of the largest one.
    offloading = run.size * largest if run.offload_optimizer != "none" and run.stage in (1, 2) else 0
    return {name: {**held, **parts, BUCKETS: parts[BUCKETS] + offloading} for name, parts in found.items()}


def gradients(model: ModelSpec, run: RunSpec) -> tuple[float, float]:
    """Return the bytes of gradients held between micro-batches, and during the reduction, without `buckets`."""
    size, trained, accumulates = run.size, model.trainable, run.accumulation > 1
    if run.stage is None and run.ranks > 1:
        return 0, 0
    if run.stage in (None, 0):
        each = 4 if run.stage is None or size == 4 else size + 4  # stage 0 adds them up in float32
        return each * trained * accumulates, each * trained
    share = size * trained / run.ranks
    offloads = run.offload_optimizer != "none"
    if run.stage == 1:
        return size * trained * accumulates, size * trained
    if run.stage == 2:
        is_early = reduce_bucket(model, run) < trained
        return (0, 0) if offloads else (share * accumulates, share * accumulates + share * (is_early or accumulates))
    return (0, 0) if offloads else (share, share)


def updating(model: ModelSpec, run: RunSpec) -> float:
    """Return the bytes of gradients during the update: a rank's share, the same flattened, and that in float32."""
    if run.stage in (None, 0):
        return gradients(model, run)[1]
    if run.offload_optimizer != "none":
        return 0
    share = model.trainable / run.ranks
    worked_on = min(share, run.sub_group) if run.stage == 3 else share
    return run.size * (share + worked_on) + (4 * worked_on if run.size != 4 else 0)
