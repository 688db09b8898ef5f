"""Flat attention against a formula per conversation; which models run flat, and what gives the others away."""

from __future__ import annotations

import copy
import inspect
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CHUNK, LONGEST, VOCAB_SIZE, WINDOW, InFloat64, build
from torch.nn.attention import varlen
from transformers import AttentionInterface, modeling_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from finetune import attention
from finetune.adapters import attach_lora
from finetune.attention import FLAT_ATTENTION, flat_attention, make_flat, selects_logits

LENGTHS = [5, 1, 8, 3]
FLAT = "llama qwen3 mistral gemma gemma2 gemma3 mixtral phi phi3 gpt_neox gpt2 opt gpt_oss deepseek_v3".split()
REFUSED = {
    "mamba": "its layers carry a state across conversations (config: state_size)",
    "jamba": "its layers carry a state across conversations (config: mamba_d_state)",
    "qwen3_next": "its layers carry a state across conversations (config: linear_conv_kernel_dim)",
    "lfm2": "its layers carry a state across conversations (config: conv_L_cache)",
    "bloom": "its code takes no position_ids",
    "falcon": "its code does not take attention functions from transformers",
    "gptj": "its code does not take attention functions from transformers",
    "stablelm": "a trial with random conversations failed: the boundaries of the conversations do not reach",
    "llama4": f"its attention works in chunks of {CHUNK} tokens (config: attention_chunk_size)",
}


# ---- the function


def drawn(heads: int = 4, key_heads: int = 4, lengths: list[int] | None = None, dtype: Any = torch.float64) -> list:
    """Random queries, keys and values [1, heads, T, 8] that want gradients."""
    torch.manual_seed(0)
    total = sum(LENGTHS if lengths is None else lengths)
    shapes = [(1, count, total, 8) for count in (heads, key_heads, key_heads)]
    return [(2 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], *, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[1, T, heads, width], one query of one head at a time, as the papers write it."""
    heads, total, width = query.shape[1:]
    first = [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for at in range(total):
        begin = first[at] if sliding_window is None else max(first[at], at - sliding_window + 1)
        for head in range(heads):
            of_key = head * key.shape[1] // heads
            scores = key[0, of_key, begin : at + 1] @ query[0, head, at] * (scaling or width**-0.5)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            shares = scores.exp() / (scores.exp().sum() + (0 if s_aux is None else s_aux[head].exp()))
            rows.append(shares @ value[0, of_key, begin : at + 1])
    return torch.stack(rows).view(1, total, heads, width)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def assert_alike(found: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor], tolerance: float) -> None:
    """The values, and the gradients of `inputs`."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    ahead = torch.randn_like(found)
    gradients = [torch.autograd.grad(one, inputs, ahead, retain_graph=True) for one in (found, wanted)]
    for one, other in [(found, wanted), *zip(*gradients, strict=True)]:
        assert other.abs().max() > 0.01
        assert (one - other).abs().max() <= tolerance * other.abs().max()


VARIANTS = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"sliding_window": 3},
    "window of two": {"sliding_window": 2},
    "window as long as a segment": {"sliding_window": 8},
    "wide window": {"sliding_window": 50},
    "softcap": {"softcap": 1.5},
    "softcap, window, scaling": {"softcap": 1.5, "sliding_window": 3, "scaling": 0.7},
    "sinks": {"s_aux": True},
    "sinks, window, softcap": {"s_aux": True, "sliding_window": 3, "softcap": 1.5},
}


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_the_formula(variant, key_heads):
    options, inputs = dict(VARIANTS[variant]), drawn(key_heads=key_heads)
    if "s_aux" in options:
        options["s_aux"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
    wanted_from = [*inputs, *(one for one in options.values() if isinstance(one, torch.Tensor))]
    with InFloat64():
        found, weights = flat_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
        assert weights is None and found.is_contiguous()
        assert_alike(found, written_out(*inputs, LENGTHS, **options), wanted_from, 1e-12)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 1.5}], ids=["plain", "window", "softcap"])
