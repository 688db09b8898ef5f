"""What bitsandbytes does without the patches: a test that fails when one is no longer needed."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from finetune.models import compat


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
