"""Bases in 4 and 8 bits on real ranks: losses, resuming, serving, and merging into the base as it is stored."""

import json

import pytest
import torch

from finetune import read_conversations, render
from finetune import train as main
from finetune.export.model_merge import merge_weights, plan_merge
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.models.quantization import is_packed
from finetune.utils.errors import ConfigError
from tests.helpers import runs
from tests.helpers.short_runs import LORA, losses

BITS = {4: ("--load_in_4bit", "True", *LORA), 8: ("--load_in_8bit", "True", *LORA)}


def test_the_loss_is_that_of_plain_transformers_and_the_result_is_merged_into_the_base_as_stored(
    train, tiny_model, conversation_file, tmp_path, smol_tokenizer
):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    output = train("whole", *BITS[4], "--per_device_train_batch_size", "6", "--save_strategy", "epoch", world_size=1)
    plan = json.loads((output / "run.json").read_text())["plan"]
    assert (plan["batching"], plan["selects_logits"], plan["base_bits"]) == ("flat", True, 4)
    assert plan["parameters"] > 3_000_000  # packed weights count as what they are made from

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, dtype=torch.float32)
    total = count = 0.0
    for row in render(read_conversations(conversation_file), smol_tokenizer):
        ids, labels = (torch.tensor([values]) for values in (row.examples[0].input_ids, row.examples[0].labels))
        supervised = int((labels[:, 1:] != -100).sum())
        total, count = total + base.train()(input_ids=ids, labels=labels).loss.item() * supervised, count + supervised
    assert losses(output)[0] == pytest.approx(total / count, abs=1e-5)

    base.eval().save_pretrained(tmp_path / "packed")
    smol_tokenizer.save_pretrained(tmp_path / "packed")
    stored = train("stored", *LORA, "--per_device_train_batch_size", "6", world_size=1, model=tmp_path / "packed")
    assert losses(stored)[0] == pytest.approx(losses(output)[0], abs=1e-5)
    with pytest.raises(ConfigError, match="quantized weights cannot be trained: add --use_lora True"):
        main(model_name_or_path=tmp_path / "packed", data_path=conversation_file, output_dir=tmp_path / "full")

    loaded = load_for_inference(read_result(output))
    assert any(map(is_packed, loaded.tuned.parameters()))
    merged = merge_weights(plan_merge(read_result(output), tmp_path / "merged", base_name=None, dtype=None),
                           shard_bytes=1 << 30)  # fmt: skip
    assert "its logits are those of what was trained" in merged.checked
    stored, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, tmp_path / "merged"))
    for name, weight in stored.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]) != ("proj" in name), name


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "stages"), [(4, ("zero3", "zero2")), (8, ("zero2", "zero1"))])
def test_stages_give_the_same_losses_and_a_resumed_run_ends_in_the_same_bits(train, bits, stages, tmp_path):
    stage, other = stages
    flags = ("--deepspeed", stage, *BITS[bits], "--save_strategy", "steps", "--save_steps", "3")
    whole = train("whole", *flags)
    assert len(losses(whole)) == 6 and losses(whole)[-1] < losses(whole)[0] - 0.1
    assert losses(train("other", "--deepspeed", other, *BITS[bits])) == pytest.approx(losses(whole), abs=1e-5)
    resumed = train("resumed", *flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"))
    assert losses(resumed) == losses(whole)[3:]
    assert runs.result_of(resumed)[0] == runs.result_of(whole)[0]
