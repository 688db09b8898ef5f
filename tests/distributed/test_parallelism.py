"""What DDP and a lone rank are told about gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import ranks


def gradients_of_a_lone_rank(tied: bool, told: bool) -> dict[str, torch.Tensor]:
    """One backward pass through what accelerate makes of a model, on this rank."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from finetune.training.compat import configure_ddp

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=tied))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs()])
    if told:
        configure_ddp(model, accelerator, None)
    wrapped = accelerator.prepare(model)
    assert (type(wrapped).__name__ == "DistributedDataParallel") == (not told)
    assert model.get_input_embeddings().sparse == (tied and told)
    ids = torch.tensor([[3, 3, 5, 7, 3, 60]])
    for _ in range(2):  # the second is added to the first
        wrapped(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(tied: bool) -> None:
    ours, plain = gradients_of_a_lone_rank(tied, told=True), gradients_of_a_lone_rank(tied, told=False)
    assert ours.keys() == plain.keys() and len(ours) > 10
    for name, gradient in ours.items():
        assert gradient.layout == torch.strided
        torch.testing.assert_close(gradient, plain[name])
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_lone_rank_has_the_gradients_of_ddp_without_its_copies(tmp_path, tied):
    outcome = ranks.run(tmp_path, compare, (tied,), world_size=1)
    assert outcome.succeeded, outcome.outputs
