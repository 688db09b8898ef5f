"""Preparing by several processes: one writes, the others wait, and one that is killed leaves nothing that counts."""

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from finetune.chat_templates import CHATML, JinjaFormat, Renderer
from finetune.dataset import prepared_cache
from finetune.dataset.data_sources import find_sources
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.prepare_workers import BATCH_ROWS
from finetune.utils.errors import StorageError, exit_on_error
from tests.helpers.rows import write_rows
from tests.helpers.tiers import mostly_slow


def many(count: int) -> list[list[tuple[str, str]]]:
    """Distinct rows; every tenth is long."""
    return [
        [("human", f"Question {n}?"), ("model", f"Answer {n}. " * (40 if n % 10 == 0 else 1)), ("human", "More?")]
        + [("model", f"Yes, {n}.")]
        for n in range(count)
    ]


@pytest.fixture
def renderer(smol_tokenizer) -> Renderer:
    return Renderer(JinjaFormat(smol_tokenizer, CHATML, "chatml"), 100)


def prepared(path, renderer, cache, **options):
    return prepare_dataset(find_sources([str(path)]), renderer, cache_dir=cache, **options)


def _prepare_and_count(path, renderer, cache, count, results):
    began = []
    prepare_really = prepared_cache.CacheWriter.__enter__

    def counted(self):
        began.append(os.getpid())
        return prepare_really(self)

    prepared_cache.CacheWriter.__enter__ = counted
    data = prepared(path, renderer, cache)
    results.put((len(began), data.summary.rows))


def test_of_several_starts_at_once_one_prepares(tmp_path, renderer):
    path = write_rows(tmp_path / "a.json", many(1500))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    starts = [
        context.Process(target=_prepare_and_count, args=(path, renderer, tmp_path / "cache", 0, results))
        for _ in range(3)
    ]
    for one in starts:
        one.start()
    found = [results.get(timeout=120) for _ in starts]
    for one in starts:
        one.join()
    assert sorted(found) == [(0, 1500), (0, 1500), (1, 1500)]


def started(path, renderer, cache, processes):
    """A preparation in a process of its own that has begun to write."""
    writer = multiprocessing.get_context("fork").Process(
        target=_prepare_in_its_own_words, args=(path, renderer, cache), kwargs={"num_processes": processes}
    )
    writer.start()
    deadline = time.monotonic() + 60
    while not any(one.stat().st_size > 100_000 for one in cache.glob(f"*.part-*/{prepared_cache.EXAMPLES_FILE}")):
        assert time.monotonic() < deadline and writer.is_alive()
        time.sleep(0.005)
    return writer


def _prepare_in_its_own_words(path, renderer, cache, num_processes):
    with exit_on_error():
        prepared(path, renderer, cache, num_processes=num_processes)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_writer_that_is_killed_leaves_nothing_that_counts(tmp_path, renderer, processes):
    path = write_rows(tmp_path / "a.json", many(20_000))
    cache = tmp_path / "cache"
    writer = started(path, renderer, cache, processes)
    workers = children(writer.pid)
    assert len(workers) == (processes if processes > 1 else 0)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not list(cache.glob("*/" + prepared_cache.FACTS_FILE))
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a process outlived the one that started it"
        time.sleep(0.05)

    data = prepared(path, renderer, cache)

    assert data.summary.rows == 20_000
    assert not list(cache.glob("*.part-*"))


def test_a_killed_worker_is_one_error_and_nothing_is_left(tmp_path, renderer, capfd):
    path = write_rows(tmp_path / "a.json", many(20_000))
    writer = started(path, renderer, tmp_path / "cache", 2)
    os.kill(children(writer.pid)[0], signal.SIGKILL)
    writer.join(60)
    assert writer.exitcode == 1
    assert "error: a process that prepares data was killed (out of memory?): try --prep" in capfd.readouterr().err
    assert not list((tmp_path / "cache").glob("*/"))


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path, renderer):
    path = write_rows(tmp_path / "a.json", many(2000))

    def with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses to write more to a file
        with pytest.raises(StorageError, match="cache: File too large: make room, or name another folder with --data"):
            prepared(path, renderer, tmp_path / "cache")

    _in_a_process(with_little_room)
    assert not list((tmp_path / "cache").glob("*/"))


def _in_a_process(function) -> None:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("processes", mostly_slow([2, 3], [2]))
def test_several_processes_give_the_same_data_in_the_same_order(tmp_path, renderer, processes):
    rows = many(3 * BATCH_ROWS + 5)
    first = write_rows(tmp_path / "a.json", [*rows, rows[0], *[[("human", f"{n}"), ("human", "x")] for n in range(30)]])
    lines = [
        {"messages": [{"role": "user", "content": f"Café {n}?"}, {"role": "gpt", "content": "cafÃ©"}], "id": n}
        for n in range(600)
    ]
    lines[300]["messages"][0]["content"] = lines[0]["messages"][0]["content"]  # the same turns, in another batch
    lines[400]["id"], lines[5]["messages"] = 7, []
    deep = '{"id": "deep", "prompt": "a", "response": "b", "unread": ' + "[" * 900 + "]" * 900 + "}"
    second = tmp_path / "b.jsonl"
    second.write_text("\n".join([*map(json.dumps, lines), deep, "{", json.dumps(lines[9])]), "utf-8")
    given = {"sources": find_sources([str(first), str(second)]), "renderer": renderer, "bad_rows": "drop"}

    alone = prepare_dataset(**given, cache_dir=tmp_path / "one", num_processes=1)
    together = prepare_dataset(**given, cache_dir=tmp_path / "many", num_processes=processes)

    for name in (prepared_cache.EXAMPLES_FILE, prepared_cache.LEDGER_FILE, prepared_cache.FACTS_FILE):
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()
    assert together.summary.bad == 1 + 30 + 5 and together.notes
    assert (together.summary, together.notes, together.faults) == (alone.summary, alone.notes, alone.faults)


def test_an_error_in_a_worker_is_raised_with_its_place(tmp_path, renderer, monkeypatch):
    path = write_rows(tmp_path / "a.json", many(1000))
    monkeypatch.setattr(renderer, "render_all", lambda rows: 1 / 0)
    before = {*children(os.getpid())}
    with pytest.raises(ZeroDivisionError) as failed:
        prepared(path, renderer, tmp_path / "cache", num_processes=2)
    assert "in _work" in failed.value.__notes__[0]
    assert {*children(os.getpid())} <= before
