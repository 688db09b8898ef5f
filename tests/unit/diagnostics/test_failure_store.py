"""`failure.json`: what is written, and which of two records is kept."""

import json
import os
import stat
from dataclasses import asdict, replace

import pytest

from finetune.diagnostics import likely_cause, read_failure, write_failure
from tests.helpers.failure_samples import at, died, raised


def test_the_file_is_complete_readable_by_all_and_names_the_cause(tmp_path):
    before = os.umask(0o077)
    try:
        failure = died(9, rank=3, host="node1", run="r1", error="内存不足：第 3 号进程", hints=["oom_kill 0 -> 1"])
        path = write_failure(tmp_path, failure)
    finally:
        os.umask(before)
    assert path == tmp_path / "failure.json" and os.listdir(tmp_path) == ["failure.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert "内存不足：第 3 号进程" in path.read_text(encoding="utf-8")
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values["likely_cause"] == asdict(likely_cause(failure))
    assert values["likely_cause"]["code"] == "host-out-of-memory" and values["likely_cause"]["remedy"]
    assert read_failure(path) == failure


def test_a_later_failure_of_the_same_run_does_not_replace_the_first(tmp_path):
    first, later = at(3, raised("first", run="r1")), at(4, raised("later", run="r1"))
    path = write_failure(tmp_path, first)
    assert write_failure(tmp_path, later) == path and read_failure(path) == first
    assert write_failure(tmp_path, at(2, later)) and read_failure(path).error == "later"
    assert write_failure(tmp_path, replace(later, run="r2")) and read_failure(path).run == "r2"
    assert os.listdir(tmp_path) == ["failure.json"]


def test_runs_without_an_id_are_never_the_same_run(tmp_path):
    write_failure(tmp_path, at(1, raised("last week")))
    assert read_failure(write_failure(tmp_path, at(2, raised("today")))).error == "today"


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"rank": 1}', "\udcff", "[" * 100_000])
def test_a_broken_record_is_none_and_is_replaced(tmp_path, broken):
    (tmp_path / "failure.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
    assert read_failure(tmp_path / "failure.json") is None
    assert read_failure(write_failure(tmp_path, raised("new", run="r1"))).error == "new"


def test_a_missing_folder_and_a_folder_with_the_name_of_the_file_give_none(tmp_path):
    assert write_failure(tmp_path / "missing", raised("x")) is None and not (tmp_path / "missing").exists()
    (tmp_path / "failure.json").mkdir()
    assert write_failure(tmp_path, raised("x")) is None
    assert os.listdir(tmp_path) == ["failure.json"]


def test_a_disk_without_hard_links_keeps_the_first_record_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, later = at(1, raised("first", run="r1")), at(2, raised("later", run="r1"))
    assert read_failure(write_failure(tmp_path, first)) == first
    assert read_failure(write_failure(tmp_path, later)) == first
