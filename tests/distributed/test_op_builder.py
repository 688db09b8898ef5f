"""One process builds, the others wait for it, and nobody waits for one that is dead."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from finetune.distributed.compat import patch_build_lock
from finetune.distributed.op_builder import build_notes
from tests.helpers.logs import logged

SECONDS = 30


@pytest.fixture
def said(monkeypatch):
    """What a guarded build says; torch's own class is back after the test."""
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    patch_build_lock()
    with logged() as lines:
        yield lines


def _hold(lock: str, ready, release) -> None:
    patch_build_lock()
    baton = cpp_extension.FileBaton(lock)
    assert baton.try_acquire()
    ready.set()
    release.wait(SECONDS)
    baton.release()


@pytest.fixture
def builder(tmp_path):
    """Another process that builds, and the event that lets it end."""
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "lock"), ready, release))
    process.start()
    assert ready.wait(SECONDS)
    yield process, release
    process.kill()
    process.join()


def test_a_second_process_waits_until_the_first_has_built(said, builder, tmp_path):
    process, release = builder
    baton = cpp_extension.FileBaton(str(tmp_path / "lock"))
    assert not baton.try_acquire()
    release.set()
    baton.wait()
    process.join(SECONDS)
    assert process.exitcode == 0 and not (tmp_path / "lock").exists() and said == []
    assert baton.try_acquire()
    baton.release()
    assert not (tmp_path / "lock").exists()


def test_what_a_killed_build_leaves_is_removed_and_said(said, builder, tmp_path):
    process, _ = builder
    process.kill()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "lock").exists()
    began = time.monotonic()
    baton = cpp_extension.FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire() and time.monotonic() - began < 5
    baton.release()
    assert len(said) == 1 and str(tmp_path / "lock") in said[0]
    assert not (tmp_path / "lock").exists()


def test_one_who_waits_for_a_build_that_is_killed_goes_on(said, builder, tmp_path):
    process, _ = builder
    baton = cpp_extension.FileBaton(str(tmp_path / "lock"))
    assert not baton.try_acquire()
    process.kill()
    began = time.monotonic()
    baton.wait()
    assert time.monotonic() - began < 5


def test_a_lock_that_another_tool_holds_open_is_waited_for(said, tmp_path):
    lock = tmp_path / "lock"
    hold = (
        "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True);"
        "time.sleep(1); os.remove(sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        began = time.monotonic()
        baton = cpp_extension.FileBaton(str(lock))
        assert baton.try_acquire() and time.monotonic() - began > 0.3
        baton.release()
    assert said == []


def test_torch_still_waits_for_a_lock_that_nobody_holds(tmp_path):
    """When this fails, torch no longer needs `patch_build_lock`: remove it."""
    (tmp_path / "lock").touch()
    assert not FileBaton(str(tmp_path / "lock")).try_acquire()


def test_a_build_that_takes_a_minute_is_announced(tmp_path):
    names = ["deepspeed_shm_comm", "cpu_adam"]
    assert "deepspeed_shm_comm, cpu_adam first" in build_notes(tmp_path, names)[0]
    assert build_notes(tmp_path, []) == []
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    [line] = build_notes(tmp_path, names)
    assert "cpu_adam" in line and "deepspeed_shm_comm" not in line
    assert build_notes(tmp_path, names[:1]) == []