def test_in_float32(options):
    inputs = drawn(key_heads=2, dtype=torch.float32)
    found, _ = flat_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
    assert_alike(found, written_out(*inputs, LENGTHS, **options), inputs, 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_token_sees_itself_alone(softcap):
    """So its output is its own value; under dropout none of it, or twice of it for a half that is dropped."""
    lengths = [1] * 40
    query, key, value = drawn(lengths=lengths)
    row = {"segment_lengths": lengths, "softcap": softcap}
    with InFloat64():
        found, _ = flat_attention(None, query, key, value, None, **row)
        halved, _ = flat_attention(None, query, key, value, None, dropout=0.5, **row)
    wanted = value.transpose(1, 2)
    assert torch.equal(found, wanted)
    dropped = (halved == 0).all(-1)
    assert torch.equal(halved[~dropped], 2 * wanted[~dropped])
    assert 30 < dropped.sum() < 130


def test_another_conversation_changes_nothing():
    query, key, value = drawn()
    before, _ = flat_attention(None, query, key, value, None, segment_lengths=LENGTHS)
    others = [torch.cat([torch.randn_like(one[:, :, :6]), one[:, :, 6:]], dim=2) for one in (query, key, value)]
    after, _ = flat_attention(None, *others, None, segment_lengths=LENGTHS)
    assert torch.equal(before[:, 6:], after[:, 6:]) and not torch.isclose(before[:, :6], after[:, :6]).any()


@pytest.mark.parametrize("window", [None, 3])
def test_the_cost_is_that_of_each_conversation_alone(monkeypatch, window):
    calls = []

    def counting(query, key, value, **options):
        calls.append((query.shape[2], key.shape[2], value.shape[2], options["attn_mask"], options["is_causal"]))
        return real(query, key, value, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    flat_attention(None, *drawn(), None, segment_lengths=LENGTHS, sliding_window=window)
    assert [call[:3] for call in calls] == [(length, length, length) for length in LENGTHS]
    masks = [None if mask is None else mask.shape for *_, mask, _ in calls]
    assert masks == [None if window is None or length <= window else (length, length) for length in LENGTHS]
    assert [causal for *_, causal in calls] == [mask is None for mask in masks]


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("no attention mask and no position bias", {"attention_mask": torch.ones(1, 17)}),
        ("no attention mask and no position bias", {"position_bias": torch.zeros(1, 4, 17, 17)}),
        ("boundaries of the conversations do not reach", {"segment_lengths": None}),
        (r"conversations of \[5, 1, 8\] tokens are not a flat row", {"segment_lengths": [5, 1, 8]}),
        (r"conversations of \[17, 1\] tokens are not a flat row", {"segment_lengths": [17, 1]}),
        (r"keys \[1, 4, 20, 8\]", {"key": torch.zeros(1, 4, 20, 8), "value": torch.zeros(1, 4, 20, 8)}),
        (r"queries \[2, 4, 17, 8\]", dict.fromkeys(("query", "key", "value"), torch.zeros(2, 4, 17, 8))),
    ],
)
def test_anything_but_whole_flat_rows_is_refused(message, changed):
    row = torch.zeros(1, 4, 17, 8)
    given = {"query": row, "key": row, "value": row, "attention_mask": None, "segment_lengths": LENGTHS}
    flat_attention(None, **given)
    with pytest.raises(ValueError, match=message):
        flat_attention(None, **{**given, **changed})


# ---- torch's variable-length kernel


