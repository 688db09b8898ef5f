"""Render batches of conversations to record batches, in this process or in several, in order.

Worker processes are forked: they share the tokenizer's memory, and none of them touches a device. At most two batches
per process are in flight, so memory does not grow with the data.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from finetune.chat_templates import RenderedConversation, Renderer
from finetune.conversation import BadRow, Conversation
from finetune.dataset.data_summary import DataTally
from finetune.dataset.prepared_cache import ledger_lines, record_batch
from finetune.utils.errors import FinetuneError
from finetune.utils.proc import die_with_parent

BATCH_ROWS = 256

_renderer: Renderer  # set in the parent before it forks


@dataclass(frozen=True)
class StoredBatch:
    """One record batch, its ledger lines and its counts."""

    examples: pa.RecordBatch
    ledger: list[str]
    tally: DataTally


def stored_batches(
    rows: Iterable[Conversation | BadRow], renderer: Renderer, num_processes: int
) -> Iterator[StoredBatch]:
    """Render all rows in order."""
    global _renderer
    iterator = iter(rows)
    batches = iter(lambda: list(islice(iterator, BATCH_ROWS)), [])
    if num_processes == 1:
        yield from (_store(batch, renderer) for batch in batches)
        return
    _renderer = renderer
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_set_up_worker) as pool:
        pending = deque(pool.submit(_store_in_worker, batch) for batch in islice(batches, 2 * num_processes))
        try:
            while pending:
                stored = pending.popleft().result()
                pending.extend(pool.submit(_store_in_worker, batch) for batch in islice(batches, 1))
                yield stored
        except BrokenProcessPool:
            raise FinetuneError(
                "a process that prepares data was killed (out of memory?): try --preprocessing_num_workers 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _set_up_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent()


def _store_in_worker(batch: Sequence[Conversation | BadRow]) -> StoredBatch:
    return _store(batch, _renderer)


def _store(batch: Sequence[Conversation | BadRow], renderer: Renderer) -> StoredBatch:
    conversations = [row for row in batch if isinstance(row, Conversation)]
    rendered = iter(renderer.render_all(conversations))
    rows = [next(rendered) if isinstance(row, Conversation) else row for row in batch]
    tally = DataTally()
    tally.add(rows)
    examples = record_batch(row for row in rows if isinstance(row, RenderedConversation))
    return StoredBatch(examples, ledger_lines(rows), tally)
