"""A process knows its rank, and its heap and garbage are told what phase it is in."""

import gc
import os
import sys
from pathlib import Path

import pytest

from finetune.distributed import process_setup
from finetune.distributed.process_setup import operator_folder, prepare_environment


@pytest.fixture(autouse=True)
def collection():
    """What these tests switch off is for a process that starts, not for the other tests."""
    yield
    gc.enable()


def test_a_process_without_a_launcher_becomes_rank_0_of_1(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin"})

    prepare_environment()

    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("0", "1", "1")
    assert int(os.environ["MASTER_PORT"]) > 0
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_the_environment_of_a_launcher_and_of_the_user_is_kept(monkeypatch):
    given = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host",
        "MASTER_PORT": "29500", "TORCH_EXTENSIONS_DIR": "/mine", "TOKENIZERS_PARALLELISM": "false",
        "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "3",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    }  # fmt: skip
    monkeypatch.setattr(os, "environ", dict(given))

    prepare_environment()

    assert os.environ == {**given, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


def test_ranks_share_the_cores_and_the_allocator_grows_its_segments(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"})

    prepare_environment()

    assert (os.environ["OMP_NUM_THREADS"], os.environ["PYTORCH_ALLOC_CONF"]) == ("8", "expandable_segments:True")


def test_malloc_is_told_once_before_loading_and_once_before_the_steps(monkeypatch: pytest.MonkeyPatch):
    """And not at all where the user has tuned it, or where it is another libc's."""
    told: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, name: int, value: int) -> None:
            told.append((name, value))

        def malloc_trim(self, pad: int) -> None:
            told.append((0, pad))

    monkeypatch.setattr("ctypes.CDLL", lambda name: Libc())
    process_setup.allocate_outside_heap()
    assert told == [(process_setup.M_MMAP_THRESHOLD, 1 << 20), (0, 0)]
    told.clear()
    process_setup.keep_freed_blocks()
    assert told == [(process_setup.M_MMAP_THRESHOLD, 32 << 20), (process_setup.M_TRIM_THRESHOLD, 64 << 20), (0, 0)]
    told.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    process_setup.allocate_outside_heap()
    assert told == []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    process_setup.keep_freed_blocks()


def test_operators_are_compiled_in_a_folder_that_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert operator_folder(tmp_path) == tmp_path / "torch_extensions"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the environment belongs to root
    first, second = operator_folder(tmp_path), operator_folder(tmp_path / "other")
    assert first.parent == tmp_path / "cache/finetune" and first.is_dir() and first != second