def stand_in_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the kernel's documentation says it does: position i sees j with i - left <= j <= i + right, -1: no limit."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff().tolist()
    assert lengths == cu_seq_k.diff().tolist() and max_q == max_k == max(lengths)
    left, right = window_size
    repeated = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    parts = []
    for q, k, v in zip(*(one.split(lengths) for one in (query, *repeated)), strict=True):
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = ((distance <= left) | (left == -1)) & ((-distance <= right) | (right == -1))
        scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(parts)


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    """The arguments of each call of the kernel, which is taken to run here."""
    calls, signature = [], inspect.signature(varlen.varlen_attn)

    def recorded(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return stand_in_kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    monkeypatch.setattr(attention, "_kernel_takes", lambda *tensors: True)
    return calls


def kernel_row(lengths: list[int]) -> dict[str, Any]:
    return {"segment_lengths": lengths, "cu_seq_lens_q": boundaries(lengths), "max_length_q": max(lengths)}


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}, {"sliding_window": 3}, {"sliding_window": 50}], ids=str)
def test_the_kernel_is_called_for_the_same_values(kernel_calls, options, key_heads):
    inputs = drawn(key_heads=key_heads)
    found, _ = flat_attention(None, *inputs, None, **kernel_row(LENGTHS), **options)
    (call,) = kernel_calls
    window = options.get("sliding_window")
    assert call["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
    assert call["query"].shape == (17, 4, 8) and call["key"].shape == (17, key_heads, 8)
    plain, _ = flat_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
    assert len(kernel_calls) == 1
    assert_alike(found, plain, inputs, 1e-12)


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}], ids=str)
def test_the_kernel_is_not_called_for_what_it_does_not_know(kernel_calls, options):
    flat_attention(None, *drawn(), None, **kernel_row(LENGTHS), **options)
    assert not kernel_calls


AMPERE = dict(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 17, 64), device="cuda:0")


@pytest.mark.parametrize(
    ("takes", "query", "value", "cuda", "capability"),
    [
        (True, {}, {}, "13.0", (8, 0)),
        (True, {"dtype": torch.float16}, {"dtype": torch.float16}, "13.0", (9, 0)),
        (True, {"shape": (1, 4, 17, 256)}, {"shape": (1, 2, 17, 256)}, "13.0", (8, 0)),
        (False, {"is_cuda": False}, {}, "13.0", (8, 0)),
        (False, {"dtype": torch.float32}, {"dtype": torch.float32}, "13.0", (8, 0)),
        (False, {"dtype": torch.float16}, {}, "13.0", (8, 0)),
        (False, {"shape": (1, 4, 17, 264)}, {"shape": (1, 4, 17, 264)}, "13.0", (8, 0)),
        (False, {"shape": (1, 4, 17, 20)}, {"shape": (1, 4, 17, 20)}, "13.0", (8, 0)),
        (False, {}, {"shape": (1, 4, 17, 32)}, "13.0", (8, 0)),
        (False, {}, {}, "13.0", (7, 5)),
        (False, {}, {}, None, (9, 4)),
    ],
)
def test_where_the_kernel_runs(monkeypatch, takes, query, value, cuda, capability):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    first, other = (SimpleNamespace(**{**AMPERE, **changed}) for changed in (query, value))
    assert attention._kernel_takes(first, other, other) is takes


# ---- which models run flat


def flattened(model: Any, longest: int = LONGEST, **options: Any) -> str | None:
    return make_flat(model, longest=longest, vocab_size=VOCAB_SIZE, device="cpu", **options)


def flat_row(lengths: list[int]) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(3, VOCAB_SIZE, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "use_cache": False,
        "max_length_k": max(lengths),
        "cu_seq_lens_k": boundaries(lengths),
        **kernel_row(lengths),
    }


@torch.no_grad()
def one_by_one(model: Any, row: dict[str, Any]) -> torch.Tensor:
    parts = row["input_ids"][0].split(row["segment_lengths"])
    return torch.cat([model(input_ids=part[None], use_cache=False).logits for part in parts], dim=1)


def same_logits(flat: Any, stock: Any, lengths: list[int]) -> bool:
    """Whether a flat row gives what the stock model gives for its conversations one by one."""
    row = flat_row(lengths)
    wanted = one_by_one(stock.eval(), row)
    with torch.no_grad():
        found = flat.eval()(**row).logits
    return bool((found - wanted).abs().max() < 1e-4 * wanted.abs().max())


@contextmanager
def left_as_it_was(model: Any):
    """What is run in here refuses the model, which is then what it was before: the same logits, any call allowed."""
    ids = torch.arange(3, 15)[None]
    before, name = model.eval()(ids).logits.detach(), model.config._attn_implementation
    yield
    assert model.config._attn_implementation == name != FLAT_ATTENTION
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, before)
    assert AttentionInterface()[FLAT_ATTENTION] is flat_attention


