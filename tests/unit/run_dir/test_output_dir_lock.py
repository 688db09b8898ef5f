"""The output folder: kept for one run, or said that it cannot be."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from finetune.inference import run_result
from finetune.run_dir import output_dir_lock, run_json
from finetune.utils.errors import CheckpointError, ConfigError, StorageError


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "holds no run.json: expected the output_dir"),
        (b"{", "run.json, line 1, column 2: not JSON"),
        (b"\xff", "run.json: not UTF-8 at byte 0"),
        (b"[]", "run.json: expected a JSON object, found an array"),
        (b"{}", "run.json: lacks model and chat and precision"),
    ],
)
def test_a_folder_that_is_no_runs_is_refused_with_what_it_is_instead(content, complaint, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        run_result.read_result(tmp_path)


@pytest.mark.parametrize("read", [run_result.read_result, run_json.load_run_json])
def test_what_is_no_folder_is_said_to_be_none(read, tmp_path):
    (tmp_path / "data.json").touch()
    with pytest.raises(ConfigError, match="data.json: is a file: expected the output_dir of a training run"):
        read(tmp_path / "data.json")
    with pytest.raises(ConfigError, match="nowhere: there is no such folder: expected the output_dir"):
        read(tmp_path / "nowhere")
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ConfigError, match="there is no such folder: did you mean .*checkpoint-2"):
        read(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_adapter_whose_config_is_broken_is_not_taken_for_a_full_model(content, tmp_path):
    run_json.update_run_json(tmp_path, {"model": {}, "chat": {}, "precision": "bf16"})
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="adapter_config.json: not the config of an adapter"):
        run_result.read_result(tmp_path)


def test_a_run_that_ended_while_another_waited_for_its_lock_is_kept(tmp_path):
    """Both were started into an empty folder."""
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match="already holds a run, nothing was changed: choose another folder"):
        output_dir_lock.prepare_output_dir(tmp_path, overwrite=False, resume=False)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/manifest.json").touch()
    with pytest.raises(ConfigError, match="nothing was changed: resume it with --resume_from_checkpoint auto, choose"):
        output_dir_lock.prepare_output_dir(tmp_path, overwrite=False, resume=False)
    (tmp_path / "RUN_COMPLETE").touch()
    with pytest.raises(ConfigError, match="nothing was changed: choose another folder"):
        output_dir_lock.prepare_output_dir(tmp_path, overwrite=False, resume=False)
    assert output_dir_lock.prepare_output_dir(tmp_path, overwrite=False, resume=True) is None
    assert "was moved to" in output_dir_lock.prepare_output_dir(tmp_path, overwrite=True, resume=False)
    assert not list(tmp_path.iterdir()) and list(tmp_path.parent.glob("*before*/adapter_config.json"))


@pytest.mark.parametrize(("blocks", "free", "is_full"), [(600, 0, True), (600, 1, False), (0, 0, False)])
def test_a_disk_without_space_is_said_before_anything_starts(tmp_path, monkeypatch, blocks, free, is_full):
    """Some file systems know no sizes."""
    disk = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_flag=0)
    monkeypatch.setattr(output_dir_lock.os, "statvfs", lambda path: disk)
    with pytest.raises(StorageError, match="o: no space is left on the disk of /") if is_full else nullcontext():
        output_dir_lock.check_writable(tmp_path / "o", "o")


def test_a_read_only_file_system_is_not_taken_for_a_lack_of_permission(tmp_path, monkeypatch):
    disk = SimpleNamespace(f_flag=output_dir_lock.os.ST_RDONLY)
    monkeypatch.setattr(output_dir_lock.os, "statvfs", lambda path: disk)
    with pytest.raises(StorageError, match="^o: the file system of .* is read-only: name another folder"):
        output_dir_lock.check_writable(tmp_path / "o", "o")


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir_lock, "SECONDS_FOR_A_DYING_RUN", 0.2)
    assert output_dir_lock.acquire_lock(tmp_path) is None
    with pytest.raises(ConfigError, match="another run is writing there"):
        output_dir_lock.acquire_lock(tmp_path)
    output_dir_lock.release_lock()
    assert output_dir_lock.acquire_lock(tmp_path) is None
    output_dir_lock.release_lock()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import filelock

    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")  # as filelock says it on ENOSYS

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert "a second run there would not be refused" in output_dir_lock.acquire_lock(tmp_path)
    assert output_dir_lock._locks == []


def test_how_an_earlier_start_ended_is_forgotten_and_nothing_else(tmp_path):
    run_json.mark_complete(tmp_path, "run-1")
    for name in ("failure.json", "STOP", "run.json"):
        (tmp_path / name).write_text("{}")
    run_json.clear_ending(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_each_start_is_remembered_and_how_it_ended(tmp_path):
    assert run_json.starts(tmp_path) == []
    run_json.update_run_json(tmp_path, {"starts": [run_json.new_start(0)]})
    run_json.update_run_json(tmp_path, {"starts": run_json.ended(tmp_path, "stopped by SIGTERM")})
    run_json.update_run_json(tmp_path, {"starts": [*run_json.starts(tmp_path), run_json.new_start(7)]})
    first, second = run_json.starts(tmp_path)
    assert (first["from_step"], first["how"], second["from_step"], second["how"]) == (0, "stopped by SIGTERM", 7, None)
    assert first["began"] <= first["ended"] <= second["began"] and second["ended"] is None


def test_whether_a_run_is_there_is_seen_without_getting_in_its_way(tmp_path):
    assert output_dir_lock.is_locked(tmp_path) is False and not list(tmp_path.iterdir())
    assert output_dir_lock.acquire_lock(tmp_path) is None
    assert output_dir_lock.is_locked(tmp_path) is True
    output_dir_lock.release_lock()
    assert output_dir_lock.is_locked(tmp_path) is False
