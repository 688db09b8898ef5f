"""What a run leaves behind, what it refuses to overwrite, and what bad input becomes."""

import json
import math
import os
import re
import shutil

import pytest

from tests.helpers import ranks
from tests.helpers.short_runs import LORA, SHORT, losses
from tests.helpers.tiers import mostly_slow


@pytest.mark.parametrize("lost", mostly_slow(["loss", "grad_norm"], ["loss"]))
def test_numbers_that_are_not_finite_end_the_run_with_status_5(tmp_path, tiny_model, conversation_file, lost):
    folder = tiny_model
    if lost == "loss":  # finite weights, products that are not: the first loss already
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "broken"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"].fill_(3e38)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["--model_name_or_path", folder, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    flags = [*SHORT, "--deepspeed", "zero2", "--optim", "sgd", "--max_grad_norm", "0", "--learning_rate", "1e30"]

    outcome = ranks.train(tmp_path / "logs", [*argv, *flags])

    assert outcome.statuses[0] == 5
    said = "".join(outcome.outputs)
    assert said.count("error: step ") == 1 and re.search(rf"{lost} is (nan|inf): lower --learning_rate", said)
    assert "Traceback" not in said
    last = (tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)[lost] is None


def test_what_a_run_leaves_behind(train, tmp_path, conversation_file):
    output = train("run", "--deepspeed", "zero2", "--model_max_length", "60", "--hub_token", "hf_secret")

    run = json.loads((output / "run.json").read_text())
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (output / "data_ledger.jsonl").read_text().splitlines()]
    said = (tmp_path / "run-logs/rank-0.log").read_text()

    assert run["completed"] and run["world_size"] == 2 and run["versions"]["deepspeed"]
    assert run["data"]["summary"]["cut"] == len(ledger) == 1
    assert "the first 2 of 4 turns are kept" in ledger[0]["reason"]
    assert "hf_secret" not in (output / "run.json").read_text()
    assert len(metrics) == 6
    for entry in metrics:
        assert all(isinstance(entry[name], int | float) and math.isfinite(entry[name]) for name in entry)
        assert entry["tokens_per_second"] > entry["supervised_tokens_per_second"] > 0
        assert entry["peak_memory_bytes"] > 100e6
    assert "auto" not in json.dumps(run["deepspeed"])
    assert "1 per device x 1 accumulated x 2 ranks = 2 examples" in said and "6 steps (2 epochs)" in said
    assert "loss by step" in said and "Next:" in said
    assert (tmp_path / "run-logs/rank-1.log").read_text().count("Plan") == 0

    repeated = tmp_path / "repeated"
    outcome = ranks.train(tmp_path / "logs", ["--config", output / "run.json", "--output_dir", repeated])
    assert outcome.succeeded, outcome.outputs[0]
    assert losses(repeated) == pytest.approx(losses(output), abs=1e-6)


def test_an_earlier_run_is_never_overwritten_silently(train, tmp_path, tiny_model, conversation_file):
    output = train("run", *LORA, "--deepspeed", "zero2", world_size=1)
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    again = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output, *SHORT]

    refused = ranks.train(tmp_path / "refused", [*again, "--deepspeed", "zero2"], 1)
    assert refused.statuses[0] == 2
    assert "already holds a run, nothing was changed" in refused.outputs[0]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written

    moved = ranks.train(tmp_path / "moved", [*again, "--deepspeed", "zero2", "--overwrite_output_dir", "True"], 1)
    assert moved.succeeded, moved.outputs[0]
    (aside,) = output.parent.glob("run.before-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == written
    assert (output / "model.safetensors").is_file()


def test_a_run_that_never_made_a_step_does_not_stand_in_the_way(tmp_path, tiny_model, conversation_file):
    argv = [
        "--model_name_or_path",
        tiny_model,
        "--data_path",
        conversation_file,
        "--output_dir",
        tmp_path / "out",
        *SHORT,
    ]
    refused = ranks.train(tmp_path / "refused", [*argv, "--deepspeed", "zero2", "--optim", "adalomo"], 1)
    assert refused.statuses == [2]
    assert "error: --optim adalomo: " in refused.outputs[0]
    assert "Traceback" not in refused.outputs[0]
    assert ranks.train(tmp_path / "again", [*argv, "--deepspeed", "zero2"], 1).succeeded


def test_a_run_that_learned_nothing_does_not_report_success(tmp_path, tiny_model, conversation_file):
    flags = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    warming_up = ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "10", "--max_steps", "1")
    outcome = ranks.train(tmp_path / "logs", [*flags, *SHORT, *LORA, "--deepspeed", "zero2", *warming_up], world_size=1)
    assert outcome.statuses == [4]
    assert "LoRA B matrices are still zero" in outcome.outputs[0]
    assert "Traceback" not in outcome.outputs[0]


