"""Conversation files -> examples on disk, prepared once: read, rendered, proven, counted, cached."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from finetune.chat_templates import RenderedConversation, Renderer
from finetune.dataset import prepared_cache
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import Source, fingerprint_sources
from finetune.dataset.data_summary import DataSummary, DataTally
from finetune.dataset.prepare_workers import stored_batches
from finetune.utils.errors import DataError, StorageError, format_faults

logger = logging.getLogger(__name__)

SECONDS_BEFORE_A_BAR = 2.0
BAR = "preparing data {percentage:3.0f}% |{bar}| {postfix[0]} [{elapsed}<{remaining}]"
PARTS_OF_THE_BAR = 1000
# Below this many bytes of data, starting processes costs more than it saves.
BYTES_FOR_PROCESSES = 16 << 20
MOST_PROCESSES = 8

BadRows = Literal["error", "drop"]


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run on disk, and what the user must be able to read about them."""

    folder: Path
    sources: tuple[Source, ...]
    summary: DataSummary
    notes: tuple[str, ...]
    faults: tuple[str, ...]
    fingerprint: str
    left_out: tuple[tuple[str, int], ...] = ()  # (source, row) of those that the run is told not to learn
    validation_share: float = 0.0  # of the conversations, held out of every epoch
    evaluation: PreparedData | None = None  # held-out data of its own
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def examples(self) -> Any:
        """A `datasets.Dataset` over the memory-mapped examples, in the order of the data."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / prepared_cache.EXAMPLES_FILE))

    @property
    def fingerprints(self) -> str:
        """Of the data and, where there are some of their own, of the held-out data."""
        return self.fingerprint if self.evaluation is None else f"{self.fingerprint} {self.evaluation.fingerprint}"

    @property
    def longest(self) -> int:
        """Tokens of the longest example, one that is held out not excepted."""
        return max(self.summary.longest, 0 if self.evaluation is None else self.evaluation.summary.longest)

    def renderings(self) -> Iterator[RenderedConversation]:
        """Every row of the data in order, the dropped ones too."""
        return prepared_cache.read_renderings(self.folder, list(self.summary.rows_by_source))

    def sample(self, count: int, seed: int) -> list[RenderedConversation]:
        """Some rows that have examples, drawn by `seed`, in the order of the data; only those are read."""
        return prepared_cache.read_some(self.folder, self.examples, count, seed)

    def epoch(self, seed: int) -> Any:
        """The examples of an epoch: with weight 2 a source's come twice, with 0.5 half of them, drawn by `seed`.

        Raises:
            DataError: the weights leave no example.
        """
        weights = {source.name: source.weight for source in self.sources}
        is_learned = np.ones(len(self.examples), dtype=bool)
        is_learned[self._held_out_places(seed)] = False
        if set(weights.values()) == {1.0}:
            return self.examples if is_learned.all() else self.examples.select(np.flatnonzero(is_learned))
        chosen: list[int] = []
        begin = 0
        for name, count in self.summary.examples_by_source.items():
            here = range(begin, begin + count)
            whole, rest = divmod(weights[name], 1)
            drawn = random.Random(f"{seed} {name}").sample(here, round(rest * count))
            chosen += [*here] * int(whole) + sorted(drawn)
            begin += count
        places = np.asarray(chosen, dtype=np.int64)
        places = places[is_learned[places]]
        if not len(places):
            raise DataError("the weights of --data_path leave no example of an epoch: raise one of them")
        return self.examples.select(places)

    def held_out(self, seed: int) -> tuple[Any, list[str]] | None:
        """Examples to evaluate on and the sources they come from; None where nothing is held out.

        A share is of conversations, drawn by `seed`: all windows of one are on the same side.
        """
        if self.evaluation is not None:
            return self.evaluation.examples, list(self.evaluation.summary.examples_by_source)
        if not self.validation_share:
            return None
        return self.examples.select(self._held_out_places(seed)), list(self.summary.examples_by_source)

    def _held_out_places(self, seed: int) -> np.ndarray:
        """Places of the held-out examples, int64, ascending; drawn once.

        Raises:
            DataError: the share leaves no conversation on one of the two sides.
        """
        if seed not in self._drawn:
            self._drawn[seed] = self._draw(seed) if self.validation_share else np.zeros(0, dtype=np.int64)
        return self._drawn[seed]

    def _draw(self, seed: int) -> np.ndarray:
        rows = np.asarray(self.examples.with_format("numpy")["row"][:])
        source = np.repeat(
            np.arange(len(self.summary.examples_by_source)), list(self.summary.examples_by_source.values())
        )
        begins = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(source, prepend=-1))
        wanted = round(self.validation_share * len(begins))
        if not 0 < wanted < len(begins):
            raise DataError(
                f"--validation_share {self.validation_share:g}: {wanted} of {len(begins)} conversations would be held "
                "out: give another share, or data of its own with --eval_data_path"
            )
        drawn = random.Random(f"{seed} held out").sample(range(len(begins)), wanted)
        ends = np.append(begins[1:], len(rows))
        return np.concatenate([np.arange(begins[one], ends[one]) for one in sorted(drawn)])

    def copy_ledger(self, path: Path) -> None:
        """The ledger: one JSON line per row that was not kept whole and as it stood.

        Raises:
            StorageError: the disk refused.
        """
        try:
            shutil.copyfile(self.folder / prepared_cache.LEDGER_FILE, path)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None


def prepare_dataset(
    sources: Sequence[Source],
    renderer: Renderer,
    *,
    bad_rows: BadRows = "error",
    repairs: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    num_processes: int | None = None,
) -> PreparedData:
    """Read, render and prove all rows, or open what an earlier start has prepared of the same data in the same way.

    Raises:
        DataError: every bad row under `bad_rows="error"` (the first 20 shown), a file that cannot be read; or no
            example is left.
        StorageError: the cache cannot be written.
    """
    data = fingerprint_sources(sources)
    key = _key(data, sources, renderer, bad_rows, repairs)
    folder = Path(cache_dir or prepared_cache.default_folder()).expanduser() / key
    while True:
        if prepared_cache.is_cached(folder):
            facts = prepared_cache.read_facts(folder)
            if facts is not None:
                return _opened(folder, sources, facts, data)
            logger.warning(f"the prepared data in {folder} is damaged: it is prepared again")
            prepared_cache.clear_damaged(folder)
        with prepared_cache.only_writer(folder) as is_writer:
            if is_writer:
                processes = num_processes or _num_processes(sources)
                gc.freeze()  # what the libraries hold need not be copied on a fork
                gc.enable()
                _write(folder, ConversationReader(sources, repairs=repairs), renderer, bad_rows, processes)


def _write(folder: Path, reader: ConversationReader, renderer: Renderer, bad_rows: BadRows, processes: int) -> None:
    tally = DataTally()
    try:
        with prepared_cache.CacheWriter(folder) as writer:
            for batch in _with_bar(stored_batches(reader, renderer, processes), reader, tally):
                tally.merge(batch.tally)
                writer.add(batch.examples, batch.ledger)
            if tally.unreadable or (bad_rows == "error" and tally.num_faults):
                raise DataError(format_faults(tally.faults, "fault", count=tally.num_faults))
            summary = tally.summary()
            writer.commit({"summary": summary.facts(), "notes": reader.notes(), "faults": tally.faults})
    except OSError as error:
        raise StorageError(
            f"the prepared data cannot be written to {folder.parent}: {error.strerror or error}: make room, or name "
            "another folder with --data_cache_dir"
        ) from error


def _opened(folder: Path, sources: Sequence[Source], facts: dict[str, Any], data: str) -> PreparedData:
    os.utime(folder)  # so that old ones can be told from those in use
    return PreparedData(
        folder, tuple(sources), DataSummary.of(facts["summary"]), tuple(facts["notes"]), tuple(facts["faults"]), data
    )


def _with_bar(batches: Iterator[Any], reader: ConversationReader, tally: DataTally) -> Iterator[Any]:
    """A progress bar by the share of the data that was read, with the rate in rows."""
    with tqdm(
        total=PARTS_OF_THE_BAR, bar_format=BAR, delay=SECONDS_BEFORE_A_BAR, postfix=["0 rows"], mininterval=0.5
    ) as bar:
        for batch in batches:
            yield batch
            rows = tally.statuses.total()
            rate = rows / max(bar.format_dict["elapsed"], 1e-3)
            bar.postfix[0] = f"{rows:,} rows, {rate:,.0f} rows/s"
            bar.update(int(PARTS_OF_THE_BAR * reader.share_read()) - bar.n)


def _num_processes(sources: Sequence[Source]) -> int:
    if sum(source.num_bytes for source in sources) < BYTES_FOR_PROCESSES:
        return 1
    return max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0))))


def _key(data: str, sources: Sequence[Source], renderer: Renderer, bad_rows: str, repairs: Sequence[str]) -> str:
    """A name for the data as it is prepared: its content, the way it is rendered, and the code that does it."""
    parts = {
        "data": data,
        "sources": [source.name for source in sources],
        "bad_rows": bad_rows,
        "repairs": sorted(repairs),
        "renderer": renderer.identity(),
        "code": _code_version(),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _code_version() -> str:
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=16)
    modules = [path for folder in ("chat_templates", "dataset") for path in sorted((package / folder).glob("*.py"))]
    for path in [package / "conversation.py", *modules]:
        digest.update(path.read_bytes())
    for library in ("transformers", "tokenizers", "jinja2", "pyarrow"):
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()


def check_dropped_share(prepared: PreparedData, max_dropped_rows: float) -> None:
    """Refuse data that a run should not start with.

    Raises:
        DataError: the share of rows dropped for a fault is above `max_dropped_rows`, or no example is left.
    """
    summary, names = prepared.summary, ", ".join(source.name for source in prepared.sources)
    if summary.bad > max_dropped_rows * summary.rows:
        raise DataError(
            f"{names}: {summary.bad:,} of {summary.rows:,} rows ({summary.bad / summary.rows:.1%}) are bad, more than "
            f"--max_dropped_rows {max_dropped_rows:g} allows to be dropped\n"
            + format_faults(prepared.faults, "fault", count=summary.faults)
        )
    if not summary.examples:
        why = ": raise --model_max_length, or shorten them"
        if summary.bad:
            why = f", {summary.bad:,} of them for a fault: " + format_faults(
                prepared.faults, "fault", count=summary.faults
            )
        raise DataError(f"{names}: all {summary.rows:,} rows are dropped{why}")
