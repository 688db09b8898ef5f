"""Flat attention against a formula per conversation; which models run flat, and what gives the others away."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from finetune.models import attention
from finetune.models.attention import padding_free_attention
from tests.helpers.flat_rows import LENGTHS, kernel_row
from tests.helpers.tiny_models import InFloat64

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
        found, weights = padding_free_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
        assert weights is None and found.is_contiguous()
        assert_alike(found, written_out(*inputs, LENGTHS, **options), wanted_from, 1e-12)


@pytest.mark.parametrize("scores_at_once", [1, 4 * 8 * 3])
@pytest.mark.parametrize("variant", [name for name, options in VARIANTS.items() if {"softcap", "s_aux"} & {*options}])
def test_queries_in_blocks_without_a_fused_kernel(variant, scores_at_once, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    test_values_and_gradients_are_those_of_the_formula(variant, 2)


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_no_scores_are_kept_for_the_backward_pass(options):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda one: one):
        output, _ = padding_free_attention(None, *drawn(lengths=[60]), None, segment_lengths=[60], **options)
    assert output.requires_grad and (1, 4, 60, 8) in kept
    assert not [shape for shape in kept if shape[-2:] == (60, 60)]


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 1.5}], ids=["plain", "window", "softcap"])
def test_in_float32(options):
    inputs = drawn(key_heads=2, dtype=torch.float32)
    found, _ = padding_free_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
    assert_alike(found, written_out(*inputs, LENGTHS, **options), inputs, 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_token_sees_itself_alone(softcap):
    """So its output is its own value; under dropout none of it, or twice of it for a half that is dropped."""
    lengths = [1] * 40
    query, key, value = drawn(lengths=lengths)
    row = {"segment_lengths": lengths, "softcap": softcap}
    with InFloat64():
        found, _ = padding_free_attention(None, query, key, value, None, **row)
        halved, _ = padding_free_attention(None, query, key, value, None, dropout=0.5, **row)
    wanted = value.transpose(1, 2)
    assert torch.equal(found, wanted)
    dropped = (halved == 0).all(-1)
    assert torch.equal(halved[~dropped], 2 * wanted[~dropped])
    assert 30 < dropped.sum() < 130


def test_another_conversation_changes_nothing():
    query, key, value = drawn()
    before, _ = padding_free_attention(None, query, key, value, None, segment_lengths=LENGTHS)
    others = [torch.cat([torch.randn_like(one[:, :, :6]), one[:, :, 6:]], dim=2) for one in (query, key, value)]
    after, _ = padding_free_attention(None, *others, None, segment_lengths=LENGTHS)
    assert torch.equal(before[:, 6:], after[:, 6:]) and not torch.isclose(before[:, :6], after[:, :6]).any()


@pytest.mark.parametrize("window", [None, 3])
def test_the_cost_is_that_of_each_conversation_alone(monkeypatch, window):
    calls = []

    def counting(query, key, value, **options):
        calls.append((query.shape[2], key.shape[2], value.shape[2], options["attn_mask"], options["is_causal"]))
        return real(query, key, value, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    padding_free_attention(None, *drawn(), None, segment_lengths=LENGTHS, sliding_window=window)
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
    padding_free_attention(None, **given)
    with pytest.raises(ValueError, match=message):
        padding_free_attention(None, **{**given, **changed})


# ---- torch's variable-length kernel


CALLS: list[dict] = []


def stand_in_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What the kernel's documentation says it does: position i sees j with i - left <= j <= i + right, -1: no limit."""
    CALLS.append({"query": query, "key": key, "window_size": window_size})
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


def as_in_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return stand_in_kernel(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0 if is_causal else -1)
    )


def without_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    options = {"scale": scale, "window_size": window_size}
    return stand_in_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    """The arguments of each call of the kernel, which is taken to run here."""
    CALLS.clear()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in_kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda *tensors: True)
    return CALLS


def test_the_stand_in_has_the_options_of_this_torch():
    known = inspect.signature(inspect.unwrap(varlen.varlen_attn)).parameters
    assert {"scale", "window_size", "enable_gqa"} < set(known)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}, {"sliding_window": 3}, {"sliding_window": 50}], ids=str)
@pytest.mark.parametrize("kernel", [stand_in_kernel, without_gqa, as_in_2_10])
def test_the_kernel_is_called_for_the_same_values(monkeypatch, kernel_calls, kernel, options, key_heads):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    inputs = drawn(key_heads=key_heads)
    found, _ = padding_free_attention(None, *inputs, None, **kernel_row(LENGTHS), **options)
    plain, _ = padding_free_attention(None, *inputs, None, segment_lengths=LENGTHS, **options)
    assert_alike(found, plain, inputs, 1e-12)
    window = options.get("sliding_window", 50)
    if kernel is as_in_2_10 and ("scaling" in options or window < 8):
        assert not kernel_calls
        return
    (call,) = kernel_calls
    limits = {(-1, 0)} if "sliding_window" not in options else {(window - 1, 0), (-1, 0) if window == 50 else None}
    assert call["window_size"] in limits
    assert call["query"].shape == (17, 4, 8)
    assert call["key"].shape == (17, key_heads if kernel is stand_in_kernel else 4, 8)


def test_under_autocast_the_kernel_gets_one_type(kernel_calls):
    """Norms and rotary embeddings leave queries and keys in float32, where the values are bfloat16."""
    query, key, value = drawn(key_heads=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = padding_free_attention(None, query, key, value.bfloat16(), None, **kernel_row(LENGTHS))
        looped, _ = padding_free_attention(None, query, key, value.bfloat16(), None, segment_lengths=LENGTHS)
    (call,) = kernel_calls
    assert call["query"].dtype == call["key"].dtype == found.dtype == looped.dtype == torch.bfloat16
    assert (found - looped).abs().max() < 0.02 * looped.abs().max()


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}], ids=str)
def test_the_kernel_is_not_called_for_what_it_does_not_know(kernel_calls, options):
    padding_free_attention(None, *drawn(), None, **kernel_row(LENGTHS), **options)
    assert not kernel_calls


AMPERE = dict(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 17, 64), device=torch.device("cuda:0"))


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
    assert attention.has_kernel(first, other, other) is takes
