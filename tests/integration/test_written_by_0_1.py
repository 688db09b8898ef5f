"""What version 0.1 has written stays readable: run.json, a checkpoint, prepared data, samples, stored evaluations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import checkpoint
from finetune.checkpoint.torch_files import load_data
from finetune.dataset import prepared_cache
from finetune.inference.run_result import read_result
from finetune.report import read_run, render_report
from finetune.run_dir import run_json
from finetune.utils.errors import CheckpointError
from tests.helpers import ranks
from tests.helpers.paths import ROOT

OLD = ROOT / "tests" / "golden" / "written_by_0_1"


def test_a_result_and_its_report():
    for name, adapter in (("full", None), ("lora", "LORA")):
        result = read_result(OLD / name)
        assert result.adapter == adapter and result.precision == "float32" and result.chat["format"] == "lingowhale"
        assert run_json.known(OLD / name)["completed"]
    run = read_run(OLD / "full", "full")
    page = render_report([run])
    assert run.state == "complete" and run.steps == 6 and "lingowhale" in page


def test_a_checkpoint_is_verified_byte_by_byte():
    folder = OLD / "full" / "checkpoint-3"
    assert checkpoint.verify_checkpoint(folder) == []
    manifest = checkpoint.read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.position) == (3, 1, {"epoch": 1, "step": 0})


@pytest.mark.slow
def test_its_universal_form_is_written_and_nothing_outside_of_it(tmp_path):
    folder = shutil.copytree(OLD / "full" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    manifest, target = checkpoint.read_manifest(folder), checkpoint.universal_folder(tmp_path / "run", 3)
    files = checkpoint.convert_to_universal(folder, manifest, target)
    assert {f"global_step3_universal/zero/{name}/fp32.pt" for name in manifest.trained} <= set(files)
    path = next(folder.glob("global_step3/*optim_states.pt"))
    state = load_data(path)
    slices = state["optimizer_state_dict"]["param_slice_mappings"][0]
    slices["../../../../outside"] = slices.pop(next(iter(slices)))
    torch.save(state, path)
    files = checkpoint.fsync_and_hash(folder, manifest.files, 0)
    with pytest.raises(CheckpointError, match="outside.* is not written"):
        checkpoint.write_manifest(folder, replace(manifest, files=files))
        checkpoint.convert_to_universal(folder, checkpoint.read_manifest(folder), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_prepared_data_is_read():
    (folder,) = (path for path in (OLD / "prepared").iterdir() if path.is_dir())
    facts = prepared_cache.read_facts(folder)
    rows = list(prepared_cache.read_renderings(folder, ["rows.json"]))
    assert facts is not None and facts["summary"]["supervised_tokens"] == 99
    assert len(rows) == 6 and sum(example.num_supervised for row in rows for example in row.examples) == 99


def test_a_run_resumes_from_a_checkpoint_of_0_1_to_the_same_losses(tmp_path):
    """The losses of steps 4 to 6, which 0.1 logged without an interruption."""
    shutil.copytree(OLD, tmp_path / "old")
    old = tmp_path / "old"
    expected = [line["loss"] for line in lines(old / "full" / "metrics.jsonl")]
    words = (
        f"--model_name_or_path {old / 'base'} --data_path {old / 'rows.json'} --output_dir {old / 'full'} "
        f"--chat_template lingowhale --model_max_length 128 --per_device_train_batch_size 2 --num_train_epochs 2 "
        "--learning_rate 1e-2 --logging_steps 1 --save_strategy steps --save_steps 3 --save_total_limit 0 "
        "--use_cpu True --deepspeed zero2 --write_report False --resume_from_checkpoint auto"
    ).split()
    outcome = ranks.train(tmp_path / "logs", words, world_size=1)
    assert outcome.succeeded, "\n".join(outcome.outputs)
    resumed = [line["loss"] for line in lines(old / "full" / "metrics.jsonl")]
    assert len(resumed) == 6 and resumed == pytest.approx(expected, rel=1e-5)
    assert json.loads((old / "full" / "run.json").read_text())["resumed"][0]["step"] == 3


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
