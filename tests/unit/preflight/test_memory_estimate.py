"""The arithmetic of the planner: against the ZeRO paper, DeepSpeed's own estimators, and itself."""

import contextlib
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.deepspeed_config import find_config, load_config, shipped_names
from finetune.models.attention import SCORES_AT_ONCE
from finetune.preflight.memory import (
    Activations,
    Block,
    ModelSpec,
    RunSpec,
    estimate_memory,
    from_deepspeed,
    plain_activations,
    suggest_changes,
)
from finetune.preflight.memory.device_memory import (
    ACTIVATIONS,
    ADAM,
    GRADIENTS,
    MASTERS,
    WEIGHTS,
    activations,
    gpu_phases,
    states,
)

PAPER = 7_500_000_000  # parameters of the ZeRO paper's example, on 64 GPUs
NOTHING = Activations(layer=0, outside=0, layer_input=0, working=0, recomputing=0, logit=0, logit_working=0)
GB = 1e9


def shape_with(parameters: int, *, trained: int | None = None, activations: Activations = NOTHING) -> ModelSpec:
    """Of numbers alone: one block of what is trained, one of what is not."""
    trained = parameters if trained is None else trained
    blocks = [Block(trained, 1), Block(parameters - trained, 1, trained=False)]
    return ModelSpec(
        blocks=tuple(one for one in blocks if one.size),
        activations=activations,
        layers=32,
        hidden=4_096,
        vocabulary=128_256,
        embedding=525_336_576,
        tied=False,
        stored_bytes=2 * parameters,
        largest_module=525_336_576,
        active=parameters,
        adapter=trained < parameters,
    )


def llama_8b(*, adapter: bool = False) -> ModelSpec:
    """As large as Llama-3-8B: its parameters in blocks, its activations by the formula."""
    hidden, heads, width, intermediate, vocabulary = 4_096, 32, 128, 14_336, 128_256
    of_layer = [hidden * hidden] * 2 + [hidden * 1_024] * 2 + [hidden * intermediate] * 3 + [hidden] * 2
    blocks = [Block(size, 32, not adapter) for size in of_layer] + [Block(hidden * vocabulary, 2, not adapter)]
    blocks += [Block(8 * hidden, 32 * 14)] if adapter else []
    kept = plain_activations(
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=width,
        intermediate=intermediate,
        vocabulary=vocabulary,
        gated=True,
        size=2,
    )
    return replace(shape_with(8_030_261_248, activations=kept), blocks=tuple(blocks), adapter=adapter)


def of_states(shape: ModelSpec, job: RunSpec) -> float:
    """Parameters, masters, moments, and the gradients as the paper counts them: of a share from stage 2 on."""
    share = job.ranks if job.stage in (2, 3) else 1
    return sum(states(shape, job).values()) + job.size * shape.trainable / share


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figures_of_the_zero_paper(stage: int, gigabytes: float):
    """Figure 1 of https://arxiv.org/abs/1910.02054: 7.5 billion parameters on 64 GPUs, mixed precision, Adam."""
    job = RunSpec(stage=stage, ranks=64, tokens=0, logits=0)
    assert of_states(shape_with(PAPER), job) / GB == pytest.approx(gigabytes, abs=0.06)


@given(
    parameters=st.integers(10**6, 10**11),
    ranks=st.integers(1, 512),
    stage=st.sampled_from((0, 1, 2, 3)),
)
def test_the_formulas_of_the_zero_paper(parameters: int, ranks: int, stage: int):
    wanted = {0: 16, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage] * parameters
    job = RunSpec(stage=stage, ranks=ranks, tokens=0, logits=0)
    assert of_states(shape_with(parameters), job) == pytest.approx(wanted)


def deepspeeds_own(stage: int, **sizes: Any) -> list[tuple[float, float]]:
    """(CPU, GPU) GB in each of the lines that DeepSpeed prints."""
    if stage == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_cold as estimator
    else:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_cold as estimator
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        estimator(num_gpus_per_node=8, num_nodes=1, **sizes)
    found = re.findall(r"^\s+([\d.]+)GB \|\s+([\d.]+)GB", printed.getvalue(), re.MULTILINE)
    return [(float(cpu), float(gpu)) for cpu, gpu in found]


