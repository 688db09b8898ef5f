"""The buffers that DeepSpeed writes to /dev/shm for CPU ranks."""

from shutil import disk_usage
from types import SimpleNamespace

import pytest

from finetune.distributed import compat
from finetune.utils.errors import StorageError


@pytest.mark.parametrize(("free", "fits"), [(64 << 20, False), (100 << 20, False), (1 << 30, True)])
def test_shared_memory_that_is_too_small_for_the_ranks_is_a_storage_error(monkeypatch, free, fits):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(compat, "shutil", SimpleNamespace(disk_usage=lambda path: disk_usage("/")._replace(free=free)))
    if fits:
        compat.check_shared_memory()
        return
    with pytest.raises(StorageError, match="out of shared memory.* 138 MB"):
        compat.check_shared_memory()


def test_the_buffer_of_this_rank_alone_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(compat.os, "getuid", lambda: 7)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(2):
        (tmp_path / f"deepspeed_allreduce_buffer_7_127.0.0.1_29500_{rank}").touch()
    compat.remove_shared_buffer()
    assert [path.name for path in tmp_path.iterdir()] == ["deepspeed_allreduce_buffer_7_127.0.0.1_29500_0"]