@pytest.mark.parametrize("family", FLAT)
def test_families_that_run_flat(family):
    model = build(family)
    stock = copy.deepcopy(model)
    assert flattened(model) is None
    assert model.config._attn_implementation == FLAT_ATTENTION and model.training
    assert AttentionInterface()[FLAT_ATTENTION] is flat_attention
    assert same_logits(model, stock, [LONGEST, 3, 11, 1])


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_do_not_run_flat(family):
    model = build(family)
    with left_as_it_was(model):
        assert flattened(model).startswith(REFUSED[family])


def test_a_model_in_bfloat16_runs_flat():
    assert flattened(build("llama", dtype=torch.bfloat16)) is None


def test_a_model_with_an_adapter_runs_flat():
    model = attach_lora(build("llama"), r=2, alpha=4, dropout=0.1, target_modules=["all-linear"])
    assert flattened(model) is None
    assert model.get_base_model().config._attn_implementation == FLAT_ATTENTION
    with pytest.raises(ValueError, match="attention mask"):
        model(**flat_row(LENGTHS), attention_mask=torch.ones(1, 17))


def test_chunks_and_windows_matter_only_to_longer_conversations():
    config = build("llama4").config
    assert attention.config_obstacle(config, CHUNK) is None
    assert "chunks of 8 tokens" in attention.config_obstacle(config, CHUNK + 1)
    for family in ("mistral", "gemma2"):
        config = build(family).config
        assert attention.window_of(config, WINDOW) is None and attention.window_of(config, WINDOW + 1) == WINDOW
    config.layer_types = ["full_attention", "full_attention"]
    assert attention.window_of(config, LONGEST) is None


def test_logits_can_be_selected_in_models_of_transformers():
    assert all(selects_logits(build(family)) for family in FLAT)
    assert selects_logits(attach_lora(build("llama"), r=2, alpha=4, dropout=0.0, target_modules=["q_proj"]))
    assert not selects_logits(torch.nn.Linear(1, 1))


# ---- what gives a model away


def attends_to_the_whole_row(layer: Any) -> None:
    inner = layer.self_attn.forward

    def forward(hidden_states, **kwargs):
        return inner(hidden_states, **{**kwargs, "segment_lengths": [hidden_states.shape[1]]})

    layer.self_attn.forward = forward


def mixes_in_the_token_before(layer: Any) -> None:
    inner = layer.mlp.forward
    layer.mlp.forward = lambda states: inner(states + 0.1 * F.pad(states, (0, 0, 1, -1)))


@pytest.mark.parametrize("spoil", [attends_to_the_whole_row, mixes_in_the_token_before])
@pytest.mark.parametrize("layers", [slice(None), slice(3, None), slice(1)], ids=["all", "last", "first"])
def test_layers_that_ignore_boundaries_are_caught(spoil, layers):
    model = build("llama", num_hidden_layers=4)
    assert flattened(copy.deepcopy(model)) is None
    for layer in model.model.layers[layers]:
        spoil(layer)
    with left_as_it_was(model):
        reason = flattened(model)
    assert reason.startswith("in a trial, a conversation saw the one in front of it (logits differ by ")


def test_a_trial_that_would_not_show_a_leak_is_no_proof():
    model = build("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with left_as_it_was(model):
        assert "could not tell whether conversations see each other" in flattened(model)


def test_a_window_that_is_not_handed_on_is_caught():
    model = build("llama", sliding_window=WINDOW)  # a field that Llama's code does not read
    with left_as_it_was(model):
        assert flattened(model) == "its sliding window of 4 tokens does not reach the attention"
    assert flattened(model, longest=WINDOW) is None


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, IndexError, KeyError, AssertionError])
@pytest.mark.parametrize(
    "words", [["no such thing"], ["no such thing\nin two lines"], []], ids=["words", "lines", "nothing"]
)
def test_a_model_that_fails_in_its_trial_is_refused(monkeypatch, error, words):
    def fail(states):
        raise error(*words)

    model = build("llama")
    with left_as_it_was(model):
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", fail)
            reason = flattened(model)
        assert reason.startswith("a trial with random conversations failed: ") and "\n" not in reason
        assert ("no such thing" if words else error.__name__) in reason