@pytest.mark.parametrize("parameters", [1_235_814_400, 8_030_261_248])
def test_deepspeeds_estimators(parameters: int):
    """Theirs count 18 bytes a parameter of what is split, with a gradient in float32 beside the half one's place; ours
    the 16 that are there and, while the optimizer works, the gradients in float32. Theirs know no LoRA."""
    shape = shape_with(parameters)
    ranks, gib = 8, 2**30
    for stage, options in ((2, {}), (3, {"largest_layer_params": 525_336_576})):
        lines = deepspeeds_own(stage, total_params=parameters, **options)
        assert len(lines) >= 2
        theirs = max(gpu for _, gpu in lines) * gib  # nothing is offloaded
        job = RunSpec(stage=stage, ranks=ranks, tokens=0, logits=0)
        update = gpu_phases(shape, job)["update"]
        ours = sum(update.get(name, 0) for name in (WEIGHTS, MASTERS, ADAM, GRADIENTS))
        layer = 4 * 525_336_576 if stage == 3 else 0
        # 2N (or nothing) + 18N/G theirs, 2N (or 2N/G) + 12N/G + (2 + 2 + 4)N/G ours: 2N/G more.
        assert ours == pytest.approx(theirs - layer + 2 * parameters / ranks * (1 + (stage == 3)), rel=0.02)


def test_offloaded_states_are_on_the_host():
    shape = llama_8b()
    kept = RunSpec(stage=3, ranks=8, tokens=4_096, logits=2_048, checkpoint_every=1)
    moved = replace(kept, offload_optimizer="cpu", offload_parameters="cpu")
    before, after = estimate_memory(shape, kept), estimate_memory(shape, moved)
    assert before.device_total - after.device_total > 14 * shape.parameters / 8
    assert after.host_training - before.host_training >= 18 * shape.parameters
    assert WEIGHTS not in after.device
    with pytest.raises(ValueError, match="stage 3"):
        estimate_memory(shape, replace(moved, stage=2))
    with pytest.raises(ValueError, match="expected"):
        estimate_memory(shape, replace(kept, stage=4))


def test_parts_are_named_in_order_and_add_up():
    found = estimate_memory(llama_8b(), RunSpec(stage=2, ranks=8, tokens=8_192, logits=4_096))
    assert list(found.device)[:3] == [WEIGHTS, MASTERS, ADAM]
    assert found.device_total == pytest.approx(max(found.by_phase.values()))
    assert found.phase in found.by_phase
    assert all(value > 0 for value in found.device.values())


def test_adapters_need_no_states_of_the_base():
    job = RunSpec(stage=2, ranks=8, tokens=4_096, logits=2_048)
    full, adapter = estimate_memory(llama_8b(), job), estimate_memory(llama_8b(adapter=True), job)
    assert adapter.device[ADAM] < full.device[ADAM] / 100
    assert adapter.result < full.result / 100
    assert adapter.checkpoint_total < full.checkpoint_total / 100


def test_checkpoints_that_stay():
    job = RunSpec(stage=2, ranks=8, tokens=1, logits=1, keep_checkpoints=3)
    found = estimate_memory(llama_8b(), job)
    assert found.kept == pytest.approx(found.result + 4 * found.checkpoint_total, rel=0.01)
    assert estimate_memory(llama_8b(), replace(job, keep_checkpoints=None)).kept is None
    only = estimate_memory(llama_8b(), replace(job, only_model=True))
    assert only.checkpoint_total == only.result < found.checkpoint_total / 7


JOBS = st.builds(
    RunSpec,
    stage=st.sampled_from((1, 2, 3)),
    ranks=st.sampled_from((1, 2, 4, 8, 16)),
    tokens=st.sampled_from((512, 4_096, 16_384)),
    logits=st.sampled_from((256, 512)),
    rows=st.sampled_from((1, 2, 8)),
    longest=st.sampled_from((64, 256)),
    accumulation=st.sampled_from((1, 2, 8)),
    checkpoint_every=st.sampled_from((0, 1, 2)),
    precision=st.sampled_from(("bf16", "float32")),
    use_cpu=st.booleans(),
    overlap_comm=st.booleans(),
)
SHAPES = st.booleans().map(lambda adapter: llama_8b(adapter=adapter))


@given(shape=SHAPES, job=JOBS)
@settings(deadline=None)
def test_more_ranks_never_need_more_of_each(shape: ModelSpec, job: RunSpec):
    more = replace(job, ranks=2 * job.ranks)
    if job.stage == 3 and job.ranks == 1:  # a single rank gathers nothing
        return
    assert estimate_memory(shape, more).device_total <= estimate_memory(shape, job).device_total * (1 + 1e-9)


@given(shape=SHAPES, job=JOBS, more=st.integers(1, 100_000))
@settings(deadline=None)
def test_more_tokens_never_need_less(shape: ModelSpec, job: RunSpec, more: int):
    longer = replace(job, tokens=job.tokens + more, logits=job.logits + more)
    assert estimate_memory(shape, longer).device_total >= estimate_memory(shape, job).device_total


@given(shape=SHAPES, job=JOBS)
@settings(deadline=None)
def test_checkpointing_never_needs_more_on_a_gpu(shape: ModelSpec, job: RunSpec):
    job = replace(job, use_cpu=False, tokens=16_384)
    off, some, on = (estimate_memory(shape, replace(job, checkpoint_every=every)).device_total for every in (0, 2, 1))
    assert on <= some <= off


