"""`finetune convert`: write conversations of any supported layout in the project's own layout."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from finetune.config import DataArguments
from finetune.config.argument_parser import data_faults
from finetune.conversation import BadRow, Conversation, to_row
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
from finetune.dataset.row_faults import RowFaults
from finetune.utils.atomic_io import check_new, replacing
from finetune.utils.console import configure_logging
from finetune.utils.errors import ConfigError, DataError, raise_faults
from finetune.utils.options import CommandParser, fill, positional

logger = logging.getLogger(__name__)

# Endings of formats that are not written.
OTHER_KINDS = (".gz", ".zst", ".parquet", ".csv", ".tsv", ".zip")
BAR = "converting {percentage:3.0f}% |{bar}|{postfix} [{elapsed}<{remaining}]"
BAR_UNITS, ROWS_PER_UPDATE = 1000, 256


@dataclass(frozen=True)
class ConvertPaths:
    """Write conversations in any supported layout as a JSON array, or as JSON lines where OUT ends in .jsonl.

    An existing file is never replaced.
    """

    paths: list[str] = positional("IN ... OUT", "files, folders, globs, data sets; the file to write")


def build_parser() -> CommandParser:
    """Build the parser of `finetune convert`."""
    usage = "IN [IN ...] OUT [--repairs RULE ...] [--columns KEY=COLUMN ...] [--bad_rows error|drop]"
    parser = CommandParser("finetune convert", usage, ConvertPaths)
    parser.add_group(DataArguments, only=("bad_rows", "repairs", "columns"))
    return parser


def parse_options(argv: Sequence[str]) -> tuple[DataArguments, str]:
    """Return what to read, and the file to write: the last positional argument."""
    given = build_parser().parse(argv)
    paths = given["paths"]
    if len(paths) < 2:
        raise ConfigError("expected what to read and the file to write, in front of the flags: convert IN OUT")
    data = fill(DataArguments, {**given, "data_path": paths[:-1]})
    raise_faults(data_faults(data))
    return data, paths[-1]


def main(argv: Sequence[str]) -> None:
    """Take what to read, the file to write, and `--bad_rows` and `--repairs` as training does."""
    data, name = parse_options(argv)
    configure_logging()
    out = Path(name)
    _check_new(out)
    sources = find_sources(data.data_path, data.columns)
    weighted = next((source for source in sources if source.weight != 1), None)
    if weighted is not None:
        raise ConfigError(f"{weighted.name}:{weighted.weight:g}: a weight is for training: leave it out")
    reader = ConversationReader(sources, repairs=data.repairs)
    bad, changes = _BadRows(stops=data.bad_rows == "error"), _Changes(several=len(sources) > 1)
    # A lone surrogate, which only an id can hold, becomes its JSON escape.
    with replacing(out) as part, part.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        written = _write(file, changes.applied(bad.without_bad_rows(_with_bar(reader))), lines=out.suffix == ".jsonl")
        bad.check()
        if not written:
            raise DataError(f"{', '.join(source.name for source in sources)}: no conversation is left to write")
    for line in reader.counts.notes():
        logger.info(line)
    if bad.count:
        print(bad.rows.message("dropped row"), file=sys.stderr)
    if bad.duplicates:
        changes.counts["left out by drop_duplicates"] = bad.duplicates
    for change, rows in changes.counts.items():
        logger.warning(f"{rows:,} rows {change}")
    logger.info(f"{out}: {written:,} rows" + (f", {bad.count:,} dropped" if bad.count else ""))


class _BadRows:
    """Bad rows: the first ones in full, and counts of all."""

    def __init__(self, *, stops: bool) -> None:
        self.stops, self.has_stopped = stops, False
        self.rows, self.faults = RowFaults(), RowFaults()
        self.count = self.duplicates = 0
        self.rows_by_source: Counter[str] = Counter()

    def without_bad_rows(self, rows: Iterable[Conversation | BadRow]) -> Iterator[Conversation]:
        """Yield the conversations; none after a bad row that stops the conversion."""
        for row in rows:
            self.rows_by_source[row.source] += 1
            if isinstance(row, BadRow) and not row.is_fault:
                self.duplicates += 1
            elif isinstance(row, BadRow):
                self.count += 1
                self.has_stopped |= self.stops or row.row is None  # None: the rest of a file cannot be read
                self.rows.add("; ".join(row.faults))
                self.faults.add(*row.faults)
            elif not self.has_stopped:
                yield row

    def check(self) -> None:
        if self.has_stopped:
            raise DataError(self.faults.message(rows=self.rows_by_source))


class _Changes:
    """Counts of rows that are changed: by a repair, or because ids must be unique in one file."""

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.counts: Counter[str] = Counter()
        self._ids: set[str] = set()

    def applied(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """Yield the rows, without their id where a row of an earlier source has the same."""
        for row in rows:
            self.counts.update({f"changed by {repair.partition(':')[0]}" for repair in row.repairs})
            if self.several and row.id is not None:
                key = json.dumps(row.id)
                if key in self._ids:
                    self.counts["written without their id, which an earlier row has"] += 1
                    row = replace(row, id=None)
                self._ids.add(key)
            yield row


def _write(file: TextIO, conversations: Iterable[Conversation], *, lines: bool) -> int:
    """Write an array with one row per line, or JSON lines; return the number of rows."""
    start, separator, end = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    count = 0
    for conversation in conversations:
        values = to_row(conversation.turns, conversation.id, conversation.tools, conversation.template_kwargs)
        row = json.dumps(values, ensure_ascii=False)
        file.write((separator if count else start) + row)
        count += 1
    file.write(end if count else "")
    return count


def _with_bar(reader: ConversationReader) -> Iterator[Conversation | BadRow]:
    """Yield the rows of the reader; on a terminal a progress bar shows the share of the data that was read."""
    with tqdm(total=BAR_UNITS, bar_format=BAR, disable=None, leave=False) as bar:
        for number, row in enumerate(reader, start=1):
            yield row
            if number % ROWS_PER_UPDATE == 0 and not bar.disable:
                bar.set_postfix_str(f"{number:,} rows", refresh=False)
                bar.update(int(BAR_UNITS * reader.share_read()) - bar.n)


def _check_new(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder: name the file to write, for example {out / 'conversations.json'}")
    check_new(out)
    if out.suffix in OTHER_KINDS:
        raise ConfigError(f"{out}: expected a name that ends in .json or .jsonl, found {out.suffix}")
