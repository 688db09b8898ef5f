"""Prepare a data set once: read, render, check and count its conversations, and cache the examples on disk."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from finetune.dataset.prepare_workers import StoredBatch, stored_batches
from finetune.dataset.skip_rows import RowId, skip_mask, skipped_entries
from finetune.utils.errors import DataError, StorageError, storage_errors
from finetune.utils.proc import cache_folder

logger = logging.getLogger(__name__)

BAR_DELAY_SECONDS = 2.0
BAR_FORMAT = "preparing data {percentage:3.0f}% |{bar}| {postfix[0]} [{elapsed}<{remaining}]"
BAR_STEPS = 1000
# Below this many bytes of data, starting processes costs more than it saves.
MIN_BYTES_FOR_PROCESSES = 16 << 20
MAX_PROCESSES = 16
# Rows make many objects and no cycles: with Python's own 700, collecting takes a tenth of the time.
GC_THRESHOLD = 20_000

BadRows = Literal["error", "drop"]
Watch = Callable[[Iterator[RenderedConversation]], None]


@dataclass(frozen=True)
class ExampleSet:
    """The examples of an epoch, or held-out ones; `is_skipped` marks rows of `--skip_rows`, bool [examples]."""

    examples: Any  # datasets.Dataset
    is_skipped: np.ndarray
    sources: tuple[str, ...]


@dataclass(frozen=True)
class PreparedData:
    """The examples of a data set on disk, with their statistics and notes for the user."""

    folder: Path
    sources: tuple[Source, ...]
    summary: DataSummary
    notes: tuple[str, ...]
    faults: str
    fingerprint: str
    skipped_rows: tuple[RowId, ...] = ()  # those that --skip_rows names
    validation_share: float = 0.0  # share of the conversations that is held out
    evaluation: PreparedData | None = None  # separate held-out data
    day: str | None = None  # the date that the chat template wrote
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def examples(self) -> Any:
        """A `datasets.Dataset` over the memory-mapped examples, in the order of the data."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / prepared_cache.EXAMPLES_FILE))

    @cached_property
    def skip_mask(self) -> np.ndarray:
        """Which examples are of `skipped_rows`, bool [examples]."""
        return skip_mask(self.examples, self.skipped_rows)

    @property
    def fingerprints(self) -> str:
        """Fingerprints of the data and of separate held-out data."""
        return self.fingerprint if self.evaluation is None else f"{self.fingerprint} {self.evaluation.fingerprint}"

    @property
    def longest(self) -> int:
        """Tokens of the longest example, held-out ones included."""
        return max(self.summary.longest, 0 if self.evaluation is None else self.evaluation.summary.longest)

    def renderings(self) -> Iterator[RenderedConversation]:
        """Every row of the data in order, dropped ones included."""
        return prepared_cache.read_renderings(self.folder, list(self.summary.rows_by_source))

    def not_kept(self) -> Iterator[RenderedConversation]:
        """The rows that were cut, split or dropped, in order, without their examples."""
        return prepared_cache.read_not_kept(self.folder)

    def sample(self, count: int, seed: int) -> list[RenderedConversation]:
        """Up to `count` rows with examples, drawn by `seed`, in the order of the data; only those are read."""
        return prepared_cache.read_some(self.folder, self.examples, count, seed)

    def seen_held_out(self) -> list[tuple[int, int]]:
        """The separate held-out examples that equal a training example, each with the first of those, by index."""
        held_out = [] if self.evaluation is None else [*prepared_cache.example_digests(self.evaluation.folder)]
        first = dict.fromkeys(held_out, -1)
        if held_out:
            for index, digest in enumerate(prepared_cache.example_digests(self.folder)):
                if first.get(digest, 0) < 0:
                    first[digest] = index
        return [(index, first[digest]) for index, digest in enumerate(held_out) if first[digest] >= 0]

    def place(self, index: int) -> str:
        """The source and the row of an example."""
        example = self.examples.select_columns(["source", "row"])[index]
        return f"{example['source']}, row {example['row']}"

    def epoch(self, seed: int) -> ExampleSet:
        """The examples of an epoch: those of a source with weight 2 twice, with 0.5 half of them, drawn by `seed`."""
        is_trained = np.ones(len(self.examples), dtype=bool)
        is_trained[self._held_out_indices(seed)] = False
        weights = {source.name: source.weight for source in self.sources}
        if set(weights.values()) == {1.0}:
            return self._select(None if is_trained.all() else np.flatnonzero(is_trained))
        chosen: list[np.ndarray] = []
        begin = 0
        for name, count in self.summary.examples_by_source.items():
            of_source = range(begin, begin + count)
            repeats, rest = divmod(weights[name], 1)
            drawn = random.Random(f"{seed} {name}").sample(of_source, round(rest * count))
            chosen += [np.arange(begin, begin + count)] * int(repeats) + [np.sort(np.asarray(drawn, dtype=np.int64))]
            begin += count
        indices = np.concatenate(chosen)
        indices = indices[is_trained[indices]]
        if not len(indices):
            raise DataError("the weights of --data_path leave no example of an epoch: raise one of them")
        return self._select(indices)

    def held_out(self, seed: int) -> ExampleSet | None:
        """The examples to evaluate on; None if nothing is held out.

        A share of the conversations is drawn by `seed`; all windows of a conversation are on the same side.
        """
        if self.evaluation is not None:
            return replace(self.evaluation, skipped_rows=self.skipped_rows)._select(None)
        return self._select(self._held_out_indices(seed)) if self.validation_share else None

    def _select(self, indices: np.ndarray | None) -> ExampleSet:
        examples, mask = self.examples, self.skip_mask
        if indices is not None:
            examples, mask = examples.select(indices), mask[indices]
        return ExampleSet(examples, mask, tuple(self.summary.examples_by_source))

    def _held_out_indices(self, seed: int) -> np.ndarray:
        """Indices of the held-out examples, int64, ascending; drawn once per seed."""
        if seed not in self._drawn:
            self._drawn[seed] = self._draw(seed) if self.validation_share else np.zeros(0, dtype=np.int64)
        return self._drawn[seed]

    def _draw(self, seed: int) -> np.ndarray:
        rows = prepared_cache.int_column(self.examples, "row")
        counts = [*self.summary.examples_by_source.values()]
        source_indices = np.repeat(np.arange(len(counts)), counts)
        begins = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(source_indices, prepend=-1))
        count = round(self.validation_share * len(begins))
        if not 0 < count < len(begins):
            raise DataError(
                f"--validation_share {self.validation_share:g}: {count} of {len(begins)} conversations would be held "
                "out: give another share, or separate data with --eval_data_path"
            )
        drawn = random.Random(f"{seed} held out").sample(range(len(begins)), count)
        ends = np.append(begins[1:], len(rows))
        return np.concatenate([np.arange(begins[index], ends[index]) for index in sorted(drawn)])

    def write_ledger(self, path: Path) -> None:
        """Write the ledger: one JSON line per row that was changed, cut, split or dropped, then the skipped rows."""
        entries = []
        if self.skipped_rows:
            entries = skipped_entries(self.examples.select(np.flatnonzero(self.skip_mask)), self.skipped_rows)
        with storage_errors(path):
            shutil.copyfile(self.folder / prepared_cache.LEDGER_FILE, path)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def prepare_dataset(
    sources: Sequence[Source],
    renderer: Renderer,
    *,
    bad_rows: BadRows = "error",
    repairs: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    num_processes: int | None = None,
    limit: int | None = None,
    watch: Watch | None = None,
) -> PreparedData:
    """Read, render and check all rows, or open the cache if the same data was prepared in the same way before.

    Args:
        bad_rows: whether bad rows are an error or are dropped.
        repairs: names of `REPAIRS`.
        num_processes: by default 1 for small data, else one per core, at most `MAX_PROCESSES`.
        limit: prepare the first so many rows only.
        watch: is given the rows in order, batch by batch while they are prepared, or all at once from the cache.

    Raises:
        DataError: all bad rows under `bad_rows="error"` (the first 20 shown); a file that cannot be read.
        StorageError: the cache cannot be written.
    """
    data = fingerprint_sources(sources)
    key = _key(data, sources, renderer, bad_rows, repairs, limit)
    folder = Path(cache_dir or cache_folder("data")).expanduser() / key
    while True:
        if prepared_cache.is_cached(folder):
            facts = prepared_cache.read_facts(folder)
            if facts is not None:
                prepared = _open(folder, sources, facts, data)
                if watch is not None:
                    watch(prepared.renderings())
                return prepared
            logger.warning(f"the prepared data in {folder} is damaged: it is prepared again")
            prepared_cache.clear_damaged(folder)
        with prepared_cache.only_writer(folder) as is_writer:
            if is_writer:
                is_small = sum(source.num_bytes for source in sources) < MIN_BYTES_FOR_PROCESSES
                cores = 1 if is_small else len(os.sched_getaffinity(0))
                processes = num_processes or min(MAX_PROCESSES, cores)
                gc.freeze()  # objects of the libraries need not be copied on a fork
                gc.enable()
                gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
                reader = ConversationReader(sources, repairs=repairs)
                batches = stored_batches(reader, renderer, processes, limit)
                _write(folder, reader, batches, bad_rows, watch)
                watch = None  # it has seen all rows


