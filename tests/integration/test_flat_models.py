"""Models over flat rows: which run so, which are told that they cannot, and that a leak is caught."""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, BertConfig, BertLMHeadModel, modeling_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from finetune.models import attention, padding_free
from finetune.models.attention import FLAT_ATTENTION, padding_free_attention, supports_logits_to_keep
from finetune.models.padding_free import LEAK, check_causal, enable_padding_free
from finetune.models.segments import by_segment_note
from finetune.utils.errors import ConfigError
from tests.helpers.flat_rows import LENGTHS, boundaries, kernel_row
from tests.helpers.logs import logged
from tests.helpers.lora import attach_lora
from tests.helpers.tiers import mostly_slow
from tests.helpers.tiny_models import CHUNK, LONGEST, SIZES, VOCAB_SIZE, WINDOW, build

FLAT = "llama qwen3 mistral gemma gemma2 gemma3 mixtral phi phi3 gpt_neox gpt2 opt gpt_oss deepseek_v3 stablelm".split()


REFUSED = {
    "gptj": "its code does not take attention functions from transformers",
    "llama4": f"its attention works in chunks of {CHUNK} tokens (config: attention_chunk_size)",
}


def flattened(model: Any, longest: int = LONGEST, **options: Any) -> str | None:
    return enable_padding_free(model, longest=longest, vocab_size=VOCAB_SIZE, device="cpu", **options)


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
    assert AttentionInterface()[FLAT_ATTENTION] is padding_free_attention


@pytest.mark.parametrize("family", mostly_slow(FLAT, ["llama", "gemma3", "mixtral", "gpt2", "gpt_oss"]))
def test_families_that_run_flat(family):
    model = build(family)
    stock = copy.deepcopy(model)
    assert flattened(model) is None
    assert model.config._attn_implementation == FLAT_ATTENTION and model.training
    assert AttentionInterface()[FLAT_ATTENTION] is padding_free_attention
    assert same_logits(model, stock, [LONGEST, 3, 11, 1])


@pytest.mark.parametrize("family", ["bloom", "falcon", "doge"])
def test_attention_that_reads_a_mask_runs_by_segment(family):
    model = build(family)
    stock = copy.deepcopy(model)
    assert flattened(model) is None
    note = f"2 {type(model).__name__.removesuffix('ForCausalLM')}Attention computed conversation by conversation"
    assert by_segment_note(model).startswith(note) and model.config._attn_implementation != FLAT_ATTENTION
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
    assert attention.unsupported_config_reason(config, CHUNK) is None
    assert "chunks of 8 tokens" in attention.unsupported_config_reason(config, CHUNK + 1)
    for family in ("mistral", "gemma2"):
        config = build(family).config
        assert (
            attention.sliding_window_of(config, WINDOW) is None
            and attention.sliding_window_of(config, WINDOW + 1) == WINDOW
        )
    config.layer_types = ["full_attention", "full_attention"]
    assert attention.sliding_window_of(config, LONGEST) is None


def test_logits_can_be_selected_in_models_of_transformers():
    assert all(supports_logits_to_keep(build(family)) for family in FLAT)
    assert supports_logits_to_keep(attach_lora(build("llama"), r=2, alpha=4, dropout=0.0, target_modules=["q_proj"]))
    assert not supports_logits_to_keep(torch.nn.Linear(1, 1))


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
def test_layers_that_ignore_boundaries_run_by_segment(spoil, layers):
    model = build("llama", num_hidden_layers=4)
    for layer in model.model.layers[layers]:
        spoil(layer)
    stock = copy.deepcopy(model)
    assert flattened(model) is None and same_logits(model, stock, [LONGEST, 3, 11])


@pytest.mark.parametrize("share", [1e-1, 1e-4, 1e-7])
def test_a_leak_outside_of_the_layers_is_caught(share):
    """One token leaks into the next conversation: at last by so little that only its gradient shows."""
    model = build("llama")
    model.model.norm.register_forward_hook(lambda _, args, states: states + share * F.pad(states, (0, 0, 1, -1)))
    with left_as_it_was(model):
        assert flattened(model).startswith(LEAK)


def test_a_leak_that_has_no_gradient_is_caught():
    model = build("llama")
    inner = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: inner(ids) + 1e-2 * F.pad(inner(ids), (0, 0, 1, -1))
    with left_as_it_was(model):
        assert flattened(model).startswith(LEAK)


