"""Processes: what /proc says of them, and commands that call our functions."""

from __future__ import annotations

import os
import sys

from finetune.utils import proc

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