def test_a_model_whose_own_attention_computes_something_else_is_refused(monkeypatch):
    """Llama's eager attention gets a soft cap of its own here, of which no argument tells: 20 % of long logits."""
    capped = partial(modeling_gemma2.eager_attention_forward, softcap=5.0)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped)
    model = build("llama", attention="eager")
    with left_as_it_was(model):
        assert flattened(model) is not None


def test_scales_by_the_place_in_the_row_are_refused_or_right():
    """Llama 4 scales queries by their place in the row, whatever position_ids say, from place `floor_scale` on."""
    scales = {"attn_temperature_tuning": True, "floor_scale": 20, "attn_scale": 0.5, "no_rope_layers": [1, 0]}
    model = build("llama4", attention_chunk_size=64, **scales)
    stock = copy.deepcopy(model)
    assert flattened(model) is not None or same_logits(model, stock, [LONGEST, 3, 11])


def test_ranks_end_up_alike():
    model = build("llama")
    with left_as_it_was(model):
        assert flattened(model, agree=lambda reason: reason or "another rank's reason") == "another rank's reason"


# ---- flash attention of transformers, which takes the boundaries itself


@pytest.mark.parametrize("obeys", [True, False], ids=["obeys", "ignores"])
def test_flash_attention_is_kept_and_tried_too(monkeypatch, obeys):
    def flash_stand_in(module, query, key, value, attention_mask, cu_seq_lens_q=None, **options):
        lengths = cu_seq_lens_q.diff().tolist() if obeys and cu_seq_lens_q is not None else [query.shape[2]]
        return flat_attention(module, query, key, value, None, **{**options, "segment_lengths": lengths})

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_stand_in)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *names, **options: None)
    model = build("llama")
    model.set_attn_implementation("flash_stand_in")
    reason = flattened(model)
    assert reason is None if obeys else "saw the one in front of it" in reason
    assert model.config._attn_implementation == "flash_stand_in"
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()  # as for an answer
    if obeys:
        with pytest.raises(ValueError, match="attention mask"):
            model(**flat_row(LENGTHS), attention_mask=torch.ones(1, 17))


# ---- the guard of a flat model


@pytest.fixture(scope="module")
def flat_llama():
    model = build("llama")
    assert flattened(model) is None
    return model


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("an attention mask or a cache", {"attention_mask": torch.ones(1, 17)}),
        ("an attention mask or a cache", {"past_key_values": object()}),
        ("needs use_cache=False and position_ids", {"use_cache": None}),
        ("needs use_cache=False and position_ids", {"use_cache": True}),
        ("needs use_cache=False and position_ids", {"position_ids": None}),
    ],
)
def test_calls_that_would_mix_conversations_are_refused(flat_llama, message, changed):
    row = flat_row(LENGTHS)
    assert flat_llama(**row).logits.isfinite().all()
    given = {name: value for name, value in {**row, **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        flat_llama(**given)


def test_a_plain_call_of_a_flat_model_is_refused(flat_llama):
    with pytest.raises(ValueError, match="needs use_cache=False"):
        flat_llama(input_ids=torch.tensor([[5, 6, 7]]))


# ---- parameters that are partitioned


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_what_a_trial_gathers_it_releases(monkeypatch, fails):
    held: list[int] = []
    most = 0

    @contextmanager
    def gathered(parameters):
        nonlocal most
        held.extend(map(id, parameters))
        most = max(most, len(held))
        yield
        for one in parameters:
            held.remove(id(one))

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    model = build("gpt_oss")  # its attention holds parameters itself: the sinks
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    if fails:
        monkeypatch.setattr(attention, "_attend_written_out", None)
    reason = flattened(model)
    assert reason is None or (fails and "argument must be callable" in reason)
    assert 0 < most < 8 and not held