BAD_INPUT = {
    "no data file": (3, "nothing.json: there is no such file", {"--data_path": "nothing.json"}),
    "bad JSON": (3, "bad.json, line 1, column", {"--data_path": "bad.json"}),
    "empty file": (3, "empty.json: the file is empty", {"--data_path": "empty.json"}),
    "unknown role": (3, 'role.json, row 0, turn 0: expected "from" to be human', {"--data_path": "role.json"}),
    "no model turn": (3, "human.json, row 0: has no model turn", {"--data_path": "human.json"}),
    "no model": (2, "/no/such/model: there is no such folder", {"--model_name_or_path": "/no/such/model"}),
    "no such name": (
        2,
        "some/body: no such folder",
        {"--model_name_or_path": "some/body"},
    ),
    "no config": (2, "--deepspeed zero9: there is no such file", {"--deepspeed": "zero9"}),
    "unknown flag": (2, "unknown flag --learning_rat: did you mean --learning_rate?", {"--learning_rat": "1"}),
    "mismatch": (
        2,
        "train_batch_size is 7, but 1 per device x 1 accumulated x 2 ranks is 2",
        {"--deepspeed": "ds.json"},
    ),
    "too short": (3, "all 6 rows are dropped", {"--model_max_length": "3"}),
    "no evaluation data": (2, "--eval_strategy: needs held-out conversations", {"--eval_strategy": "epoch"}),
    "bad value": (2, "--lr_scheduler_type wavy: ", {"--lr_scheduler_type": "wavy"}),
    "liger on a CPU": (2, "--use_liger_kernel True: its kernels need a GPU", {"--use_liger_kernel": "True"}),
    "a step that changes": (2, "--auto_find_batch_size True", {"--auto_find_batch_size": "True"}),
    "unknown order": (2, "expected random, sequential", {"--train_sampling_strategy": "backwards"}),
    "two sizes of a batch": (2, "exclude each other", {"--tokens_per_device_batch": "500"}),
    "checkpointing": (
        2,
        "expected a JSON object",
        {"--activation_checkpointing": "True", "--activation_checkpointing_kwargs": "often"},
    ),
}


@pytest.mark.parametrize(
    "name", mostly_slow(BAD_INPUT, ["bad JSON", "no config", "unknown flag", "mismatch", "too short"])
)
def test_bad_input_is_one_clear_error(tmp_path, tiny_model, conversation_file, name):
    status, message, changed = BAD_INPUT[name]
    (tmp_path / "bad.json").write_text('[{"conversations": ]')
    (tmp_path / "empty.json").write_text(" \n")
    (tmp_path / "role.json").write_text('[{"conversations": [{"from": "robot", "value": "x"}]}]')
    (tmp_path / "human.json").write_text('[{"conversations": [{"from": "human", "value": "x"}]}]')
    (tmp_path / "ds.json").write_text('{"train_batch_size": 7, "zero_optimization": {"stage": 2}}')
    flags = {
        "--model_name_or_path": tiny_model,
        "--data_path": conversation_file,
        "--output_dir": tmp_path / "out",
        "--per_device_train_batch_size": "1",
        "--deepspeed": "zero2",
    }
    in_folder = {flag: tmp_path / value if value.endswith(".json") else value for flag, value in changed.items()}
    argv = [word for pair in {**flags, **in_folder}.items() for word in pair]

    outcome = ranks.train(tmp_path / "logs", argv)

    assert outcome.statuses[0] == status
    said = "".join(outcome.outputs)
    assert said.count("error: ") == 1 and message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")
