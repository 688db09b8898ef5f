"""The real `deepspeed` launcher, in a subprocess, from an uninstalled clone: what a user types and what comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.published_command import LIMIT_SECONDS, launch
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.verbs import finetune_text

# DESIGN: the main command line as it was published; only names and paths are filled in.
PUBLISHED = (
    "--model_max_length 2048 --num_train_epochs 4 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
    "--save_strategy epoch --learning_rate 2e-5 --lr_scheduler_type constant --adam_beta1 0.9 --adam_beta2 0.98 "
    "--adam_epsilon 1e-8 --max_grad_norm 1.0 --weight_decay 1e-4 --warmup_ratio 0.0 --logging_steps 1 "
    "--gradient_checkpointing True --bf16 True --tf32 True --report_to none"
).split()


def test_the_published_command_runs_verbatim_on_two_ranks(tiny_model, conversation_file, tmp_path):
    output = tmp_path / "output"
    named = ("--data_path", conversation_file, "--model_name_or_path", tiny_model, "--output_dir", output)
    done = launch(
        "--hostfile=",
        "--num_gpus",
        "2",
        "finetune/finetune.py",
        *named,
        *PUBLISHED,
        "--deepspeed",
        "finetune/ds_config.json",
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert sorted(one.name for one in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert "note: the newest 2 checkpoints are kept" in done.stdout
    assert "note: --tf32 is off" in done.stdout
    assert done.stdout.count("\nPlan\n") == 1
    assert "stage 3" in done.stdout and "16 per device x 1 accumulated x 2 ranks = 32 examples" in done.stdout
    ours = [
        line for line in (done.stdout + done.stderr).splitlines() if "launch.py" not in line and "runner.py" not in line
    ]
    assert [line for line in ours if "Warning" in line or "deprecated" in line or "Traceback" in line] == []


@pytest.mark.slow
def test_a_hostfile_of_this_host_and_a_module_launch_from_another_folder(tiny_model, conversation_file, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    named = ("--data_path", conversation_file, "--model_name_or_path", tiny_model, "--output_dir", "output")
    flags = "--use_lora True --deepspeed zero2 --max_steps 2 --logging_steps 1 --save_strategy no".split()

    done = launch(
        f"--hostfile={hostfile}",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--module",
        "finetune.train",
        *named,
        *flags,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "output/run.json").read_text())["world_size"] == 2
    assert (tmp_path / "output/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_plain_python_and_torchrun_work_too(launcher, tiny_model, conversation_file, tmp_path):
    named = ["--data_path", conversation_file, "--model_name_or_path", tiny_model, "--output_dir", tmp_path / "output"]
    flags = "--deepspeed zero3 --max_steps 1 --save_strategy no".split()
    start = (
        [sys.executable] if launcher == "python" else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }

    done = subprocess.run(
        [*start, ROOT / "finetune/finetune.py", *named, *flags],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "output/run.json").read_text())["completed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        (("--learning_rat", "1"), 2, "unknown flag --learning_rat: did you mean --learning_rate?"),
        (("--data_path", "finetune/data/coig_10k.json"), 3, "COIG's 10,000 conversations are not part of this project"),
    ],
    ids=["usage", "data"],
)
def test_the_launcher_passes_the_exit_status_on_and_the_error_is_said_once(
    changed, status, message, tiny_model, conversation_file, tmp_path
):
    named = ("--data_path", conversation_file, "--model_name_or_path", tiny_model, "--output_dir", tmp_path / "output")
    done = launch("--num_gpus", "2", "finetune/finetune.py", *named, "--deepspeed", "zero2", *changed)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert said.count("error: ") == 1 and message in said
    assert "Traceback" not in said
    assert not (tmp_path / "output").exists()


class TestPreview:
    def preview(self, *flags: str | Path) -> subprocess.CompletedProcess:
        return finetune_text("preview", *flags)

    def test_json_lines_hold_the_golden_labels(self, golden_tokenizer, tmp_path):
        golden_tokenizer.save_pretrained(tmp_path / "tokenizer")
        golden = [json.loads(line) for line in (ROOT / "tests/golden/lingowhale_labels.jsonl").read_text().splitlines()]
        rows = [[(turn["from"], turn["value"]) for turn in row["conversations"]] for row in golden]

        done = self.preview(
            "--model_name_or_path", tmp_path / "tokenizer", "--data_path", write_rows(tmp_path / "rows.json", rows),
            "--chat_template", "lingowhale", "--human_token_ids", "3", "--model_token_ids", "4", "--json",
        )  # fmt: skip

        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["row"] for line in lines] == list(range(24))
        for line, expected in zip(lines, golden, strict=True):
            assert set(line) == {"row", "id", "status", "reason", "examples"}
            (example,) = line["examples"]
            assert (line["status"], line["reason"]) == ("kept", None)
            assert example["input_ids"] == expected["input_ids"]
            assert example["labels"] == [-100, *expected["labels"][1:]]

    def test_cut_and_dropped_rows_and_the_text_form(self, tiny_model, tmp_path):
        data = write_rows(tmp_path / "rows.json", ROWS)
        flags = ("--model_name_or_path", tiny_model, "--data_path", data, "--model_max_length", "40")
        lines = [json.loads(line) for line in self.preview(*flags, "--json").stdout.splitlines()]
        assert {line["status"] for line in lines} == {"kept", "cut"}
        assert all((line["reason"] is None) == (line["status"] == "kept") for line in lines)
        text = self.preview(*flags).stdout
        cut = sum(line["status"] == "cut" for line in lines)
        assert f"6: {6 - cut} kept, {cut} cut, 0 split, 0 dropped" in text

    @pytest.mark.parametrize(
        ("content", "status", "message"),
        [
            ('[{"conversations": [{"from": "human", "value": "x"}]}]', 3, "rows.json, row 0: has no model turn"),
            ("[", 3, "rows.json, line 1, column 2: not JSON"),
        ],
    )
    def test_bad_rows_end_with_status_3(self, tiny_model, tmp_path, content, status, message):
        (tmp_path / "rows.json").write_text(content)
        done = self.preview("--model_name_or_path", tiny_model, "--data_path", tmp_path / "rows.json", "--json")
        assert done.returncode == status
        assert all(json.loads(line)["status"] == "dropped" for line in done.stdout.splitlines())
        assert message in done.stderr and "Traceback" not in done.stderr

    def test_usage(self):
        done = self.preview("--data_pat", "x")
        assert done.returncode == 2
        assert "unknown flag --data_pat: did you mean --data_path?" in done.stderr


def test_every_verb_has_help():
    for verb in ("chat", "convert", "preview", "quickstart"):
        command = [sys.executable, "-m", "finetune", verb, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        assert done.returncode == 0, done.stderr
        assert "--" in done.stdout and done.stderr == ""
