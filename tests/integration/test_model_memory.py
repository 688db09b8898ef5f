"""Memory and checkpoint sizes of real runs against the estimate."""

import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finetune.checkpoint.checkpoint_size import MODEL, MODEL_STATES, OPTIMIZER
from finetune.models import attention
from finetune.models.adapters import count_parameters
from finetune.preflight.memory import ModelSpec, RunSpec, estimate_memory
from finetune.preflight.spec_from_config import spec_from_config
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models
from tests.helpers.lora import attach_lora
from tests.helpers.paths import ROOT
from tests.helpers.short_runs import LORA
from tests.helpers.tiers import mostly_slow

TOKENS, LEARNED = [40, 24], 20


def predicted(shape: ModelSpec) -> float:
    kept = shape.activations
    held = kept.outside + kept.layer * shape.layers
    return sum(TOKENS) * held + LEARNED * kept.logit + kept.fixed * shape.layers


def sizes_of(output: Path) -> dict[str, int]:
    """Bytes of the files of the only checkpoint, by what they hold; and of the result."""
    (folder,) = output.glob("checkpoint-*")
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {
        MODEL: sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        OPTIMIZER: sum(path.stat().st_size for path in files if path.name.endswith("optim_states.pt")),
        MODEL_STATES: sum(path.stat().st_size for path in files if path.name.endswith("model_states.pt")),
    }
    return {**found, "result": sum(path.stat().st_size for path in output.glob("*.safetensors"))}


