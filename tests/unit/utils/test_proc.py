"""Processes: what /proc says of them, and commands that call our functions."""

import os
import sys
import tempfile
from pathlib import Path

from finetune.utils import proc
from finetune.utils.proc import cache_folder

NO_PROCESS = 1 << 30


def test_a_process_knows_its_parent_and_its_command():
    assert proc.parent_of(os.getpid()) == os.getppid()
    assert proc.state_of(os.getpid()) == "R"
    assert proc.command_of(os.getpid())


def test_of_a_process_that_is_gone_nothing_is_known():
    assert proc.stat_of(NO_PROCESS) is None and proc.parent_of(NO_PROCESS) is None
    assert (proc.state_of(NO_PROCESS), proc.command_of(NO_PROCESS)) == ("?", [])


calls: list[str] = []


def first() -> None:
    calls.append("first")


def second() -> None:
    calls.append("second")


def test_a_command_imports_and_calls_its_functions_in_order(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    program, flag, text = proc.command_calling(first, second)
    exec(text, {})
    assert (program, flag, calls) == (sys.executable, "-c", ["first", "second"])
    assert sys.path[0] == str(proc.ROOT) and (proc.ROOT / "finetune").is_dir()


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("data") == tmp_path / "cache/finetune/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("data") == tmp_path / "home/.cache/finetune/data"


def test_without_a_home_that_can_be_written_the_cache_is_in_tmp(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder("data") == Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}" / "data"
