"""A save on one rank: the room it needs, and disks that refuse in the midst of it."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from finetune import checkpoint
from finetune.checkpoint.saver import Saver, checkpoint_bytes
from finetune.distributed.collectives import StorageGroup
from finetune.utils.errors import StorageError
from tests.helpers.checkpoint_files import MANIFEST, newest_verified, sealed
from tests.helpers.limits import limited_file_size
from tests.helpers.logs import logged


@pytest.fixture
def saver(tmp_path) -> Saver:
    def describe(step: int) -> checkpoint.Manifest:
        return replace(MANIFEST, step=step, world_size=1, loss_since_log=[0.0], disks=[[0]])

    return Saver(tmp_path, StorageGroup(0, (0,), [[0]]), keep=1, first_size=1000, describe=describe)


def saved(saver: Saver, step: int) -> Path:
    folder = saver.begin(step, MANIFEST.run_id)
    (folder / "model.safetensors").write_bytes(b"weights")
    saver.commit(folder, step)
    return folder


def test_an_older_checkpoint_that_cannot_be_removed_does_not_end_the_run(saver, tmp_path, monkeypatch):
    """Somebody reads it, and NFS keeps what is open: a folder of it stays, at the rotation and at the save after it."""
    older, real = saved(saver, 2), shutil.rmtree

    def refuse(path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(39, "Directory not empty")
        real(path, *args, **kwargs)

    monkeypatch.setattr("shutil.rmtree", refuse)
    with logged() as lines:
        for step in (4, 6):
            assert checkpoint.verify_checkpoint(saved(saver, step)) == []
    assert "".join(lines).count("could not be removed: [Errno 39] Directory not empty") == 2
    monkeypatch.undo()
    saved(saver, 8)
    assert not older.exists() and [one.name for one in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_rank_whose_disk_does_not_answer_still_says_so_to_the_others(saver, monkeypatch):
    folder = saver.begin(2, MANIFEST.run_id)

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("shutil.disk_usage", refuse)
    with saver.collect_errors(folder / "model.safetensors"):
        raise OSError(5, "Input/output error")
    with pytest.raises(StorageError, match="Input/output error: checkpoint-2 was not saved .* 0 MB are free"):
        saver.commit(folder, 2)
    assert not folder.exists()


def test_a_full_disk_names_the_checkpoint_that_the_run_began_with(saver, monkeypatch):
    saver.resumed = saved(saver, 2)
    saver.newest = None
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="0 MB are free, .* missing; the newest checkpoint is .*checkpoint-2$"):
        saver.begin(4, MANIFEST.run_id)


def test_a_result_that_cannot_be_written_leaves_the_files_of_before(saver, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(StorageError, match="No space left on device: the result was not saved"), saver.saving_result():
        with saver.collect_errors(tmp_path / "model.safetensors"):
            (tmp_path / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

    with saver.saving_result(), saver.collect_errors(tmp_path / "model.safetensors"):
        (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_an_error_of_torch_that_names_the_disk_is_one_of_it(saver):
    folder = saver.begin(2, MANIFEST.run_id)
    with saver.collect_errors(folder / "file"):
        raise RuntimeError("[enforce fail] . open file failed with strerror - Disk quota exceeded")
    with pytest.raises(StorageError, match="file: Disk quota exceeded: checkpoint-2 was not saved"):
        saver.commit(folder, 2)


def _save_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel({"a" * 5000: 0}, unk_token="a")).save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        partial(save_file, {"a": torch.zeros(5000)}),
        _save_tokenizer,
        partial(torch.save, torch.zeros(5000)),
        lambda path: path.write_text("a" * 5000),
    ],
    ids=["safetensors", "tokenizers", "torch", "python"],
)
def test_a_disk_that_refuses_is_one_whichever_library_writes(saver, write):
    folder = saver.begin(2, MANIFEST.run_id)
    with limited_file_size(1000), saver.collect_errors(folder / "file"):
        write(folder / "file")
    with pytest.raises(StorageError, match=r"file: .*: checkpoint-2 was not saved"):
        saver.commit(folder, 2)
    with pytest.raises(RuntimeError, match="a bug"), saver.collect_errors(folder):
        raise RuntimeError("a bug")


def test_a_checkpoint_under_the_name_of_a_later_step_is_none(tmp_path):
    shutil.copytree(sealed(tmp_path, 4), tmp_path / "checkpoint-9")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4.kept")
    assert "it is of step 4" in checkpoint.verify_checkpoint(tmp_path / "checkpoint-9")[0]
    assert checkpoint.verify_checkpoint(tmp_path / "checkpoint-4.kept") == []
    assert newest_verified(tmp_path) == tmp_path / "checkpoint-4"


class Tied(torch.nn.Module):
    """An embedding of 1,000 numbers that is the head, too, and 500 beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(100, 10), torch.nn.Linear(50, 10, bias=False)
        self.head = torch.nn.Linear(10, 100, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("stage", "only_model", "numbers"),
    [
        (None, True, 1500),  # safetensors writes a tied head once
        (2, True, 2500),  # accelerate has copied each tensor apart
        (2, False, 2500 + 1500 / 2 + 3 * 1500 / 2),  # half of the ranks have their files here
        (3, False, 1500 + 3 * 1500 / 2),
    ],
)
def test_the_first_checkpoint_is_foreseen(stage, only_model, numbers):
    shapes = {"embedding": [100, 10], "layer": [10, 50]}
    assert checkpoint_bytes(Tied(), shapes, stage=stage, share=0.5, only_model=only_model) == 4 * numbers