def _write(
    folder: Path, reader: ConversationReader, batches: Iterator[StoredBatch], bad_rows: BadRows, watch: Watch | None
) -> None:
    tally = DataTally()
    names = [source.name for source in reader.sources]
    try:
        with prepared_cache.CacheWriter(folder) as writer:
            for batch in _with_bar(batches, reader, tally):
                if watch is not None:
                    watch(prepared_cache.renderings_of([batch.examples], batch.ledger, names))
                tally.merge(batch.tally)
                writer.add(batch.examples, batch.ledger)
            if tally.unreadable or (bad_rows == "error" and tally.faults.count):
                raise DataError(tally.faults.message(rows=tally.rows_by_source))
            summary = tally.summary()
            writer.commit(
                {
                    "summary": summary.facts(),
                    "notes": reader.counts.notes(),
                    "faults": tally.faults.message(rows=tally.rows_by_source),
                }
            )
    except BrokenPipeError:  # of what watches
        raise
    except OSError as error:
        raise StorageError(
            f"the prepared data cannot be written to {folder.parent}: {error.strerror or error}: make room, or name "
            "another folder with --data_cache_dir"
        ) from error


def _open(folder: Path, sources: Sequence[Source], facts: dict[str, Any], data: str) -> PreparedData:
    os.utime(folder)  # marks the folder as in use
    return PreparedData(
        folder, tuple(sources), DataSummary.of(facts["summary"]), tuple(facts["notes"]), facts["faults"], data
    )