@pytest.mark.parametrize(("stage", "adapter"), mostly_slow([(1, False), (2, True), (3, False)], [(3, False)]))
def test_checkpoints_are_as_large_as_they_are(train, tiny_model: Path, stage: int, adapter: bool):
    flags = ["--deepspeed", f"zero{stage}", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    output = train("run", *flags, *(LORA if adapter else ()))
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    attach = partial(attach_lora, r=8, alpha=16, dropout=0.0, target_modules=["all-linear"])
    shape = spec_from_config(config, precision="float32", attach=attach if adapter else None)
    job = RunSpec(stage=stage, ranks=2, tokens=64, logits=32, precision="float32", use_cpu=True)
    found, sizes = estimate_memory(shape, job), sizes_of(output)
    small = 60_000 if adapter else 400_000  # names, shapes, and what pickles need
    for name in (MODEL, MODEL_STATES, OPTIMIZER):
        assert sizes[name] == pytest.approx(found.checkpoint[name], rel=0.02, abs=small), name
    assert sizes["result"] == pytest.approx(found.result, rel=0.02, abs=small)
    assert sizes[OPTIMIZER] > small / 2


@pytest.mark.faults
@pytest.mark.parametrize("stage", [2, 3])
def test_a_measured_run(tmp_path: Path, stage: int):
    """Two ranks, a model of some ten million parameters: the resident set grows by what is predicted."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--models", "small", "--json", str(figures)]
    command += ["--adapters", "full", "--stages", str(stage), "--checkpointing", "off", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(figures.read_text())
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.25)


WITHOUT_STATE = sorted(set(tiny_models.FAMILIES) - {"mamba", "jamba", "lfm2", "qwen3_next"})
FAMILIES = ("llama", "qwen3", "gemma3", "mixtral", "gpt_neox")


WITH_ADAPTER = partial(attach_lora, r=4, alpha=8, dropout=0.1, target_modules=["all-linear"])


def qwen2() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**tiny_models.SIZES, **tiny_models.GROUPED})
    return transformers.Qwen2ForCausalLM(config).train()


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return qwen2().to(dtype) if family == "qwen2" else tiny_models.build(family, dtype=dtype)


def kept_bytes(model: Any) -> int:
    """What autograd keeps for the backward pass of a flat row, parameters not counted, each storage once."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(
            input_ids=torch.randint(3, 200, (1, sum(TOKENS))),
            position_ids=torch.cat([torch.arange(length) for length in TOKENS])[None],
            use_cache=False,
            segment_lengths=TOKENS,
            cu_seq_lens_q=torch.tensor([0, *TOKENS]).cumsum(0).to(torch.int32),
            logits_to_keep=torch.arange(LEARNED),
        ).logits
    storage = logits.untyped_storage()
    kept[storage.data_ptr()] = (storage.nbytes(), logits)  # the loss keeps them, as their own gradient
    return sum(size for size, _ in kept.values())


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize(
    ("family", "adapter"),
    mostly_slow(
        product([*FAMILIES, "qwen2", "gemma2", "gpt_oss"], [False, True]),
        [("llama", False), ("gpt_neox", True), ("mixtral", True), ("gemma2", False), ("gpt_oss", False)],
    ),
)
def test_what_autograd_keeps(family: str, adapter: bool):
    model = model_of(family)
    attach = partial(WITH_ADAPTER, dropout=0.0) if family in ("mixtral", "gpt_oss") else WITH_ADAPTER
    shape = spec_from_config(model.config, precision="float32", attach=attach if adapter else None)
    attention.register_flat_attention()
    model.set_attn_implementation(attention.FLAT_ATTENTION)
    model = attach(model).train() if adapter else model
    assert shape.activations.is_traced
    assert predicted(shape) == pytest.approx(kept_bytes(model), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_of_a_padded_row_keeps_the_scores_of_eager_attention(dtype):
    model = tiny_models.build("llama", dtype=dtype, attention="eager")

    def kept(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def note(saved: torch.Tensor) -> torch.Tensor:
            sizes[saved.untyped_storage()._cdata] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            logits = model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=False).logits
        return sum(sizes.values()) if logits.requires_grad else 0

    precision = "float32" if dtype == torch.float32 else "bf16"
    shape = spec_from_config(model.config, precision=precision, keeps_scores=True)
    of_pairs = (kept(96) - 2 * kept(64) + kept(32)) / (96**2 - 2 * 64**2 + 32**2)
    assert shape.activations.scores * shape.layers == pytest.approx(of_pairs, rel=0.05)
    assert spec_from_config(model.config, precision=precision).activations.scores == 0


@pytest.mark.parametrize("family", mostly_slow([*FAMILIES, "qwen2"], ["llama", "gemma3"]))
def test_a_checkpointed_layer_keeps_what_it_gets(family: str):
    shape = spec_from_config(model_of(family).config, precision="bf16")
    assert shape.activations.layer_input == pytest.approx(2 * shape.hidden, rel=0.3)
    assert shape.activations.layer_input < shape.activations.layer / 4 < shape.activations.recomputing


@pytest.mark.parametrize("family", mostly_slow(["llama", "qwen3", "gpt_neox", "qwen2"], ["qwen3"]))
def test_half_precision_is_traced_apart(family: str):
    """The sums of norms stay float32, but for gpt_neox's; elsewhere it is more than half."""
    model = model_of(family, torch.bfloat16)
    shape = spec_from_config(model.config, precision="bf16")
    full = spec_from_config(model.config, precision="float32")
    assert 0.45 * full.activations.layer < shape.activations.layer < full.activations.layer
    attention.register_flat_attention()
    model.set_attn_implementation(attention.FLAT_ATTENTION)
    width = getattr(model.config, "head_dim", None) or shape.hidden // model.config.num_attention_heads
    copied = 2 * model.config.num_attention_heads * width  # attention on a CPU copies its result, on a GPU it does not
    assert predicted(shape) + sum(TOKENS) * shape.layers * copied == pytest.approx(kept_bytes(model), rel=0.08)


@pytest.mark.parametrize("family", mostly_slow(WITHOUT_STATE, ["llama", "gemma3", "gpt2", "deepseek_v3"]))
def test_parameters(family: str):
    model = tiny_models.build(family)
    shape = spec_from_config(model.config, precision="float32")
    assert (shape.trainable, shape.parameters) == count_parameters(model)
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.activations.layer > 0
    assert shape.activations.logit >= 4 * tiny_models.VOCAB_SIZE


@pytest.mark.parametrize("family", ["mamba", "jamba", "lfm2", "qwen3_next"])
def test_models_that_are_not_attention_alone_have_a_shape_too(family: str):
    model = tiny_models.build(family)
    shape = spec_from_config(model.config, precision="float32")
    assert shape.parameters == count_parameters(model)[1]
    assert shape.activations.layer > 0


def test_parameters_with_adapters():
    model = model_of("llama")
    shape = spec_from_config(model.config, precision="bf16", attach=partial(WITH_ADAPTER, train_embeddings=True))
    real = WITH_ADAPTER(model, train_embeddings=True)
    assert (shape.trainable, shape.parameters) == count_parameters(real)
    assert shape.adapter
    grown = spec_from_config(model.config, precision="bf16", vocabulary=300)
    assert grown.parameters - spec_from_config(model.config, precision="bf16").parameters == 2 * 100 * shape.hidden


def test_experts_that_a_token_visits():
    model = model_of("mixtral")
    shape = spec_from_config(model.config, precision="bf16")
    experts = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    assert (shape.experts, shape.experts_per_token) == (4, 2)
    assert shape.active == shape.parameters - experts // 2


def test_code_that_takes_no_attention_functions_gets_the_formula(monkeypatch: pytest.MonkeyPatch):
    """The formula of a plain decoder is near what is counted of one."""
    config = model_of("llama").config
    counted = spec_from_config(config, precision="bf16").activations
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_can_set_attn_implementation", lambda self: False)
    formula = spec_from_config(config, precision="bf16").activations
    assert counted.is_traced
    assert not formula.is_traced
    assert formula.layer == pytest.approx(counted.layer, rel=0.1)
    assert formula.logit == pytest.approx(counted.logit, rel=0.05)


def test_code_that_cannot_be_built_without_weights_is_told_apart_from_a_bad_adapter():
    config = transformers.LlamaConfig(**{**tiny_models.SIZES, **tiny_models.GROUPED})

    def asks_for_content(base: Any) -> Any:
        return float(base.get_input_embeddings().weight[0, 0])

    with pytest.raises(ValueError, match="cannot be built without weights: .*meta"):
        spec_from_config(config, precision="float32", attach=asks_for_content)
    with pytest.raises(ConfigError):
        spec_from_config(config, precision="float32", attach=partial(WITH_ADAPTER, target_modules=["nowhere"]))
