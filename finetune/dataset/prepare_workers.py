"""Batches of conversations -> what is stored of them, here or in several processes, in order.

The processes are forked: they share the tokenizer's memory, and none of them touches a device. At most two batches a
process wait at a time, so memory stays flat however long the data is.
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
from typing import Any

from finetune.chat_templates import RenderedConversation, Renderer
from finetune.conversation import BadRow, Conversation
from finetune.dataset.data_summary import DataTally
from finetune.dataset.prepared_cache import ledger_lines, record_batch
from finetune.utils.errors import FinetuneError
from finetune.utils.proc import die_with_parent

BATCH_ROWS = 256

_renderer: Renderer | None = None  # set in the parent before it forks


@dataclass(frozen=True)
class StoredBatch:
    """One record batch, its ledger lines and its counts."""

    examples: Any
    ledger: list[str]
    tally: DataTally


def stored_batches(
    rows: Iterable[Conversation | BadRow], renderer: Renderer, num_processes: int
) -> Iterator[StoredBatch]:
    """Render all rows, in order.

    Raises:
        FinetuneError: a process died (most often: out of memory).
    """
    global _renderer
    iterator = iter(rows)
    batches = iter(lambda: list(islice(iterator, BATCH_ROWS)), [])
    if num_processes == 1:
        yield from (_store(batch, renderer) for batch in batches)
        return
    _renderer = renderer
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin) as pool:
        waiting = deque(pool.submit(_store, batch) for batch in islice(batches, 2 * num_processes))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(_store, batch) for batch in islice(batches, 1))
                yield done
        except BrokenProcessPool:
            raise FinetuneError(
                "a process that prepares data was killed (out of memory?): try --preprocessing_num_workers 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    die_with_parent()


def _store(batch: Sequence[Conversation | BadRow], renderer: Renderer | None = None) -> StoredBatch:
    conversations = [row for row in batch if isinstance(row, Conversation)]
    rendered = iter((renderer or _renderer).render_all(conversations))
    rows = [next(rendered) if isinstance(row, Conversation) else row for row in batch]
    tally = DataTally()
    tally.add(rows)
    return StoredBatch(
        record_batch(row for row in rows if isinstance(row, RenderedConversation)), ledger_lines(rows), tally
    )
