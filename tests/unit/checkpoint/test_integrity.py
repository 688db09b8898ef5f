"""What a power cut may leave of a checkpoint: it is whole, or ours to remove, or the user's; never mistaken."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from finetune import checkpoint
from finetune.checkpoint import checkpoint_dirs
from finetune.utils.errors import CheckpointError
from tests.helpers.checkpoint_files import MANIFEST, newest_verified, sealed
from tests.helpers.hostile_json import mutated


@pytest.fixture
def journal(monkeypatch):
    """What is done to names, and what is made durable, in order."""
    done = []

    def sync(descriptor: int, real=os.fsync) -> None:
        status = os.fstat(descriptor)
        assert status.st_size > 0, "made durable before it was written"
        kind = "sync folder" if stat.S_ISDIR(status.st_mode) else "sync"
        done.append((kind, Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)

    def noted(name: str, real):
        def change(self, *to, **options):
            done.append((name, Path(to[0] if to else self).name))
            return real(self, *to, **options)

        return change

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, noted(name, getattr(Path, name)))
    return done


def test_a_save_is_announced_durably_before_there_is_a_folder(tmp_path, journal):
    checkpoint.mark_as_unfinished(tmp_path / "checkpoint-4", "run", 4)
    assert journal == [
        ("sync", "saving.json.partial"),
        ("replace", "saving.json"),
        ("sync folder", ".checkpoint-4.coming"),
        ("rename", "checkpoint-4"),
        ("sync folder", tmp_path.name),
    ]
    assert json.loads((tmp_path / "checkpoint-4" / "saving.json").read_text()) == {"run_id": "run", "step": 4}


def test_a_manifest_is_seen_only_when_it_and_all_that_it_names_are_on_the_disk(tmp_path, journal):
    folder = sealed(tmp_path, 4)
    names = [name for kind, name in journal[5:] if kind == "sync"]
    assert sorted(names[:-1]) == sorted(Path(name).name for name in checkpoint.read_manifest(folder).files)
    assert {("sync folder", "checkpoint-4"), ("sync folder", "global_step4")} <= set(journal[5:-5])
    assert journal[-5:] == [
        ("sync", "manifest.json.partial"),
        ("replace", "manifest.json"),
        ("sync folder", "checkpoint-4"),
        ("unlink", "saving.json"),
        ("sync folder", "checkpoint-4"),
    ]


def test_a_removal_is_announced_durably_and_its_mark_goes_last(tmp_path, journal):
    folder = sealed(tmp_path, 4)
    del journal[:]
    checkpoint.remove_checkpoint(folder)
    assert journal[:2] == [("replace", "saving.json"), ("sync folder", "checkpoint-4")]
    assert ("unlink", "saving.json") not in journal and journal[-1] == ("rename", ".checkpoint-4.going")
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_aside_is_so_after_a_power_cut(tmp_path, journal, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "now")
    found = []
    for _ in range(3):
        folder = sealed(tmp_path, 4)
        found.append(checkpoint.quarantine(folder, "damaged").name)
        assert journal[-2:] == [("rename", found[-1]), ("sync folder", tmp_path.name)]
    assert found == [f"checkpoint-4.damaged-now{end}" for end in ("", "-2", "-3")]


def test_a_checkpoint_whose_mark_outlived_its_seal_is_whole(tmp_path):
    folder = sealed(tmp_path, 4)
    (folder / "saving.json").write_text("{}")
    assert not checkpoint.is_unfinished(folder) and checkpoint.remove_unfinished(tmp_path) == []
    assert newest_verified(tmp_path) == folder


def test_a_removal_that_stops_halfway_can_be_told_from_a_folder_of_the_user_s(tmp_path, monkeypatch):
    folder = sealed(tmp_path, 4)

    def die(self):
        raise KeyboardInterrupt

    for last in ("latest", "trainer_state.json"):  # in front of the mark, and behind it
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "unlink", lambda self, real=Path.unlink, last=last: (die if self.name == last else real)(self)
            )
            with pytest.raises(KeyboardInterrupt):
                checkpoint.remove_checkpoint(folder)
        assert checkpoint.is_unfinished(folder)
    checkpoint.remove_checkpoint(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_came_or_went_when_the_power_failed_is_removed_and_nothing_else(tmp_path):
    ours = [tmp_path / f".checkpoint-4.{end}" for end in ("coming", "going")]
    others = [tmp_path / name for name in (".checkpoint-4.gone", "x.checkpoint-4.going", ".checkpoint-best.going")]
    for folder in (*ours, *others):
        folder.mkdir()
        (folder / "file").write_text("x")
    (tmp_path / ".checkpoint-5.going").write_text("a file")
    (tmp_path / ".checkpoint-6.going").symlink_to(others[0])
    left = sorted({*tmp_path.iterdir()} - {*ours})
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == left and (others[0] / "file").is_file()


def test_a_disk_that_refuses_is_heard(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(5, "Input/output error")

    (tmp_path / "shard").write_text("x")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.fsync_and_hash(tmp_path, ["shard"], 0)


def test_the_oldest_goes_first(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        sealed(tmp_path, step)
    gone = []
    monkeypatch.setattr(checkpoint_dirs, "remove_checkpoint", lambda folder: gone.append(folder.name))
    checkpoint.rotate(tmp_path, run_id=MANIFEST.run_id, keep=1)
    assert gone == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert checkpoint.steps_in(tmp_path / "none") == checkpoint.remove_unfinished(tmp_path / "none") == []
    assert newest_verified(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[
            ({name: None}, f"{name} is None")
            for name in ("run_id", "step", "world_size", "step_rows", "facts", "disks")
        ],
        ({"files": {"/etc/passwd": {"size": 1, "xxh3_128": "0", "rank": None}}}, "lies outside"),
        ({"files": {"a": {"size": "1", "xxh3_128": "0", "rank": None}}}, "a: size is '1'"),
        ({"files": {"a": {"size": 1, "xxh3_128": None, "rank": None}}}, "a: xxh3_128 is None"),
        ({"files": {"a": {"size": 1}}}, "not a manifest"),
        ({"unknown": 1}, "not a manifest"),
        ({"trained": {"../../outside": [1]}}, "names that are paths"),
    ],
)
def test_a_manifest_of_other_kinds_of_values_is_none(tmp_path, change, said):
    path = sealed(tmp_path, 4) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.read_manifest(path.parent)
    assert newest_verified(tmp_path) is None


def test_ranks_have_about_as_many_bytes_to_read():
    sizes = {"a": 9, "b": 5, "c": 4, "d": 1, "e": 0, "f": 0}
    files = {name: checkpoint.FileRecord(size, "0", None) for name, size in sizes.items()}
    manifest = replace(MANIFEST, files=files)
    assert [checkpoint.partition_files(manifest, sizes, part, 2) for part in (0, 1)] == [
        ["a", "d", "f"],
        ["b", "c", "e"],
    ]


def test_changed_values_of_a_manifest_that_fits_itself_are_faults_or_no_matter(tmp_path):
    folder, random = sealed(tmp_path, 4), Random(0)
    original = json.loads((folder / "manifest.json").read_text())
    del original["checksum"]
    found = 0
    for _ in range(150):
        (folder / "manifest.json").write_text(json.dumps(mutated(original, random)))
        faults = checkpoint.verify_checkpoint(folder)
        assert all(str(folder) in fault for fault in faults)
        found += bool(faults)
    assert 100 < found < 150
