"""What is recorded and shown when a run fails."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from conftest import ROOT
from drawn_failures import FAILURES, at
from failure_texts import died, said
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.diagnostics import Failure, failure_page, likely_cause, read, write

KEYS = st.sampled_from([one.name for one in fields(Failure)] + ["likely_cause", "new"])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers() | st.text()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


# The record


@given(FAILURES)
@settings(max_examples=300, deadline=None)
def test_a_record_goes_through_standard_json_and_comes_back(failure):
    text = json.dumps(failure.to_json(), allow_nan=False, ensure_ascii=False)
    assert Failure.from_json(json.loads(text.encode("utf-8"))) == failure
    assert likely_cause(Failure.from_json(failure.to_json())) == likely_cause(failure)


@given(st.dictionaries(KEYS, VALUES))
@settings(max_examples=300, deadline=None)
def test_any_values_are_read_or_refused(values):
    try:
        failure = Failure.from_json(values)
    except ValueError:
        assert not isinstance(values.get("kind"), str)
    else:
        assert failure.kind == values["kind"].encode("utf-8", "backslashreplace").decode()
        json.dumps(failure.to_json(), allow_nan=False)
        assert failure_page(failure)


def test_what_is_unknown_or_of_another_type_is_left_out():
    failure = Failure.from_json({"kind": "died", "rank": 3, "step": "7", "ranks": [1, "2"], "colour": "red"})
    assert failure == Failure("died", rank=3)
    with pytest.raises(ValueError, match='with a "kind"'):
        Failure.from_json({"rank": 3})
    with pytest.raises(ValueError, match='with a "kind"'):
        Failure.from_json([])


def test_long_texts_are_cut_where_they_say_least():
    failure = said("\n".join(f"line {n}" for n in range(999)), traceback="\n".join(f"frame {n}" for n in range(999)))
    assert failure.error.splitlines() == [f"line {n}" for n in range(40)]
    assert failure.traceback.splitlines() == [f"frame {n}" for n in range(939, 999)]


def test_the_file_is_whole_readable_by_all_and_names_cause_and_next_step(tmp_path):
    before = os.umask(0o077)
    try:
        failure = died(9, rank=3, host="node1", run="r1", error="内存不足：第 3 号进程", hints=["oom_kill 0 -> 1"])
        path = write(tmp_path, failure)
    finally:
        os.umask(before)
    assert path == tmp_path / "failure.json" and os.listdir(tmp_path) == ["failure.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert "内存不足：第 3 号进程" in path.read_text(encoding="utf-8")
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values["likely_cause"] == asdict(likely_cause(failure))
    assert values["likely_cause"]["title"] == "the host ran out of memory"
    assert read(path) == failure


def test_a_later_failure_of_the_same_run_does_not_take_the_place_of_the_first(tmp_path):
    first, later = at(3, said("first", run="r1")), at(4, said("later", run="r1"))
    path = write(tmp_path, first)
    assert write(tmp_path, later) == path and read(path) == first
    assert write(tmp_path, at(2, later)) and read(path).error == "later"
    assert write(tmp_path, first, replace=True) and read(path) == first
    assert write(tmp_path, replace(later, run="r2")) and read(path).run == "r2"
    assert os.listdir(tmp_path) == ["failure.json"]


def test_runs_without_an_id_are_never_the_same_run(tmp_path):
    write(tmp_path, at(1, said("last week's")))
    assert read(write(tmp_path, at(2, said("today's")))).error == "today's"


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"rank": 1}', "\udcff", "[" * 100_000])
def test_a_broken_record_is_none_and_is_replaced(tmp_path, broken):
    (tmp_path / "failure.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
    assert read(tmp_path / "failure.json") is None
    assert read(write(tmp_path, said("new", run="r1"))).error == "new"


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
    try:
        earlier = write(disk, said("small", run="r1"))
        kept = earlier.read_bytes()
        assert write(disk, said("large", run="r2", traceback="x" * 1999 + "\n" + "y" * 1999)) is None
        assert os.listdir(disk) == ["failure.json"] and earlier.read_bytes() == kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_disk_a_missing_folder_and_a_folder_in_the_way_are_none(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)], check=True)
    try:
        assert write(disk, said("x")) is None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert write(tmp_path / "missing", said("x")) is None and not (tmp_path / "missing").exists()
    (tmp_path / "failure.json").mkdir()
    assert write(tmp_path, said("x")) is None
    assert sorted(os.listdir(tmp_path)) == ["disk", "failure.json"]


def test_a_disk_without_hard_links_gets_the_record_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, later = at(1, said("first", run="r1")), at(2, said("later", run="r1"))
    assert read(write(tmp_path, first)) == first
    assert read(write(tmp_path, later)) == first


def test_many_writers_at_once_leave_the_record_of_one(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from finetune.diagnostics import Failure, write\n"
        "sys.stdin.read()\n"
        "assert write(sys.argv[2], Failure('died', 'x' * 3000, run='r', when='2026-01-01T00:00:00+00:00',"
        " rank=os.getpid()))\n"
    )
    command = [sys.executable, "-S", "-I", "-c", code, str(ROOT), str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(6)]
    for one in writers:
        one.stdin.close()
    assert [one.wait() for one in writers] == [0] * 6
    assert os.listdir(tmp_path) == ["failure.json"]
    assert read(tmp_path / "failure.json").rank in {one.pid for one in writers}


def test_it_needs_the_standard_library_alone_and_starts_fast():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from finetune import failures\n"
        "failures.page(failures.Failure('died', signal=9))\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    command = [sys.executable, "-S", "-I", "-X", "importtime", "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert {"finetune", "json"} <= found
    assert found - {"finetune"} <= set(sys.stdlib_module_names)
    taken = min(int(re.search(r"(\d+) \| +finetune\.failures$", _import_times(command), re.M)[1]) for _ in range(3))
    assert taken < 500_000  # microseconds; about 40,000 on an idle machine


def _import_times(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
