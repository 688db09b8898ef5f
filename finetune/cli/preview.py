"""`finetune preview`: what a data file renders to, through the very pipeline that trains."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from finetune.chat_templates import RenderedConversation
from finetune.chat_templates.text_segments import InSegments, speller
from finetune.config import DataArguments, ModelArguments
from finetune.config.argument_parser import below, data_faults, missing
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.models.loader import code_note
from finetune.report.html_pages import PreviewPage, check_replaceable, render_preview, write_page
from finetune.report.preview_terminal import PreviewTerminal, harmless
from finetune.run_dir.data_samples import counts, id_of, reason_of, sample_of
from finetune.training.data_setup import prepare_data
from finetune.utils.console import configure_logging, encode_output, quiet_libraries
from finetune.utils.errors import SHOWN_FAULTS, ConfigError, DataError
from finetune.utils.options import CommandParser, fill, option, raise_faults

logger = logging.getLogger(__name__)

FIRST_ROWS, SAMPLE_OF_A_PAGE, LISTED_ON_A_PAGE = 5, 50, 200
# How the model computes, and which rows it is evaluated on, change nothing of what is shown.
NOT_OF_PREVIEW = {"attn_implementation", "validation_share"}


@dataclass(frozen=True)
class PreviewOptions:
    """What is shown."""

    rows: list[int] | None = option(None, "the rows to show, counted from 0 in each file; default: the first 5")
    sample: int | None = option(None, "show this many rows, drawn at random; default with `--html`: 50")
    seed: int = option(42, "the same seed draws the same sample")
    json: bool = option(False, "one JSON line per row of the file, all rows, with token ids and labels")
    html: str | None = option(None, "write the rows to this file as a page; it may replace such a page, no other file")


def build_parser() -> CommandParser:
    """Build the parser of `finetune preview`."""
    parser = CommandParser(
        "finetune preview",
        "--model_name_or_path M --data_path D [--rows N ...|--sample N] [--html FILE|--json]",
        "Show what the rows of data files render to, through the pipeline that trains. Context is dim, supervised "
        "text is bold green, control tokens are in reverse; without colour (NO_COLOR, or not a terminal) supervised "
        "text stands between ⟦ and ⟧ and control tokens between « and ». An arrow marks an end that is supervised "
        "where another token is read.",
    )
    for group in (ModelArguments, DataArguments, PreviewOptions):
        parser.add_group(group, only={declared.name for declared in fields(group)} - NOT_OF_PREVIEW)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PreviewOptions]:
    """Return the flags of the model and the data, and which rows are shown and how.

    Raises:
        ConfigError: as `parse` of the training; or flags that exclude each other.
    """
    given = build_parser().parse(argv)
    raise_faults(missing(given, ("model_name_or_path", "data_path")))
    model, data, shown = fill(ModelArguments, given), fill(DataArguments, given), fill(PreviewOptions, given)
    raise_faults([*data_faults(data), *_faults(shown)])
    return model, data, shown


def _faults(shown: PreviewOptions) -> Iterator[str]:
    yield from below(1, "rows", None if shown.rows is None else len(shown.rows))
    yield from below(1, "sample", shown.sample)
    chosen = [f"--{name}" for name in ("rows", "sample") if getattr(shown, name) is not None]
    if len(chosen) == 2:
        yield "--rows and --sample exclude each other: keep one of them"
    if shown.json and (chosen or shown.html):
        yield f"--json prints all rows: it excludes {(chosen or ['--html'])[0]}"


def main(argv: Sequence[str]) -> None:
    """Take the training command's model and data flags, and which rows to show: in the terminal, as JSON, as a page.

    Raises:
        ConfigError: a row that there is not, a page that would replace another file.
    """
    model, data, choice = parse_options(argv)
    configure_logging(to_stderr=True)
    page = Path(choice.html).expanduser() if choice.html is not None else None
    if page is not None:
        check_replaceable(page)
    quiet_libraries()
    encode_output(utf8=choice.json)
    if model.trusts_code() and (code := code_note(model.model_name_or_path, model.model_revision)):
        logger.warning(code)
    _, chat_format, prepared = prepare_data(model, data)
    _note_what_training_refuses(prepared, data.max_dropped_rows)
    in_segments = speller(chat_format)
    try:
        if choice.json:
            for rendering in prepared.renderings():
                print(_as_json(rendering))
        elif page is None:
            _show(_select(prepared, choice, SHOWN_FAULTS), prepared, chat_format.name, in_segments)
        else:
            facts = {
                "Model": model.model_name_or_path,
                "Format": chat_format.name,
                "Limit": f"{data.model_max_length:,} tokens (--too_long {data.too_long})",
            }
            found = _select(prepared, choice, LISTED_ON_A_PAGE)
            write_page(page, render_preview(_page(found, prepared, facts, in_segments)))
            print(f"{page}: {len(found.rows):,} of {prepared.summary.rows:,} rows")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note_what_training_refuses(prepared: PreparedData, max_dropped_rows: float) -> None:
    for rows in filter(None, (prepared, prepared.evaluation)):
        try:
            check_dropped_share(rows, max_dropped_rows)
        except DataError as error:
            logger.warning(f"training would refuse this data: {error}")


def _as_json(rendering: RenderedConversation) -> str:
    return json.dumps(
        {
            "row": rendering.row,
            "id": rendering.id,
            "status": rendering.status,
            "reason": rendering.reason,
            "examples": [{"input_ids": one.input_ids, "labels": one.labels} for one in rendering.examples],
        },
        ensure_ascii=False,
    )


# ---- which rows


@dataclass
class _Selection:
    """The rows to show, how they were chosen, and the first of those not kept whole."""

    rows: list[RenderedConversation] = field(default_factory=list)
    not_kept: list[RenderedConversation] = field(default_factory=list)
    how: str = ""


def _select(prepared: PreparedData, choice: PreviewOptions, listed: int) -> _Selection:
    """One pass over the renderings, as far as needed."""
    summary = prepared.summary
    is_chosen, wanted, how = _chooser(choice, summary.rows, summary.rows_by_source)
    listed = min(listed, _num_not_kept(prepared))
    found = _Selection(how=how)
    for number, rendering in enumerate(prepared.renderings()):
        if is_chosen(number, rendering):
            found.rows.append(rendering)
        if rendering.status != "kept" and len(found.not_kept) < listed:
            found.not_kept.append(rendering)
        if len(found.rows) >= wanted and len(found.not_kept) >= listed:
            break
    return found


def _chooser(
    choice: PreviewOptions, total: int, rows_by_source: dict[str, int]
) -> tuple[Callable[[int, RenderedConversation], bool], int, str]:
    """(whether the n-th rendering is shown, how many are, the choice in words)."""
    if choice.rows is not None:
        asked = set(choice.rows)
        _check_rows(asked, rows_by_source)
        wanted = sum(row < count for row in asked for count in rows_by_source.values())
        return lambda number, rendering: rendering.row in asked, wanted, f"Rows asked for: {wanted:,} of {total:,}"
    sample = SAMPLE_OF_A_PAGE if choice.html is not None and choice.sample is None else choice.sample
    if sample is None or sample >= total:
        count = min(FIRST_ROWS if sample is None else sample, total)
        words = f"All {total:,} rows" if count == total else f"The first {count:,} of {total:,} rows"
        return lambda number, rendering: number < count, count, words
    drawn = set(random.Random(choice.seed).sample(range(total), sample))
    words = f"{sample:,} of {total:,} rows, drawn with seed {choice.seed}"
    return lambda number, rendering: number in drawn, sample, words


def _check_rows(asked: Iterable[int], rows_by_source: dict[str, int]) -> None:
    most = max(rows_by_source.values(), default=0)
    missing = sorted(row for row in asked if not 0 <= row < most)
    if missing:
        there = "; ".join(f"{source} has rows 0 to {count - 1:,}" for source, count in rows_by_source.items())
        raise ConfigError(f"--rows {' '.join(map(str, missing))}: there is no such row: {there}")


# ---- in the terminal


def _show(found: _Selection, prepared: PreparedData, format_name: str, in_segments: InSegments) -> None:
    """The legend, the rows, those not kept whole, the summary."""
    terminal = PreviewTerminal()
    terminal.say_legend()
    for rendering in found.rows:
        terminal.say()
        _show_row(terminal, rendering, in_segments)
    count = _num_not_kept(prepared)
    if count:
        terminal.say(["\n", (f"Rows not kept whole: {count:,}", "bold")])
        for one in found.not_kept:
            terminal.say([harmless(f"  {one.source}, row {one.row}: {one.status}: {reason_of(one)}")])
        if count > len(found.not_kept):
            terminal.say([f"  ... and {count - len(found.not_kept):,} more"])
    terminal.say([harmless(f"\n{_names(prepared)} in {format_name}")])
    for line in prepared.summary.lines():
        terminal.say([harmless(f"  {line}")])


def _show_row(terminal: PreviewTerminal, rendering: RenderedConversation, in_segments: InSegments) -> None:
    tokens, supervised = counts(rendering)
    identity = "" if rendering.id is None else f", id {id_of(rendering)}"
    share = f" ({supervised / tokens:.1%})" if tokens else ""
    place = f"{rendering.source}, row {rendering.row}{identity}"
    facts = f"{rendering.status}, {tokens:,} tokens, {supervised:,} supervised{share}"
    terminal.say([(harmless(f"{place}: {facts}"), "bold underline")])
    if rendering.reason:
        terminal.say([(harmless(reason_of(rendering)), "yellow")])
    for number, example in enumerate(rendering.examples, start=1):
        if len(rendering.examples) > 1:
            terminal.say([(f"window {number} of {len(rendering.examples)}", "bold")])
        terminal.say_segments(in_segments(example))


# ---- as a page


def _page(found: _Selection, prepared: PreparedData, facts: dict[str, str], in_segments: InSegments) -> PreviewPage:
    summary = prepared.summary
    return PreviewPage(
        title=_names(prepared),
        facts=[*facts.items(), *summary.described()],
        lengths=summary.length_histogram,
        longest=summary.longest,
        shown=found.how,
        cards=[sample_of(rendering, in_segments) for rendering in found.rows],
        not_kept=[(one.source, one.row, one.status, reason_of(one)) for one in found.not_kept],
        num_not_kept=_num_not_kept(prepared),
    )


# ---- both


def _num_not_kept(prepared: PreparedData) -> int:
    summary = prepared.summary
    return summary.cut + summary.split + summary.dropped


def _names(prepared: PreparedData) -> str:
    return ", ".join(source.name for source in prepared.sources)
