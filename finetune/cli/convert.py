"""`finetune convert`: conversations in any layout that training reads -> the project's own JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from finetune.config import DataArguments
from finetune.config.argument_parser import data_faults
from finetune.conversation import BadRow, Conversation, to_row
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
from finetune.utils.console import configure_logging
from finetune.utils.errors import SHOWN_FAULTS, ConfigError, DataError, StorageError, format_faults
from finetune.utils.options import CommandParser, fill, positional, raise_faults

logger = logging.getLogger(__name__)

# A file that says by its name that it is something else than what is written.
OTHER_KINDS = (".gz", ".zst", ".parquet", ".csv", ".zip")
BAR = "converting {percentage:3.0f}% |{bar}| {postfix[0]} [{elapsed}<{remaining}]"
PARTS_OF_THE_BAR, ROWS_BETWEEN_LOOKS = 1000, 256


@dataclass(frozen=True)
class ConvertPaths:
    """What is read and written."""

    paths: list[str] = positional("IN ... OUT", "files, folders, globs, data sets; the file to write")


def build_parser() -> CommandParser:
    """Build the parser of `finetune convert`."""
    parser = CommandParser(
        "finetune convert",
        "IN [IN ...] OUT [--repairs RULE ...] [--bad_rows error|drop]",
        "Write conversations in any supported layout as a JSON array, or as JSON lines where OUT ends in .jsonl. "
        "An existing file is never replaced.",
        ConvertPaths,
    )
    parser.add_group(DataArguments, only=("bad_rows", "repairs"))
    return parser


def parse_options(argv: Sequence[str]) -> tuple[DataArguments, str]:
    """Return what to read, and the file to write: the last positional argument.

    Raises:
        ConfigError: an unknown flag or rule, or fewer than two names.
    """
    given = build_parser().parse(argv)
    paths = given["paths"]
    if len(paths) < 2:
        raise ConfigError("expected what to read and the file to write, in front of --repairs: convert IN OUT")
    data = fill(DataArguments, {**given, "data_path": paths[:-1]})
    raise_faults(data_faults(data))
    return data, paths[-1]


def main(argv: Sequence[str]) -> None:
    """Take what to read, the file to write, and `--bad_rows` and `--repairs` as training does.

    Raises:
        ConfigError: a file that exists, a folder that does not, a weight.
        DataError: every bad row (the first 20 shown), unless they are dropped; a file that cannot be read.
        StorageError: the file cannot be written.
    """
    data, name = parse_options(argv)
    configure_logging()
    out = Path(name)
    _check_new(out)
    sources = find_sources(data.data_path)
    weighted = next((source for source in sources if source.weight != 1), None)
    if weighted is not None:
        raise ConfigError(f"{weighted.name}:{weighted.weight:g}: a weight is for training: leave it out")
    reader = ConversationReader(sources, repairs=data.repairs)
    bad, changes = _BadRows(stops=data.bad_rows == "error"), _Changes(several=len(sources) > 1)
    with _new_file(out) as file:
        written = _write(file, changes.made(bad.kept_out(_with_bar(reader))), lines=out.suffix == ".jsonl")
        bad.check()
        if not written:
            raise DataError(f"{', '.join(source.name for source in sources)}: no conversation is left to write")
    for line in reader.notes():
        logger.info(line)
    if bad.count:
        print(format_faults(bad.rows, "dropped row", count=bad.count), file=sys.stderr)
    for change, rows in changes.counts.items():
        logger.warning(f"{rows:,} rows {change}")
    logger.info(f"{out}: {written:,} rows" + (f", {bad.count:,} dropped" if bad.count else ""))


class _BadRows:
    """Bad rows on the way: the first ones in full, all of them counted."""

    def __init__(self, *, stops: bool) -> None:
        self.stops, self.unreadable = stops, False
        self.rows: list[str] = []
        self.faults: list[str] = []
        self.count = self.num_faults = 0

    def kept_out(self, rows: Iterable[Conversation | BadRow]) -> Iterator[Conversation]:
        """The conversations alone; none any more behind a row that stops the whole."""
        for row in rows:
            if isinstance(row, BadRow):
                self.count += 1
                self.num_faults += len(row.faults)
                self.unreadable |= row.row is None
                self.rows += ["; ".join(row.faults)][: SHOWN_FAULTS - len(self.rows)]
                self.faults += row.faults[: SHOWN_FAULTS - len(self.faults)]
            elif not (self.unreadable or (self.stops and self.count)):
                yield row

    def check(self) -> None:
        """Raise `DataError` where nothing may be written."""
        if self.unreadable or (self.stops and self.count):
            raise DataError(format_faults(self.faults, "fault", count=self.num_faults))


class _Changes:
    """What is not written as it was read: by a repair, or because in one file each row has its own id."""

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.counts: Counter[str] = Counter()
        self._ids: set[str] = set()

    def made(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """The rows, without an id where one of an earlier source has it."""
        for row in rows:
            self.counts.update({f"changed by {repair.partition(':')[0]}" for repair in row.repairs})
            if self.several and row.id is not None:
                key = json.dumps(row.id)
                if key in self._ids:
                    self.counts["written without their id, which an earlier row has"] += 1
                    row = replace(row, id=None)
                self._ids.add(key)
            yield row


def _as_json(conversation: Conversation) -> str:
    """A row as this project writes it, on one line."""
    return json.dumps(to_row(conversation.turns, conversation.id), ensure_ascii=False)


def _write(file: TextIO, conversations: Iterable[Conversation], *, lines: bool) -> int:
    """Write an array with one row a line, or JSON lines; the number of rows."""
    before, between, behind = ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    count = 0
    for conversation in conversations:
        file.write((between if count else before) + _as_json(conversation))
        count += 1
    file.write(behind if count else "")
    return count


def _with_bar(reader: ConversationReader) -> Iterator[Conversation | BadRow]:
    """The reader's rows, with a progress bar on a terminal by the share of the data that was read."""
    with tqdm(total=PARTS_OF_THE_BAR, bar_format=BAR, disable=None, postfix=["0 rows"], leave=False) as bar:
        for number, row in enumerate(reader, start=1):
            yield row
            if number % ROWS_BETWEEN_LOOKS == 0 and not bar.disable:
                bar.postfix[0] = f"{number:,} rows"
                bar.update(int(PARTS_OF_THE_BAR * reader.share_read()) - bar.n)


def _check_new(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder: name the file to write, for example {out / 'conversations.json'}")
    if os.path.lexists(out):
        raise ConfigError(f"{out}: exists and is not replaced: name another file, or remove it")
    if out.suffix in OTHER_KINDS:
        raise ConfigError(f"{out}: expected a name that ends in .json or .jsonl, found {out.suffix}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}: make it first")


@contextmanager
def _new_file(out: Path) -> Iterator[TextIO]:
    """A file that appears under its name when the block ends well, and leaves nothing otherwise."""
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        # A lone surrogate, which only an id can hold, becomes its JSON escape.
        with open(part, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
