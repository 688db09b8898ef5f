"""The README is true: its tree, its flags, its names."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import fields

import pytest
from conftest import ROOT

from finetune.arguments import (
    DoctorArguments,
    EvaluateArguments,
    PreviewArguments,
    known_flags,
    parse,
    parse_for_doctor,
)
from finetune.zero import shipped_names

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHER_FLAGS = {"hostfile", "num_gpus", "nproc_per_node", "module", "help", "json"}


def tree() -> dict[str, str]:
    """Path -> remark, from the block under "The house"."""
    block = README.split("## The house")[1].split("```")[1]
    found, folders = {}, []
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, remark = line.strip().partition(" ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found["".join([*folders, name])] = remark.strip()
    return found


def test_the_tree_is_the_tree():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    existing = {path for path in tracked if (ROOT / path).exists()}
    assert len(existing) > 50
    assert set(tree()) == existing
    assert all(tree().values()), "a file without a remark"


def test_flags_named_are_flags():
    named = {name for name in re.findall(r"`?--([a-z][a-z0-9_]*)", README) if not name.endswith("_")}
    assert {"use_lora", "deepspeed", "warmup_ratio"} <= named
    of_verbs = {one.name for group in (PreviewArguments, DoctorArguments, EvaluateArguments) for one in fields(group)}
    assert named - LAUNCHER_FLAGS <= set(known_flags()) | of_verbs


def test_configs_named_are_shipped():
    assert set(re.findall(r"`(zero[a-z0-9_]+)`", README)) == set(shipped_names())
    configs = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")
    assert all(f"{name}.json" in configs or f"`{name}`" in configs for name in shipped_names())


@pytest.mark.parametrize("page", ["README.md", "ds_configs/README.md", "hostfiles/README.md"])
def test_training_commands_parse(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^\s*deepspeed .*?finetune/finetune\.py (.*--output_dir.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert "output" in parse(shlex.split(command, comments=True)).training["output_dir"]


@pytest.mark.parametrize("page", ["README.md", "hostfiles/README.md"])
def test_commands_of_the_doctor_parse(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^\s*finetune doctor (.*--output_dir.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        _, flags, words = parse_for_doctor(shlex.split(command.replace(" ...", ""), comments=True))
        assert flags.hostfile == "hostfiles/two_hosts"
        assert "output" in parse(words).training["output_dir"]


def test_makefile_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)`", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"test", "quickstart", "test-hosts"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
