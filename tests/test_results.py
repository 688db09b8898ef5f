"""The output folder: kept for one run, or said that it cannot be."""

from __future__ import annotations

import pytest

from finetune import claiming, results
from finetune.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "holds no run.json: expected the output_dir"),
        (b"{", "run.json, line 1: not JSON"),
        (b"\xff", "run.json: not UTF-8 at byte 0"),
        (b"[]", "run.json: expected a JSON object, found list"),
        (b"{}", "run.json: lacks model and chat and precision"),
    ],
)
def test_a_folder_that_is_no_runs_is_refused_with_what_it_is_instead(content, complaint, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        results.read_result(tmp_path)


@pytest.mark.parametrize("read", [results.read_result, results.load_run])
def test_what_is_no_folder_is_said_to_be_none(read, tmp_path):
    (tmp_path / "data.json").touch()
    with pytest.raises(ConfigError, match="data.json: is a file: expected the output_dir of a training run"):
        read(tmp_path / "data.json")
    with pytest.raises(ConfigError, match="nowhere: there is no such folder: expected the output_dir"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_adapter_whose_config_is_broken_is_not_taken_for_a_full_model(content, tmp_path):
    results.write_run(tmp_path, {"model": {}, "chat": {}, "precision": "bf16"})
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="adapter_config.json: is not the config of an adapter"):
        results.read_result(tmp_path)


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(claiming, "SECONDS_FOR_A_DYING_RUN", 0.2)
    assert claiming.hold(tmp_path) is None
    with pytest.raises(ConfigError, match="another run is writing there"):
        claiming.hold(tmp_path)
    claiming.let_go()
    assert claiming.hold(tmp_path) is None
    claiming.let_go()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import filelock

    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")  # as filelock says it on ENOSYS

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert "a second run there would not be refused" in claiming.hold(tmp_path)
    assert claiming._held == []


def test_how_an_earlier_start_ended_is_forgotten_and_nothing_else(tmp_path):
    results.mark_complete(tmp_path, "run-1")
    for name in ("failure.json", "STOP", "run.json"):
        (tmp_path / name).write_text("{}")
    results.forget_ending(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_each_start_is_remembered_and_how_it_ended(tmp_path):
    assert results.starts(tmp_path) == []
    results.write_run(tmp_path, {"starts": [results.new_start(0)]})
    results.write_run(tmp_path, {"starts": results.ended(tmp_path, "stopped by SIGTERM")})
    results.write_run(tmp_path, {"starts": [*results.starts(tmp_path), results.new_start(7)]})
    first, second = results.starts(tmp_path)
    assert (first["from_step"], first["how"], second["from_step"], second["how"]) == (0, "stopped by SIGTERM", 7, None)
    assert first["began"] <= first["ended"] <= second["began"] and second["ended"] is None


def test_whether_a_run_is_there_is_seen_without_getting_in_its_way(tmp_path):
    assert claiming.is_held(tmp_path) is False and not list(tmp_path.iterdir())
    assert claiming.hold(tmp_path) is None
    assert claiming.is_held(tmp_path) is True
    claiming.let_go()
    assert claiming.is_held(tmp_path) is False
