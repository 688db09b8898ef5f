"""What real runs leave, merged: ZeRO checkpoints of any stage and ranks, an adapter that answers as before."""

import shutil
import subprocess
import warnings

import pytest
import torch

from finetune.checkpoint import MasterWeights
from finetune.export import model_merge
from finetune.inference.run_result import read_result
from finetune.models.stored_tensors import StoredTensors
from finetune.utils.errors import CheckpointError
from tests.helpers.made_results import logits
from tests.helpers.tiers import mostly_slow
from tests.helpers.verbs import finetune_text

SAVING = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "0")
IDS = (1, 4093, 198, 28120, 346, 47, 2)


def merge(*words: object) -> subprocess.CompletedProcess:
    return finetune_text("merge", *words)


@pytest.fixture
def elsewhere(tmp_path):
    """The checkpoint and run.json alone, on a machine where nothing was trained."""

    def moved(output, name: str):
        other = tmp_path / "elsewhere"
        other.mkdir()
        shutil.copy(output / "run.json", other)
        shutil.move(output / name, other / name)
        shutil.rmtree(output)
        return other / name

    return moved


@pytest.mark.parametrize(("stage", "ranks"), mostly_slow([("zero1", 1), ("zero2", 2), ("zero3", 2)], [("zero3", 2)]))
def test_a_checkpoint_of_any_stage_and_ranks_becomes_a_model(train, elsewhere, stage, ranks, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForCausalLM

    output = train(stage, "--deepspeed", stage, *SAVING, world_size=ranks)
    last = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2", dtype=torch.float32)
    first = elsewhere(output, "checkpoint-1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = get_fp32_state_dict_from_zero_checkpoint(str(first))

    masters = MasterWeights(first)
    assert (masters.stage, masters.world_size) == (int(stage[-1]), ranks)
    assert set(masters.shapes) == set(wanted) - {"lm_head.weight"} and len(wanted) > 10
    assert all(torch.equal(masters.get(name), wanted[name]) for name in masters.shapes)

    plan = model_merge.plan_merge(read_result(first), tmp_path / "merged", base_name=None, dtype="float32")
    assert f"the float32 weights of {ranks} ranks" in plan.origin
    merged = model_merge.merge_weights(plan, shard_bytes=10**6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "the first choice is the same at" in merged.checked
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.named_parameters())
    assert not torch.equal(logits(model, IDS), logits(last, IDS)), "it is the first checkpoint"
    assert set(StoredTensors(tmp_path / "merged")) == set(masters.shapes)
    as_saved = model_merge.plan_merge(read_result(first), tmp_path / "other", base_name=None, dtype=None)
    assert {tensor.name for tensor in as_saved.tensors} == set(masters.shapes), "a tied head is stored once"


@pytest.mark.slow
def test_a_part_that_is_missing_or_damaged_is_told(train, tmp_path):
    output = train("zero3", "--deepspeed", "zero3", *SAVING)
    folder = output / "checkpoint-2"
    states = folder / "global_step2"
    whole = shutil.copytree(output, tmp_path / "whole") / "checkpoint-2" / "global_step2"

    path = states / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    done = merge(folder, tmp_path / "merged")
    assert done.returncode == 4 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert path.name in done.stderr and not (tmp_path / "merged").exists()

    (whole / path.name).unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} cannot be read: No such file"):
        MasterWeights(whole.parent)
    (folder / "manifest.json").unlink()
    done = merge(folder, tmp_path / "merged")
    assert done.returncode == 4 and "manifest.json" in done.stderr


def test_an_adapter_trained_by_two_ranks_answers_the_same_once_merged(train, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = ("--use_lora", "True", "--new_tokens", "<look>", "--learning_rate", "2e-2", "--max_steps", "4")
    output = train("lora", "--deepspeed", "zero3", *lora)

    done = merge(output)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "output/merged: " not in done.stderr
    folder = output / "merged"
    assert "its logits are those of what was trained" in done.stdout and str(folder) in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<look>") == [49152]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you? 你是谁？"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    adapted = AutoPeftModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    answers = [one.generate(**prompt, max_new_tokens=40, do_sample=False) for one in (adapted.eval(), plain.eval())]
    assert torch.equal(*answers)
    again = merge(output)
    assert again.returncode == 2 and "exists and is not replaced" in again.stderr