def _with_bar(batches: Iterator[Any], reader: ConversationReader, tally: DataTally) -> Iterator[Any]:
    """Show a progress bar of the share of the data that has been read, with the rate in rows."""
    postfix = ["0 rows"]
    bar_options: dict[str, Any] = {"bar_format": BAR_FORMAT, "delay": BAR_DELAY_SECONDS, "postfix": postfix}
    with tqdm(total=BAR_STEPS, mininterval=0.5, **bar_options) as bar:
        for batch in batches:
            yield batch
            rows = tally.statuses.total()
            rate = rows / max(bar.format_dict["elapsed"], 1e-3)
            postfix[0] = f"{rows:,} rows, {rate:,.0f} rows/s"
            bar.update(int(BAR_STEPS * reader.share_read()) - bar.n)


def _key(
    data: str, sources: Sequence[Source], renderer: Renderer, bad_rows: str, repairs: Sequence[str], limit: int | None
) -> str:
    """The cache key: a digest of the data, of how it is rendered, and of the code that does it."""
    parts = {
        "data": data,
        "sources": [(source.name, source.columns) for source in sources],
        "bad_rows": bad_rows,
        "limit": limit,
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
    for library in ("transformers", "tokenizers", "jinja2", "jsonschema", "pyarrow"):
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()


def check_dropped_share(prepared: PreparedData, max_dropped_rows: float) -> None:
    """Check that at most `max_dropped_rows` (0 to 1) of the rows are bad, and that an example is left."""
    summary, names = prepared.summary, ", ".join(source.name for source in prepared.sources)
    if summary.bad > max_dropped_rows * summary.rows:
        raise DataError(
            f"{names}: {summary.bad:,} of {summary.rows:,} rows ({summary.bad / summary.rows:.1%}) are bad, more than "
            f"--max_dropped_rows {max_dropped_rows:g} allows to be dropped\n" + prepared.faults
        )
    if not summary.examples:
        reason = ": raise --model_max_length, or shorten them"
        if summary.bad:
            reason = f", {summary.bad:,} of them for a fault: {prepared.faults}"
        raise DataError(f"{names}: all {summary.rows:,} rows are dropped{reason}")
