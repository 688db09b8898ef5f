"""The output folder: kept for one run, or said that it cannot be."""

from __future__ import annotations

import pytest

from finetune import results
from finetune.errors import ConfigError


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SECONDS_FOR_A_DYING_RUN", 0.2)
    assert results.hold(tmp_path) is None
    with pytest.raises(ConfigError, match="another run is writing there"):
        results.hold(tmp_path)
    results.let_go()
    assert results.hold(tmp_path) is None
    results.let_go()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import filelock

    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")  # as filelock says it on ENOSYS

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert "a second run there would not be refused" in results.hold(tmp_path)
    assert results._held == []


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
    assert results.is_held(tmp_path) is False and not list(tmp_path.iterdir())
    assert results.hold(tmp_path) is None
    assert results.is_held(tmp_path) is True
    results.let_go()
    assert results.is_held(tmp_path) is False
