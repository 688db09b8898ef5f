"""What bitsandbytes and transformers do without the patches: a test that fails when one is no longer needed."""

from inspect import unwrap
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import masking_utils
from transformers.core_model_loading import Split, Transpose

from finetune.models import compat, segments


def packed(cls, **options):
    layer = cls(32, 32, bias=False, **options)
    layer.weight.requires_grad_(False)
    return layer.to("cpu")


def test_a_forward_pass_without_gradients_repacks_4_bits_on_some_processors():
    layer = packed(Linear4bit, quant_type="nf4").eval()
    before = layer(torch.ones(1, 32, requires_grad=True)).detach()
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(RuntimeError, match="shape"), torch.no_grad():
        layer(torch.ones(1, 32))
    compat.keep_packing()
    again = packed(Linear4bit, quant_type="nf4").eval()
    with torch.no_grad():
        assert again(torch.ones(1, 32)).shape == before.shape and not again.support_avx512bf16_for_cpu


@pytest.mark.parametrize("layer", [packed(Linear4bit), packed(Linear8bitLt, has_fp16_weights=False)], ids=["4", "8"])
def test_the_state_of_a_packed_layer_holds_scales_beside_its_weight(layer):
    model = torch.nn.Sequential(layer)
    assert len(model.state_dict()) > 1
    compat.leave_scales_out(model)
    assert list(model.state_dict()) == ["0.weight"]


def test_8_bit_layers_refuse_inputs_of_four_dimensions_and_mix_the_tokens_of_a_row():
    layer, inputs = packed(Linear8bitLt, has_fp16_weights=False, threshold=6.0).eval(), torch.randn(1, 2, 3, 32)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            unwrap(Linear8bitLt.forward)(layer, inputs)
        compat.flatten_inputs_of_8_bits()
        expected = layer(inputs.view(6, 32))
        torch.testing.assert_close(layer(inputs), expected.view(1, 2, 3, 32))
        inputs[:, 1:] *= 100
        assert not torch.equal(layer(inputs)[0, 0], expected[:3])
        with compat.each_row_alone(layer):
            assert torch.equal(layer(inputs)[0, 0], layer(inputs[0, 0]))
        assert layer.state.threshold == 6.0


@pytest.mark.parametrize(
    ("operation", "targets", "shapes"),
    [(Transpose(0, 1, check_dims=True), ["a"], [(4, 2)]), (Split(), "ab", [(3, 2), (1, 2)])],
)
def test_weights_are_converted_by_the_shapes_of_partitions(operation, targets, shapes, monkeypatch):
    """Each weight of the memory lies in the files as it is, or joined with the other."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.empty(0)) for name in targets})
    for name, shape in zip(targets, shapes, strict=True):
        model[name].ds_shape = torch.Size(shape)
    stored, names = torch.arange(8.0).reshape(4, 2), {"source_patterns": ["s"], "target_patterns": [*targets]}

    def convert() -> list[tuple[int, ...]]:
        converted = operation.convert({"s": stored}, full_layer_name="a", model=model, **names)
        return [tuple(weight.shape) for weight in converted.values()]

    for patched in (Split, Transpose):  # both are taken back after the test
        monkeypatch.setattr(patched, "convert", unwrap(patched.convert))
    try:
        by_partitions = convert()
    except RuntimeError:  # split into parts of no rows
        by_partitions = []
    assert by_partitions != shapes
    compat.convert_by_whole_shapes.__wrapped__()
    assert convert() == shapes


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "sdpa"])
def test_the_mask_of_a_flat_row_is_made_without_looking_at_values_under_flash_attention(attention):
    """Tensors without values stand for those of a GPU, for whose values the host would wait."""
    config = SimpleNamespace(_attn_implementation=attention, is_causal=True)
    row = torch.empty(1, 5, 8, device="meta"), None, None, torch.empty(1, 5, dtype=torch.int64, device="meta")

    def mask():
        return masking_utils.create_causal_mask(config, *row)

    compat.make_masks_without_waiting()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        mask()  # not a flat row
    with segments._row([3, 2]):
        if attention == "sdpa":
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                mask()
        else:
            assert mask() is None
