"""The README is true: its tree, its flags, its names."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
from dataclasses import fields

import pytest
import readme_flags
from conftest import ROOT
from typer.main import get_command

from finetune import __main__ as main_module
from finetune.__main__ import app
from finetune.arguments import (
    DoctorArguments,
    EvaluateArguments,
    PreviewArguments,
    build_parser,
    known_flags,
    parse,
    parse_for_doctor,
)
from finetune.zero import shipped_names

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_zh.md").read_text(encoding="utf-8")
LAUNCHER_FLAGS = {"hostfile", "num_gpus", "nproc_per_node", "module", "help", "json"}
SERVER_FLAGS = {"enable", "lora", "max"}  # of vLLM, as far as their first hyphen
PIP_FLAGS = {"index"}  # likewise


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
    of_verbs |= {one.name for verb in get_command(app).commands.values() for one in verb.params}
    assert {"compare", "max_new_tokens", "only_model"} <= of_verbs
    assert named - LAUNCHER_FLAGS - SERVER_FLAGS - PIP_FLAGS <= set(known_flags()) | of_verbs


def test_the_table_of_flags_is_written_from_the_flags():
    table = README[readme_flags.place(README)]
    assert len(table.splitlines()) > 60
    assert table == readme_flags.table(), "README.md: python tests/readme_flags.py"
    headings = {readme_flags.anchor(line.lstrip("# ")) for line in README.splitlines() if line.startswith("#")}
    links = set(re.findall(r"\]\(#(.+?)\)", README))
    assert len(links) > 8
    assert links <= headings


def test_help_says_what_the_table_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # else a line may end within a word
    help_text = " ".join(build_parser().format_help().split())
    rows = [row.split(" | ") for row in readme_flags.table().splitlines() if row.startswith("| `--")]
    said = {name: text.removesuffix(" |").replace("`", "") for name, text in rows[:-1]}
    assert len(said) > 60
    assert [name for name, text in said.items() if without_choices(text) not in help_text] == []


def without_choices(text: str) -> str:
    """`a, b: what it is` -> `what it is`; argparse writes the choices otherwise."""
    return re.sub(r"^\w+(, \w+)+: ", "", text)


def options_of(function) -> list[str]:
    """The flags that a verb declares itself."""
    defaults = [one.default for one in inspect.signature(function).parameters.values()]
    return [name for default in defaults for name in getattr(default, "param_decls", None) or ()]


def test_commands_of_chat_are_declared():
    commands = re.findall(r"finetune chat \S+(.*?)(?:  #.*)?$", README, re.MULTILINE)
    flags = [flag for command in commands for flag in re.findall(r"--\w+", command)]
    assert {"--compare", "--web"} <= set(flags) <= set(options_of(main_module._chat))


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


def commands_of(page: str) -> set[str]:
    """What the fenced blocks say, one command a line, without comments; the tree of the house is none."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    text = "".join(body for body in blocks if not body.startswith("finetune/\n")).replace("\\\n", " ")
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in text.splitlines())
    return {line for line in lines if line}


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z0-9_-]*)", text))


def table_rows(page: str, head: str) -> list[tuple[set[str], list[str]]]:
    """(flags, default in brackets if any) of each row of the table with this head."""
    table = re.search(rf"^{re.escape(head)}\n(.*?)\n\n", page, re.DOTALL | re.MULTILINE)[1]
    return [(flags_of(row.split(" | ")[0]), re.findall(r" \[(\S+)\] \|$", row)) for row in table.splitlines()]


def test_chinese_page_has_the_same_commands():
    english, chinese = commands_of(README), commands_of(CHINESE)
    assert len(english) > 30
    assert "make quickstart" in english
    assert any(line.startswith("deepspeed --hostfile=$hostfile finetune/finetune.py --data_path") for line in english)
    assert chinese == english


def test_chinese_page_has_the_same_flags_and_defaults():
    table = table_rows(README, "| flag | meaning |")
    assert len(table) > 60
    assert sum(bool(default) for _, default in table) > 30
    assert table_rows(CHINESE, "| 参数 | 说明 |") == table
    assert flags_of(CHINESE) <= flags_of(README)


def test_chinese_page_has_the_same_figures():
    """A figure that is measured anew in README.md may not stay behind."""
    chinese, english = (set(re.findall(r"(?<!\w)(?:\d+(?:[.,-]\d+)+|\d{2,})", page)) for page in (CHINESE, README))
    assert len(chinese) > 30
    assert chinese <= english


def test_readmes_link_to_each_other_and_to_files():
    assert "[中文](README_zh.md)" in README
    assert "[English](README.md)" in CHINESE
    links = [link for page in (README, CHINESE) for link in re.findall(r"\]\((?!http)([^)#]+)", page)]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_chinese_is_spaced_and_punctuated_alike():
    prose = re.sub(r"^```.*?^```$", "", CHINESE, flags=re.DOTALL | re.MULTILINE)
    han = "[\u4e00-\u9fff]"
    assert len(re.findall(han, prose)) > 5000
    assert re.findall(rf"{han}[A-Za-z0-9`\[].{{0,9}}|.{{0,9}}[A-Za-z0-9`)]{han}", prose) == []
    assert re.findall(rf".{{0,9}}(?:{han}[,;:!?.()]|[,;:!?()]{han}).{{0,9}}", prose) == []
