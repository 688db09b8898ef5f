"""The workarounds for library internals are still needed, and still find what they touch."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from transformers import MixtralConfig


def test_deepspeed_copies_a_script_into_checkpoints():
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "self._copy_recovery_script(" in inspect.getsource(DeepSpeedEngine)


def test_deepspeed_shares_optimizer_state_between_groups_when_stage_3_loads_a_universal_checkpoint():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3)
    assert "['state'][0]['step']" in source and '["param_groups"][0].items()' in source


def test_accelerate_adapts_dataloaders_for_ulysses_and_keeps_a_flag_for_skipped_steps():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    assert callable(Accelerator.deepspeed_ulysses_dl_adapter)
    assert "return self._is_overflow" in inspect.getsource(AcceleratedOptimizer.step_was_skipped.fget)


def test_a_plain_optimizer_steps_on_gradients_that_are_not_finite():
    from finetune.training.compat import skip_nonfinite_steps

    def step(guarded: bool) -> tuple[float, list[bool]]:
        weight, skipped = torch.ones(1, requires_grad=True), []
        wrapped = _Wrapped(torch.optim.SGD([weight], lr=1.0))
        if guarded:
            skip_nonfinite_steps(wrapped, torch.nn.Identity(), skipped.append)
        weight.grad = torch.full((1,), float("nan"))
        wrapped.optimizer.step()
        return weight.item(), skipped

    changed, _ = step(guarded=False)
    assert changed != changed, "torch skips the step itself: the workaround is no longer needed"
    assert step(guarded=True) == (1.0, [True])


@pytest.mark.parametrize(
    ("experts", "adapter", "asked", "searches"),
    [(0, True, None, False), (4, True, None, True), (0, False, None, True), (0, True, True, True)],
)
def test_ddp_searches_for_unused_adapter_weights_only_where_there_may_be_some(experts, adapter, asked, searches):
    from finetune.training.compat import configure_ddp

    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(), ddp_handler=handler, num_processes=2)
    config = MixtralConfig(num_local_experts=experts)
    configure_ddp(SimpleNamespace(config=config, **({"peft_config": {}} if adapter else {})), accelerator, asked)
    assert handler.find_unused_parameters is searches and handler.gradient_as_bucket_view


class _Wrapped:
    """What accelerate puts around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._is_overflow = optimizer, False


def test_a_tied_embedding_has_sparse_gradients_unless_the_model_is_compiled():
    from accelerate.utils import DynamoBackend

    from finetune.training.compat import configure_ddp
    from tests.helpers import tiny_models

    for backend, sparse in ((DynamoBackend.NO, True), (DynamoBackend.INDUCTOR, False)):
        model = tiny_models.build("llama", tie_word_embeddings=True)
        state = SimpleNamespace(deepspeed_plugin=None, dynamo_plugin=SimpleNamespace(backend=backend))
        accelerator = SimpleNamespace(
            state=state, ddp_handler=SimpleNamespace(), num_processes=1, device=torch.device("cpu")
        )
        configure_ddp(model, accelerator, None)
        assert model.get_input_embeddings().sparse is sparse


def test_weights_gradients_and_optimizer_states_are_freed_whatever_refers_to_them():
    from finetune.training.compat import free_training_memory

    model, asked = torch.nn.Linear(3, 2), []
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    wrapped = _Wrapped(optimizer)
    wrapped.optimizer.flat_groups, model.weight.ds_tensor = [{"fp32": torch.ones(6)}], torch.ones(4)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    held = [*model.parameters(), *states, optimizer.flat_groups[0]["fp32"], model.weight.ds_tensor]
    assert [tensor.numel() for tensor in held] == [6, 2, 6, 6, 2, 2, 6, 4] and model.weight.grad is not None

    free_training_memory(model, wrapped, SimpleNamespace(free_memory=lambda: asked.append(True)))
    assert asked and not any(tensor.numel() for tensor in held)
    assert all(parameter.grad is None for parameter in model.parameters())
