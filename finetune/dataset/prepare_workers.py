"""Check and render batches of raw rows to record batches, in this process or in several, in order.

Worker processes are forked: they share the tokenizer's memory, and none of them touches a device. This process reads
and decodes rows and finds duplicates; a worker checks the rows of a batch by themselves, sends what decides whether
they are duplicates, and renders them once it is told. Memory does not grow with the data: a worker has one batch, and
at most two batches per worker are between the first that is not yet stored and the last.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

import pyarrow as pa

from finetune.chat_templates import RenderedConversation, Renderer
from finetune.conversation import Conversation
from finetune.dataset.conversation_reader import CheckedRow, ConversationReader
from finetune.dataset.data_summary import DataTally
from finetune.dataset.prepared_cache import ledger_lines, record_batch
from finetune.dataset.read_counts import ReadCounts
from finetune.utils.errors import FinetuneError
from finetune.utils.proc import die_with_parent

BATCH_ROWS = 256
FirstRows = Sequence[tuple[int | None, int | None]]


@dataclass(frozen=True)
class StoredBatch:
    """One record batch, its ledger lines and its counts."""

    examples: pa.RecordBatch
    ledger: list[str]
    tally: DataTally
    counts: ReadCounts


def stored_batches(
    reader: ConversationReader, renderer: Renderer, num_processes: int, limit: int | None = None
) -> Iterator[StoredBatch]:
    """Check and render all rows in order, or the first `limit`; they are counted in `reader.counts`."""
    rows = islice(reader.raw_rows(), limit)
    batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
    stored = (
        _store_here(batches, reader, renderer)
        if num_processes == 1
        else _Workers(reader, renderer, num_processes).store(batches)
    )
    for batch in stored:
        reader.counts.merge(batch.counts)
        yield batch


def _store_here(batches: Iterator[list[Any]], reader: ConversationReader, renderer: Renderer) -> Iterator[StoredBatch]:
    for batch in batches:
        checked = [reader.check(*row) for row in batch]
        yield _store(checked, [reader.first_rows(row.keys) for row in checked], reader, renderer)


def _store(
    checked: Sequence[CheckedRow], first_rows: FirstRows, reader: ConversationReader, renderer: Renderer
) -> StoredBatch:
    counts = ReadCounts()
    batch = [reader.finish(row, first, counts) for row, first in zip(checked, first_rows, strict=True)]
    rendered = iter(renderer.render_all([row for row in batch if isinstance(row, Conversation)]))
    rows = [next(rendered) if isinstance(row, Conversation) else row for row in batch]
    tally = DataTally()
    tally.add(rows)
    examples = record_batch(row for row in rows if isinstance(row, RenderedConversation))
    return StoredBatch(examples, ledger_lines(rows), tally, counts)


class _Workers:
    """Processes that each check and render one batch at a time."""

    def __init__(self, reader: ConversationReader, renderer: Renderer, count: int) -> None:
        self.reader, self.count = reader, count
        self._processes, self._idle = [], []
        context = multiprocessing.get_context("fork")
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, reader, renderer), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the connection
            self._processes.append(process)
            self._idle.append(here)

    def store(self, batches: Iterator[list[Any]]) -> Iterator[StoredBatch]:
        try:
            yield from self._store(batches)
        except (EOFError, ConnectionError):
            raise FinetuneError(
                "a process that prepares data was killed (out of memory?): try --preprocessing_num_workers 1"
            ) from None
        finally:
            for process in self._processes:
                process.kill()
                process.join()

    def _store(self, batches: Iterator[list[Any]]) -> Iterator[StoredBatch]:
        number_of: dict[Connection, int] = {}  # the batch that a worker has
        keys: dict[int, tuple[Connection, list[Any]]] = {}
        stored: dict[int, StoredBatch] = {}
        given = compared = done = 0
        batch = next(batches, None)
        while batch or number_of:
            while batch and self._idle and given < done + 2 * self.count:
                connection = self._idle.pop()
                _send(connection, batch)
                number_of[connection] = given
                given += 1
                batch = next(batches, None)
            ready = wait([*number_of])
            for connection in [busy for busy in number_of if busy in ready]:
                message = connection.recv()
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, StoredBatch):
                    stored[number_of.pop(connection)] = message
                    self._idle.append(connection)
                else:
                    keys[number_of[connection]] = connection, message
            while compared in keys:
                connection, of_batch = keys.pop(compared)
                connection.send([self.reader.first_rows(row_keys) for row_keys in of_batch])
                compared += 1
            while done in stored:
                yield stored.pop(done)
                done += 1


def _send(connection: Connection, batch: list[Any]) -> None:
    """Send raw rows; pickling takes two frames where decoding JSON takes one, so what was decoded may be too deep."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(4 * limit)
    try:
        connection.send(batch)
    finally:
        sys.setrecursionlimit(limit)


def _work(connection: Connection, reader: ConversationReader, renderer: Renderer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()
    try:
        while True:
            checked = [reader.check(*row) for row in connection.recv()]
            connection.send([row.keys for row in checked])
            connection.send(_store(checked, connection.recv(), reader, renderer))
    except BaseException as error:
        error.add_note(traceback.format_exc())
        connection.send(error)