@given(shape=SHAPES, job=JOBS, share=st.floats(0.05, 0.99), on_host=st.sampled_from((None, 2_000)))
@settings(deadline=None, max_examples=60)
def test_changes_fit(shape: ModelSpec, job: RunSpec, share: float, on_host: int | None):
    bytes_there = share * estimate_memory(shape, job).device_total
    adapter = None if shape.adapter else llama_8b(adapter=True)
    host_bytes = None if on_host is None else on_host * GB
    found = suggest_changes(shape, job, bytes_there, host_bytes, with_adapter=adapter)
    assert len(found) <= 3
    order = [(", " in one.words, one.slower) for one in found]  # single changes in front, the cheapest first
    assert order == sorted(order)
    for one in found:
        needed = estimate_memory(one.model, one.run)
        assert needed == one.estimate
        assert needed.device_total <= bytes_there
        assert host_bytes is None or needed.host_total <= host_bytes
        assert one.flags
        assert len(one.flags) % 2 == 0
        assert all(name.startswith("--") for name in one.flags[::2])
        assert one.words
        step = (one.run.rows * one.run.accumulation * one.run.ranks, job.rows * job.accumulation * job.ranks)
        assert step[0] == step[1], "a step learns from as many rows as before"


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_config_is_a_job(name: str):
    config = load_config(find_config(name))
    config["zero_optimization"].pop("zero_hpz_partition_size", None)
    fields = from_deepspeed(config)
    job = RunSpec(**fields, ranks=8, tokens=4_096, logits=2_048)
    assert job.stage == config["zero_optimization"]["stage"]
    assert (job.offload_optimizer != "none") == ("offload" in name or "nvme" in name)
    bucket = config["zero_optimization"]["reduce_bucket_size"]
    assert job.reduce_bucket == (None if bucket == "auto" else bucket)
    assert estimate_memory(llama_8b(), job).device_total > 0


def test_a_run_without_deepspeed_is_a_job():
    job = RunSpec(**from_deepspeed(None), ranks=1, tokens=4_096, logits=2_048)
    needed = estimate_memory(llama_8b(), job).device_total
    assert needed > 16 * 8_030_261_248  # float32 weights, gradients and moments
    on_two = RunSpec(**from_deepspeed(None), ranks=2, tokens=4_096, logits=2_048)
    # DDP's buckets are the gradients; they stay through the forward pass.
    assert needed <= estimate_memory(llama_8b(), on_two).device_total < needed + 4 * 8_030_261_248


def test_what_is_offered_for_eight_billion_parameters():
    """On eight GPUs of 40 GB stage 1 needs too much for weights and activations."""
    job = RunSpec(stage=1, ranks=8, tokens=4_096, logits=2_048, rows=4, longest=1_024)
    assert not estimate_memory(llama_8b(), job).fits(40 * GB)
    found = suggest_changes(llama_8b(), job, 40 * GB, with_adapter=llama_8b(adapter=True))
    assert found
    assert any("--deepspeed" in change.flags for change in found)


def test_two_changes_where_one_is_not_enough_and_none_where_nothing_is():
    job = RunSpec(stage=3, ranks=8, tokens=16_384, logits=8_192, rows=8, longest=2_048)
    found = suggest_changes(llama_8b(), job, 32 * GB)
    assert found
    assert all(", " in change.words for change in found)
    assert suggest_changes(llama_8b(), job, 1 * GB) == ()


def test_a_cpu_lends_what_is_written_to_only():
    """The bucket for gradients is as large as the config says on a GPU, and as what is in it on a CPU."""
    shape = shape_with(10_000_000)
    job = RunSpec(stage=2, ranks=2, tokens=0, logits=0, precision="float32")
    gpu, cpu = (estimate_memory(shape, replace(job, use_cpu=use_cpu)).device_total for use_cpu in (False, True))
    assert gpu > 4 * 500_000_000
    assert cpu < 4 * 500_000_000


SCORED = replace(NOTHING, scores=40, scores_working=60, scored_heads=8)


def test_scores_of_attention_without_a_kernel():
    """A padded batch keeps them in each layer; a flat row has those of a block of queries at a time."""
    shape = shape_with(10_000, activations=SCORED)
    row = RunSpec(stage=2, ranks=1, tokens=4_000, logits=0, rows=4, longest=1_000)

    def scores(run: RunSpec) -> float:
        return (
            activations(shape, run)[1][ACTIVATIONS]
            - activations(shape, replace(run, flash_attention=True))[1][ACTIVATIONS]
        )

    assert scores(row) == 100 * 1_000**2
    assert scores(replace(row, longest=100_000)) == 100 * SCORES_AT_ONCE / 8
    assert scores(replace(row, padded=True)) == (40 * shape.layers + 60) * 4 * 1_000**2
    assert scores(replace(row, padded=True, checkpoint_every=1)) == 100 * 4 * 1_000**2