def test_a_trial_that_would_not_show_a_leak_is_no_proof():
    model = build("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with left_as_it_was(model):
        assert "could not show whether conversations are separate" in flattened(model)


def test_a_window_that_is_not_handed_on_is_caught():
    model = build("llama", sliding_window=WINDOW)  # a field that Llama's code does not read
    stock = copy.deepcopy(model)
    with left_as_it_was(model):
        assert flattened(model, shared=True) == "its sliding window of 4 tokens does not reach the attention"
    assert flattened(model) is None and "2 LlamaAttention" in by_segment_note(model)
    assert same_logits(model, stock, [LONGEST, 3, 11])
    assert flattened(stock, longest=WINDOW) is None and by_segment_note(stock) is None


@pytest.mark.parametrize(
    "error",
    mostly_slow(
        [TypeError, ValueError, RuntimeError, IndexError, KeyError, AssertionError], [RuntimeError, AssertionError]
    ),
)
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


def test_attention_that_computes_something_else_is_the_models_own(monkeypatch):
    """Llama's eager attention gets a soft cap of its own here, of which no argument tells: 20 % of long logits."""
    capped = partial(modeling_gemma2.eager_attention_forward, softcap=5.0)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped)
    model = build("llama", attention="eager")
    stock = copy.deepcopy(model)
    assert flattened(model) is None and "2 LlamaAttention" in by_segment_note(model)
    assert same_logits(model, stock, [LONGEST, 3, 11])


def test_scales_by_the_place_in_the_row_are_those_of_single_conversations():
    """Llama 4 scales queries by their place in the row, whatever position_ids say, from place `floor_scale` on."""
    scales = {"attn_temperature_tuning": True, "floor_scale": 20, "attn_scale": 0.5, "no_rope_layers": [1, 0]}
    model = build("llama4", attention_chunk_size=64, **scales)
    stock = copy.deepcopy(model)
    assert flattened(model) is None and same_logits(model, stock, [LONGEST, 3, 11])


def test_ranks_end_up_alike(monkeypatch):
    monkeypatch.setattr("finetune.models.padding_free.first_not_none", lambda reason: reason or "another rank's")
    model = build("llama")
    with left_as_it_was(model):
        assert flattened(model).startswith("another rank's")


@pytest.mark.parametrize("obeys", [True, False], ids=["obeys", "ignores"])
def test_flash_attention_is_kept_where_it_obeys_the_boundaries(monkeypatch, obeys):
    def flash_stand_in(module, query, key, value, attention_mask, cu_seq_lens_q=None, **options):
        lengths = cu_seq_lens_q.diff().tolist() if obeys and cu_seq_lens_q is not None else [query.shape[2]]
        return padding_free_attention(module, query, key, value, None, **{**options, "segment_lengths": lengths})

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_stand_in)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *names, **options: None)
    model = build("llama")
    model.set_attn_implementation("flash_stand_in")
    assert flattened(model) is None and by_segment_note(model) is None
    assert model.config._attn_implementation == ("flash_stand_in" if obeys else FLAT_ATTENTION)
    if obeys:
        with torch.no_grad():
            assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()  # as for an answer
    assert same_logits(model, build("llama"), LENGTHS)
    with pytest.raises(ValueError, match="attention mask"):
        model(**flat_row(LENGTHS), attention_mask=torch.ones(1, 17))


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "computes-something-else"])
def test_a_kernel_that_fails_is_replaced_by_the_loop(monkeypatch, raises):
    def broken(query, *arguments, scale=None, window_size=None, enable_gqa=False):
        if raises:
            raise RuntimeError("no kernel image is available")
        return torch.ones_like(query)

    for module in (attention, padding_free):
        monkeypatch.setattr(module, "has_kernel", lambda *states: True)
    monkeypatch.setattr(varlen, "varlen_attn", broken)
    model = build("llama")
    with logged() as messages:
        assert flattened(model) is None
    assert "fallback to attention by one conversation at a time" in messages[0] and by_segment_note(model) is None
    assert same_logits(model, build("llama"), LENGTHS)


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

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    model = build("gpt_oss")  # its attention holds parameters itself: the sinks
    held_by_all = list(model.parameters())
    for number, parameter in enumerate(held_by_all):
        parameter.ds_id = number
    if fails:
        monkeypatch.setattr(attention, "_attend_unfused", None)
    reason = flattened(model)
    assert reason is None or (fails and "argument must be callable" in reason)
    assert 0 < most < 16 < len(held_by_all) and not held


def test_a_model_that_reads_what_it_is_to_predict_is_refused():
    options = {"vocab_size": VOCAB_SIZE, "device": "cpu", "autocast": "float32"}
    for is_causal in (True, False):
        config = BertConfig(**SIZES, is_decoder=is_causal)
        with nullcontext() if is_causal else pytest.raises(ConfigError, match="attend to later ones"):
            check_causal(BertLMHeadModel(config), **options)


def test_another_expert_at_one_place_is_no_look_at_later_tokens():
    model, runs = build("llama"), iter(range(2))

    def change_third_place(_: Any, __: Any, logits: torch.Tensor) -> None:
        logits[:, 2] += 9 * next(runs)

    model.lm_head.register_forward_hook(change_third_place)
    check_causal(model, vocab_size=VOCAB_SIZE, device="cpu", autocast="float32")
    assert next(runs, None) is None
