"""Prepared data on disk: one folder per data set, written whole by one process, opened by many.

    <cache>/<key>/examples.arrow   one row per example (Arrow IPC stream, memory-mapped by readers)
    <cache>/<key>/ledger.jsonl     one line per row of the data that was not kept whole and as it stood
    <cache>/<key>/facts.json       written last: the summary, and size and CRC-32 of the other two
    <cache>/<key>.lock             held by the process that writes; the others wait for it, in no collective

A folder appears by one rename, complete. A writer that dies leaves a `.part-` folder and a lock that is free again;
the next one clears up and writes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import socket
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from finetune.chat_templates import Example, RenderedConversation, TurnSpan, supervised_turns_of
from finetune.conversation import BadRow, answer_number
from finetune.dataset.loss_cells import MAX_ANSWERS
from finetune.utils.errors import StorageError

logger = logging.getLogger(__name__)

EXAMPLES_FILE, LEDGER_FILE, FACTS_FILE = "examples.arrow", "ledger.jsonl", "facts.json"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_FOR_LOCAL_RANK_0 = 1.0


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/finetune/data`, by default under ~/.cache; under /tmp where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune" / "data"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, a user without one
        return Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}" / "data"
    return folder


def record_batch(renderings: Iterable[RenderedConversation]) -> pa.RecordBatch:
    """Examples as one Arrow record batch.

    Columns: `input_ids`, `labels` (lists of int32), `length`, `num_supervised`, `row`, `window` (int32), `source` and
    `id` (strings; the id as JSON), `turn_spans` (a list of {turn, role, start, stop}), `answer_numbers` (a list of
    uint8, one per supervised token: which answer of its conversation it belongs to, from 0; see `loss_cells`).
    """
    rendered = [(rendering, example) for rendering in renderings for example in rendering.examples]
    examples = [example for _, example in rendered]
    starts = _offsets([len(example.input_ids) for example in examples])
    input_ids, labels = (_token_values(examples, name) for name in ("input_ids", "labels"))
    supervised_starts = _offsets(labels >= 0)[starts]
    span_starts = _offsets([len(example.turn_spans) for example in examples])
    spans = [span for example in examples for span in example.turn_spans]
    first_tokens = np.array([span.start for span in spans], np.int32)
    is_model = np.array([span.role == "model" for span in spans], bool)
    answer_numbers = supervised_turns_of(
        labels,
        np.array([min(answer_number(span.turn), MAX_ANSWERS) - 1 for span in spans], np.uint8)[is_model],
        (first_tokens + np.repeat(starts[:-1], np.diff(span_starts)))[is_model],
    )
    columns = {
        "input_ids": pa.ListArray.from_arrays(starts, input_ids),
        "labels": pa.ListArray.from_arrays(starts, labels),
        "length": np.diff(starts),
        "num_supervised": np.diff(supervised_starts),
        "row": pa.array([example.row for example in examples], pa.int32()),
        "window": pa.array([example.window for example in examples], pa.int32()),
        "source": pa.array([example.source for example in examples], pa.string()),
        "id": pa.array([json.dumps(rendering.id, ensure_ascii=False) for rendering, _ in rendered], pa.string()),
        "turn_spans": pa.ListArray.from_arrays(
            span_starts,
            pa.StructArray.from_arrays(
                [
                    pa.array([span.turn for span in spans], pa.int32()),
                    pa.array([span.role for span in spans], pa.string()),
                    pa.array(first_tokens),
                    pa.array([span.stop for span in spans], pa.int32()),
                ],
                ["turn", "role", "start", "stop"],
            ),
        ),
        "answer_numbers": pa.ListArray.from_arrays(supervised_starts, answer_numbers),
    }
    return pa.record_batch(columns)


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Arrow's offsets of lists with these lengths, int32 [lists + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _token_values(examples: Sequence[Example], name: str) -> np.ndarray:
    values = array("i")
    for example in examples:
        values.fromlist(getattr(example, name))
    return np.frombuffer(values, np.int32) if values else np.empty(0, np.int32)


def ledger_lines(rows: Iterable[RenderedConversation | BadRow]) -> list[str]:
    """One JSON line per row that was not kept whole and as it stood."""
    lines = []
    for row in rows:
        if isinstance(row, BadRow):
            status, reason = "dropped", "; ".join(row.faults)
        else:
            status, reason = row.status, row.reason
        if reason is not None:
            entry = {"source": row.source, "row": row.row, "id": row.id, "status": status, "reason": reason}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return lines


class CacheWriter:
    """Writes one store; `commit` makes it appear, leaving the block without it leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part = folder.with_name(f"{folder.name}.part-{socket.gethostname()}-{os.getpid()}")
        self._stream: Any = None

    def __enter__(self) -> CacheWriter:
        for left in self.folder.parent.glob(f"{self.folder.name}.part-*"):  # the lock is ours: nobody writes there
            shutil.rmtree(left, ignore_errors=True)
        self.part.mkdir(parents=True)
        self._examples, self._ledger = _Checked(self.part / EXAMPLES_FILE), _Checked(self.part / LEDGER_FILE)
        return self

    def add(self, batch: pa.RecordBatch, ledger: Sequence[str]) -> None:
        """Append a record batch and its ledger lines."""
        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._examples, batch.schema)
        if batch.num_rows:
            self._stream.write_batch(batch)
        self._ledger.write("".join(ledger).encode("utf-8"))

    def commit(self, facts: dict[str, Any]) -> None:
        """Close the files, write the facts, rename the folder into place."""
        if self._stream is not None:
            self._stream.close()
        files = {one.path.name: one.close() for one in (self._examples, self._ledger)}
        (self.part / FACTS_FILE).write_text(json.dumps({**facts, "files": files}, ensure_ascii=False), "utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.part, self.folder)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        for one in (self._examples, self._ledger):
            with suppress(OSError):  # what is still buffered need not reach a full disk
                one.file.close()


class _Checked:
    """A file that knows its size and CRC-32 once it is closed."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open(path, "wb")
        self.size = self.crc = 0
        self.closed = False

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.crc = zlib.crc32(data, self.crc)
        self.size += written
        self.file.write(data)
        return written

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> dict[str, int]:
        self.file.close()  # not synced: what a crash of the machine loses, the checksum finds
        return {"size": self.size, "crc32": self.crc}


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of a whole store; None where there is none, or its files are not what was written."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text("utf-8"))
        whole = all(_is_whole(folder / name, **known) for name, known in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if whole else None


def _is_whole(path: Path, *, size: int, crc32: int) -> bool:
    if path.stat().st_size != size:
        return False
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found == crc32


def is_cached(folder: Path) -> bool:
    """Whether the store has been written; `read_facts` says whether it still is what was written."""
    return (folder / FACTS_FILE).is_file()


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Wait until the store is there or this process alone may write it; yields whether it is to write.

    Raises:
        StorageError: the folder of stores cannot be written, or has no file locks.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        if int(os.environ.get("LOCAL_RANK", "0")) and not is_cached(folder):
            time.sleep(SECONDS_FOR_LOCAL_RANK_0)  # so that the rank that speaks comes first
        told = False
        while not is_cached(folder):
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                if not told:
                    logger.warning(f"another process prepares this data: waiting for it ({lock.lock_file})")
                    told = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
    except (OSError, NotImplementedError) as error:
        raise StorageError(
            f"the folder of prepared data {folder.parent}: {error}: name another with --data_cache_dir"
        ) from error
    try:
        yield lock.is_locked and not is_cached(folder)
    finally:
        lock.release()


def clear_damaged(folder: Path) -> None:
    """Remove a store whose files are not what was written, unless another process has just replaced it."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if read_facts(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def read_renderings(folder: Path, sources: Sequence[str]) -> Iterator[RenderedConversation]:
    """Every row of the data in order, from the examples and the ledger; `sources` in the order they were read."""
    place = {source: number for number, source in enumerate(sources)}
    ledger = _ledger_entries(folder / LEDGER_FILE)
    entry = next(ledger, None)
    for source, row, examples, row_id in _examples_by_row(folder / EXAMPLES_FILE):
        while entry is not None and (place[entry["source"]], entry["row"]) < (place[source], row):
            yield _from_entry(entry)
            entry = next(ledger, None)
        if entry is not None and (entry["source"], entry["row"]) == (source, row):
            yield _from_entry(entry, examples)
            entry = next(ledger, None)
        else:
            yield RenderedConversation(row, row_id, "kept", examples, None, source)
    while entry is not None:
        yield _from_entry(entry)
        entry = next(ledger, None)


def read_some(folder: Path, examples: Any, count: int, seed: int) -> list[RenderedConversation]:
    """Up to `count` rows with examples, drawn by `seed`; `examples` is the dataset of them, of which few are read."""
    drawn = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    found: dict[tuple[str, int], RenderedConversation] = {}
    for place in sorted(drawn):
        first = examples[place]
        key = _key_of(first)
        if key not in found:
            begin, stop = place, place + 1
            while begin and _key_of(examples[begin - 1]) == key:
                begin -= 1
            while stop < len(examples) and _key_of(examples[stop]) == key:
                stop += 1
            windows = tuple(map(_example, examples.select(range(begin, stop))))
            found[key] = RenderedConversation(
                first["row"], json.loads(first["id"]), "kept", windows, None, first["source"]
            )
    numbers = re.compile("|".join(f'"row": {row},' for _, row in found) or "$^")
    with open(folder / LEDGER_FILE, encoding="utf-8") as lines:
        for entry in map(json.loads, filter(numbers.search, lines)):
            key = _key_of(entry)
            if key in found:
                found[key] = _from_entry(entry, found[key].examples)
    return list(found.values())


def _key_of(values: dict[str, Any]) -> tuple[str, int]:
    return values["source"], values["row"]


def _example(values: dict[str, Any]) -> Example:
    spans = tuple(TurnSpan(**span) for span in values["turn_spans"])
    return Example(values["input_ids"], values["labels"], values["row"], values["source"], values["window"], spans)


def _from_entry(entry: dict[str, Any], examples: tuple[Example, ...] = ()) -> RenderedConversation:
    return RenderedConversation(entry["row"], entry["id"], entry["status"], examples, entry["reason"], entry["source"])


def _ledger_entries(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _examples_by_row(path: Path) -> Iterator[tuple[str, int, tuple[Example, ...], Any]]:
    if not path.stat().st_size:
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        read = (pair for batch in batches for pair in _examples_of(batch))
        for (source, row), pairs in groupby(read, lambda pair: (pair[0].source, pair[0].row)):
            examples, ids = zip(*pairs, strict=True)
            yield source, row, examples, json.loads(ids[0])


def _examples_of(batch: Any) -> Iterator[tuple[Example, str]]:
    """A record batch's examples, each with its row's id as JSON."""

    def lists(name: str) -> list[list[int]]:
        # Not `to_numpy`, which imports pandas.
        values, bounds = np.from_dlpack(batch[name].values), np.from_dlpack(batch[name].offsets)
        return [values[start:stop].tolist() for start, stop in zip(bounds, bounds[1:], strict=False)]

    fields = [batch["turn_spans"].values.field(name).to_pylist() for name in ("turn", "role", "start", "stop")]
    spans, bounds = [TurnSpan(*one) for one in zip(*fields, strict=True)], batch["turn_spans"].offsets.to_pylist()
    columns = [batch[name].to_pylist() for name in ("row", "source", "window", "id")]
    input_ids, labels = lists("input_ids"), lists("labels")
    for place, (row, source, window, row_id) in enumerate(zip(*columns, strict=True)):
        own = tuple(spans[bounds[place] : bounds[place + 1]])
        yield Example(input_ids[place], labels[place], row, source, window, own), row_id
