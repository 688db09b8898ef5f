"""Why a file cannot be written, in words: a file in the way of a folder, a folder that is gone."""

import errno
from types import SimpleNamespace

import pytest

from finetune.utils.atomic_io import append_json_lines, replacing, write_text_atomically
from finetune.utils.errors import StorageError, os_reason


def _replace(path):
    with replacing(path) as part:
        part.write_text("x")


WRITES = [lambda path: append_json_lines(path, [{}]), lambda path: write_text_atomically(path, "x"), _replace]


@pytest.mark.parametrize("write", WRITES)
def test_a_folder_that_was_moved_is_gone(write, tmp_path):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    write(output_dir / "metrics.jsonl")
    output_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=f"the folder {output_dir} is gone: it was moved, renamed or deleted"):
        write(output_dir / "metrics.jsonl")


@pytest.mark.parametrize("write", WRITES)
def test_a_file_in_the_way_is_a_file(write, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match=f"{tmp_path}/out is a file"):
        write(tmp_path / "out" / "run" / "metrics.jsonl")


def test_other_reasons_are_those_of_the_system(tmp_path):
    with pytest.raises(StorageError, match="Is a directory"):
        append_json_lines(tmp_path, [{}])


def test_a_file_system_without_inodes_is_told_from_a_full_one(tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    left = {"f_files": 10, "f_favail": 0}
    monkeypatch.setattr("os.statvfs", lambda folder: SimpleNamespace(**left))
    assert "no inode is left" in os_reason(error, tmp_path / "out" / "a") and str(tmp_path) in os_reason(
        error, tmp_path
    )
    left["f_favail"] = 1
    assert os_reason(error, tmp_path / "a") == "No space left on device"
    left.update(f_files=0, f_favail=0)  # btrfs has no such number
    assert os_reason(error, tmp_path / "a") == "No space left on device"
