"""Prepared data on disk: one folder per data set, written by one process, opened by many.

    <cache>/<key>/examples.arrow   one row per example (Arrow IPC stream, memory-mapped by readers)
    <cache>/<key>/ledger.jsonl     one line per row of the data that was changed, cut, split or dropped
    <cache>/<key>/facts.json       written last: the summary, and size and CRC-32 of the other two
    <cache>/<key>.lock             held by the writing process; the others wait for it, outside any collective

A complete folder appears by one rename. A writer that dies leaves a `.part-` folder and a free lock; the next writer
removes the folder.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import socket
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from xxhash import xxh3_64_digest

from finetune.chat_templates import Example, RenderedConversation, TurnSpan, supervised_turns_of
from finetune.conversation import BadRow, answer_numbers
from finetune.dataset.collator import MAX_ANSWERS
from finetune.utils.errors import StorageError, os_reason

logger = logging.getLogger(__name__)

EXAMPLES_FILE, LEDGER_FILE, FACTS_FILE = "examples.arrow", "ledger.jsonl", "facts.json"
RENDERED = ["input_ids", "labels", "row", "window", "source", "turn_spans", "id"]
POLL_SECONDS = 0.2
LOCAL_RANK_0_SECONDS = 1.0


def record_batch(renderings: Iterable[RenderedConversation]) -> pa.RecordBatch:
    """Build an Arrow record batch of all examples.

    Columns: `input_ids`, `labels` (lists of int32), `length`, `num_supervised`, `row`, `window` (int32), `source` and
    `id` (strings; the id as JSON), `turn_spans` (a list of {turn, role, start, stop, note}), `answer_numbers` (a list
    of uint8, one per supervised token: which answer of its conversation it belongs to, from 0; see `LossCells`),
    `weights` (a list of doubles, one per supervised token; empty if all are 1).
    """
    rendered = [(rendering, example) for rendering in renderings for example in rendering.examples]
    examples = [example for _, example in rendered]
    answers: dict[int, dict[int, int]] = {}  # the number of each answer, by the id of its rendering
    for rendering, _ in rendered:
        if id(rendering) not in answers:
            spans = [span for example in rendering.examples for span in example.turn_spans]
            answers[id(rendering)] = answer_numbers({span.turn: span.role for span in spans})
    starts = _offsets([len(example.input_ids) for example in examples])
    input_ids, labels = (_token_values(examples, name) for name in ("input_ids", "labels"))
    supervised_starts = _offsets(labels >= 0)[starts]
    span_starts = _offsets([len(example.turn_spans) for example in examples])
    spans = [span for example in examples for span in example.turn_spans]
    first_tokens = np.array([span.start for span in spans], np.int32)
    is_model = np.array([span.role in ("model", "text") for span in spans], bool)
    numbers = [
        answers[id(rendering)].get(span.turn, 1) for rendering, example in rendered for span in example.turn_spans
    ]
    answer_of_tokens = supervised_turns_of(
        labels,
        np.array([min(number, MAX_ANSWERS) - 1 for number in numbers], np.uint8)[is_model],
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
                    pa.array([span.note for span in spans], pa.string()),
                ],
                ["turn", "role", "start", "stop", "note"],
            ),
        ),
        "answer_numbers": pa.ListArray.from_arrays(supervised_starts, answer_of_tokens),
        "weights": pa.array([example.weights for example in examples], pa.list_(pa.float64())),
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
    """One JSON line per row that was changed, cut, split or dropped."""
    names = ("source", "row", "id", "status", "reason")
    entries = ({name: getattr(row, name) for name in names} for row in rows if row.reason and row.row is not None)
    return [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]


class CacheWriter:
    """Writes one folder of prepared data; it appears with `commit`, and nothing is left without it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part = folder.with_name(f"{folder.name}.part-{socket.gethostname()}-{os.getpid()}")
        self._stream: Any = None

    def __enter__(self) -> CacheWriter:
        for stale in self.folder.parent.glob(f"{self.folder.name}.part-*"):  # this process holds the lock
            shutil.rmtree(stale, ignore_errors=True)
        self.part.mkdir(parents=True)
        self._examples, self._ledger = ((self.part / name).open("wb") for name in (EXAMPLES_FILE, LEDGER_FILE))
        return self

    def add(self, batch: pa.RecordBatch, ledger: Sequence[str]) -> None:
        """Append a record batch and its ledger lines."""
        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._examples, batch.schema)
        if batch.num_rows:
            self._stream.write_batch(batch)
        self._ledger.write("".join(ledger).encode("utf-8"))

    def commit(self, facts: dict[str, Any]) -> None:
        """Close the files, write the facts, and rename the folder into place."""
        if self._stream is not None:
            self._stream.close()
        self._examples.close()
        self._ledger.close()
        files = {name: _checksum(self.part / name) for name in (EXAMPLES_FILE, LEDGER_FILE)}
        (self.part / FACTS_FILE).write_text(json.dumps({**facts, "files": files}, ensure_ascii=False), "utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.part, self.folder)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        for file in (self._examples, self._ledger):
            with suppress(OSError):  # buffered bytes need not reach a full disk
                file.close()


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder; None if there is none, or if its files are not what was written."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text("utf-8"))
        is_intact = all(_checksum(folder / name) == checks for name, checks in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if is_intact else None


def _checksum(path: Path) -> dict[str, int]:
    """Size and CRC-32, which detect what a crash of the machine loses: the files are not synced."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": crc}


def is_cached(folder: Path) -> bool:
    """Whether the folder has been written; `read_facts` verifies it."""
    return (folder / FACTS_FILE).is_file()


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Wait until the folder exists or this process holds its lock; yields whether this process is the writer."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        if int(os.environ.get("LOCAL_RANK", "0")) and not is_cached(folder):
            time.sleep(LOCAL_RANK_0_SECONDS)  # local rank 0, which prints, comes first
        has_told = False
        while not is_cached(folder):
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                if not has_told:
                    logger.warning(f"another process prepares this data: waiting for it ({lock.lock_file})")
                    has_told = True
                time.sleep(POLL_SECONDS)
    except (OSError, NotImplementedError) as error:
        reason = os_reason(error, folder.parent) if isinstance(error, OSError) else error
        raise StorageError(
            f"the folder of prepared data {folder.parent}: {reason}: name another with --data_cache_dir"
        ) from error
    try:
        yield lock.is_locked and not is_cached(folder)
    finally:
        lock.release()


def clear_damaged(folder: Path) -> None:
    """Remove a damaged folder, unless another process has just replaced it."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if read_facts(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def read_renderings(folder: Path, sources: Sequence[str]) -> Iterator[RenderedConversation]:
    """Every row of the data in order, from the examples and the ledger; `sources` in the order they were read."""
    with open(folder / LEDGER_FILE, encoding="utf-8") as lines:
        yield from renderings_of(read_batches(folder), lines, sources)


def renderings_of(
    batches: Iterable[pa.RecordBatch], ledger_lines: Iterable[str], sources: Sequence[str]
) -> Iterator[RenderedConversation]:
    """The rows of these examples and these lines of the ledger, in the order of the data."""
    order = {source: index for index, source in enumerate(sources)}
    ledger = map(json.loads, ledger_lines)
    entry = next(ledger, None)
    stored = (values for batch in batches for values in batch.select(RENDERED).to_pylist())
    for (source, row), windows in groupby(stored, _key_of):
        first, *others = windows
        examples = tuple(map(example_of, [first, *others]))
        while entry is not None and (order[entry["source"]], entry["row"]) < (order[source], row):
            yield _from_entry(entry)
            entry = next(ledger, None)
        if entry is not None and _key_of(entry) == (source, row):
            yield _from_entry(entry, examples)
            entry = next(ledger, None)
        else:
            yield RenderedConversation(row, json.loads(first["id"]), "kept", examples, None, source)
    while entry is not None:
        yield _from_entry(entry)
        entry = next(ledger, None)


def read_not_kept(folder: Path) -> Iterator[RenderedConversation]:
    """The rows that were cut, split or dropped, in order, without their examples."""
    with open(folder / LEDGER_FILE, encoding="utf-8") as lines:
        yield from (_from_entry(entry) for entry in map(json.loads, lines) if entry["status"] != "kept")


def read_some(folder: Path, examples: Any, count: int, seed: int) -> list[RenderedConversation]:
    """Up to `count` rows with examples, drawn by `seed`; reads only those from `examples`, a `datasets.Dataset`."""
    drawn = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    sampled: dict[tuple[str, int], RenderedConversation] = {}
    for index in sorted(drawn):
        first = examples[index]
        key = _key_of(first)
        if key not in sampled:
            begin, stop = index, index + 1
            while begin and _key_of(examples[begin - 1]) == key:
                begin -= 1
            while stop < len(examples) and _key_of(examples[stop]) == key:
                stop += 1
            windows = tuple(map(example_of, examples.select(range(begin, stop))))
            sampled[key] = RenderedConversation(key[1], json.loads(first["id"]), "kept", windows, None, key[0])
    row_numbers = re.compile("|".join(f'"row": {row},' for _, row in sampled) or "$^")
    with open(folder / LEDGER_FILE, encoding="utf-8") as lines:
        for entry in map(json.loads, filter(row_numbers.search, lines)):
            key = _key_of(entry)
            if key in sampled:
                sampled[key] = _from_entry(entry, sampled[key].examples)
    return list(sampled.values())


def _key_of(values: dict[str, Any]) -> tuple[str, int]:
    return values["source"], values["row"]


def example_of(values: dict[str, Any]) -> Example:
    """The example in a row of the stored table."""
    spans = tuple(TurnSpan(**span) for span in values["turn_spans"])
    weights = tuple(values.get("weights", ()))  # version 0.1 had none
    return Example(
        values["input_ids"], values["labels"], values["row"], values["source"], values["window"], spans, weights
    )


def _from_entry(entry: dict[str, Any], examples: tuple[Example, ...] = ()) -> RenderedConversation:
    return RenderedConversation(entry["row"], entry["id"], entry["status"], examples, entry["reason"], entry["source"])


def read_batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The examples as memory-mapped record batches, in order."""
    if (folder / EXAMPLES_FILE).stat().st_size:
        with pa.memory_map(str(folder / EXAMPLES_FILE)) as file, pa.ipc.open_stream(file) as batches:
            yield from batches


def int_column(examples: Any, name: str) -> np.ndarray:
    """A column of integers of a `datasets.Dataset`, int64 [rows]; its own access takes 50 s for a million selected."""
    column = examples.data[name].to_numpy().astype(np.int64)
    return column if examples._indices is None else column[examples._indices[0].to_numpy()]


def example_digests(folder: Path) -> Iterator[bytes]:
    """A digest of the token ids and labels of each example, in order."""
    for batch in read_batches(folder):
        columns = [np.from_dlpack(batch[name].values) for name in ("input_ids", "labels")]
        for start, stop in pairwise(batch["input_ids"].offsets.to_pylist()):
            yield b"".join(xxh3_64_digest(column[start:stop].tobytes()) for column in columns)
