"""The loss of a head under ZeRO: gradients are those of all ranks' logits, whatever each rank's number of chunks."""

import copy
from typing import Any

import torch
import torch.nn.functional as F

from tests.helpers import ranks, tiny_models
from tests.helpers.lora import attach_lora

LENGTH, VOCAB_SIZE = 12, tiny_models.VOCAB_SIZE
# In the second micro-batch one rank has no target.
TARGETS = [(slice(2, 12), slice(11, 12)), (slice(3, 8), slice(12, 12))]


def with_lora(targets: list[str], **options: Any) -> Any:
    model = attach_lora(tiny_models.build("llama"), r=2, alpha=4, dropout=0.0, target_modules=targets, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


MODELS = {
    "plain": lambda: tiny_models.build("llama"),
    "tied, capped": lambda: tiny_models.build("gemma2", tie_word_embeddings=True, final_logit_softcapping=2.0),
    "LoRA on the head": lambda: with_lora(["q_proj", "lm_head"]),
    "LoRA, head saved whole": lambda: with_lora(["q_proj"], modules_to_save=["lm_head"]),
}


def row(rank: int, part: slice) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(rank))
    labels = torch.full_like(ids, -100)
    labels[part] = ids[part]
    return {"input_ids": ids.numpy(), "labels": labels.numpy()}


def gradients_of_all_logits(model: Any, parts: tuple[slice, slice]) -> dict[str, torch.Tensor]:
    total: Any = 0.0
    for rank, part in enumerate(parts):
        ids, labels = (torch.from_numpy(value) for value in row(rank, part).values())
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    return dict(zip(trained, torch.autograd.grad(total / 2, trained.values()), strict=True))  # a mean over ranks


def compare(stage: int, name: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from finetune.dataset.collator import Collator, pop_targets
    from finetune.models import loss as loss_module
    from finetune.models.loss_head import enable_loss_head
    from finetune.models.module_kinds import module_kinds, unwrap_adapter
    from finetune.models.zero3 import set_leaf_modules

    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    loss_module.HEAD_BYTES = 4 * VOCAB_SIZE * 2
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    if stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        empty = unwrap_adapter(reference)
        set_leaf_modules(model, module_kinds(empty), empty)
    collate = Collator(flat=False, pad_token_id=0, selects_logits=True)
    assert enable_loss_head(model, collate, vocab_size=VOCAB_SIZE, device="cpu") is None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=config)
    for parts in TARGETS * 2:
        batch = collate([row(rank, parts[rank])])
        targets = pop_targets(batch)
        loss, outputs = loss_module.supervised_loss(engine, {**batch, "use_cache": False}, targets, scale=1.0)
        assert outputs.logits.shape == (1, 0, VOCAB_SIZE)
        engine.backward(loss)
        wanted = gradients_of_all_logits(reference, parts)
        found = {key: safe_get_full_grad(own) for key, own in model.named_parameters() if own.requires_grad}
        assert found.keys() == wanted.keys()
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for key, gradient in wanted.items():
            assert (found[key] - gradient).abs().max() <= 1e-5 * largest, (name, key)
        engine.step()


def compare_all() -> None:
    for name in MODELS:
        compare(3, name)
    for stage in (1, 2):
        compare(stage, "tied, capped")
        compare(stage, "LoRA on the head")


def test_gradients_are_those_of_all_logits(tmp_path):
    outcome = ranks.run(tmp_path, compare_all, ())
    assert outcome.succeeded, "\n".join(outcome.outputs)
