"""`finetune preview`: show what rows render to, through the pipeline that trains."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from finetune.chat_templates import RenderedConversation
from finetune.chat_templates.text_segments import Segmenter, segmenter
from finetune.config import DataArguments, ModelArguments
from finetune.config.argument_parser import below, data_faults, missing
from finetune.dataset.prepare import PreparedData
from finetune.models.loader import code_note
from finetune.report.html_pages import PreviewPage, check_replaceable, render_preview, write_page
from finetune.report.preview_terminal import PreviewTerminal, harmless
from finetune.run_dir.data_samples import counts, id_of, reason_of, sample_of
from finetune.training.data_setup import check_data, prepare_run_data
from finetune.utils.console import accept_all_characters, configure_logging, quiet_libraries
from finetune.utils.errors import SHOWN_FAULTS, ConfigError, DataError
from finetune.utils.options import CommandParser, fill, option, raise_faults

logger = logging.getLogger(__name__)

FIRST_ROWS, SAMPLE_OF_A_PAGE, LISTED_ON_A_PAGE = 5, 50, 200
# How the model computes, and which rows it is evaluated on, change nothing of what is shown.
NOT_OF_PREVIEW = {"attn_implementation", "allow_missing_weights", "validation_share"}


@dataclass(frozen=True)
class PreviewOptions:
    """Show what the rows of data files render to, through the pipeline that trains.

    Context is dim, supervised text is bold green, control tokens are in reverse; without colour (NO_COLOR, or not a
    terminal) supervised text stands between ⟦ and ⟧ and control tokens between « and ». An arrow marks an end that is
    supervised where another token is read.
    """

    rows: list[int] | None = option(None, "the rows to show, counted from 0 in each file; default: the first 5")
    sample: int | None = option(None, "show this many rows, drawn at random; default with `--html`: 50")
    seed: int = option(42, "the same seed draws the same sample")
    json: bool = option(False, "one JSON line per row of the file, all rows, with token ids and labels")
    html: str | None = option(None, "write the rows to this file as a page; it may replace such a page, no other file")


def build_parser() -> CommandParser:
    """Build the parser of `finetune preview`."""
    usage = "--model_name_or_path M --data_path D [--rows N ...|--sample N] [--html FILE|--json]"
    parser = CommandParser("finetune preview", usage, PreviewOptions)
    for group in (ModelArguments, DataArguments):
        parser.add_group(group, only={declared.name for declared in fields(group)} - NOT_OF_PREVIEW)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PreviewOptions]:
    """Return the flags of the model and the data, and which rows are shown and how."""
    given = build_parser().parse(argv)
    raise_faults(missing(given, ("model_name_or_path", "data_path")))
    model, data, options = fill(ModelArguments, given), fill(DataArguments, given), fill(PreviewOptions, given)
    raise_faults([*data_faults(data), *_faults(options)])
    return model, data, options


def _faults(options: PreviewOptions) -> Iterator[str]:
    yield from below(1, "rows", None if options.rows is None else len(options.rows))
    yield from below(1, "sample", options.sample)
    chosen = [f"--{name}" for name in ("rows", "sample") if getattr(options, name) is not None]
    if len(chosen) == 2:
        yield "--rows and --sample exclude each other: keep one of them"
    if options.json and (chosen or options.html):
        yield f"--json prints all rows: it excludes {(chosen or ['--html'])[0]}"


def main(argv: Sequence[str]) -> None:
    """Show rows in the terminal, as JSON lines, or as a page."""
    model, data, options = parse_options(argv)
    configure_logging(to_stderr=True)
    page = Path(options.html).expanduser() if options.html is not None else None
    if page is not None:
        check_replaceable(page)
    quiet_libraries()
    accept_all_characters(utf8=options.json)
    if model.trusts_code() and (code := code_note(model.model_name_or_path, model.model_revision)):
        logger.warning(code)
    _, chat_format, prepared = prepare_run_data(model, data)
    try:
        check_data(prepared, data)
    except DataError as error:
        logger.warning(f"training would refuse this data: {error}")
    in_segments = segmenter(chat_format)
    try:
        if options.json:
            for rendering in prepared.renderings():
                print(_as_json(rendering))
        elif page is None:
            _show(_select(prepared, options, SHOWN_FAULTS), prepared, chat_format.name, in_segments)
        else:
            facts = {
                "Model": model.model_name_or_path,
                "Format": chat_format.name,
                "Limit": f"{data.model_max_length:,} tokens (--too_long {data.too_long})",
            }
            selection = _select(prepared, options, LISTED_ON_A_PAGE)
            write_page(page, render_preview(_page(selection, prepared, facts, in_segments)))
            print(f"{page}: {len(selection.rows):,} of {prepared.summary.rows:,} rows")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_json(rendering: RenderedConversation) -> str:
    return json.dumps(
        {
            "row": rendering.row,
            "id": rendering.id,
            "status": rendering.status,
            "reason": rendering.reason,
            "examples": [{"input_ids": example.input_ids, "labels": example.labels} for example in rendering.examples],
        },
        ensure_ascii=False,
    )


# ---- which rows


@dataclass
class _Selection:
    """The rows to show, a sentence that says which, and the first of those not kept whole."""

    description: str
    rows: list[RenderedConversation] = field(default_factory=list)
    not_kept: list[RenderedConversation] = field(default_factory=list)


def _select(prepared: PreparedData, options: PreviewOptions, listed: int) -> _Selection:
    """Select rows in one pass, which ends as soon as all are found."""
    summary = prepared.summary
    is_selected, wanted, description = _selector(options, summary.rows, summary.rows_by_source)
    listed = min(listed, _num_not_kept(prepared))
    selection = _Selection(description)
    for number, rendering in enumerate(prepared.renderings()):
        if is_selected(number, rendering):
            selection.rows.append(rendering)
        if rendering.status != "kept" and len(selection.not_kept) < listed:
            selection.not_kept.append(rendering)
        if len(selection.rows) >= wanted and len(selection.not_kept) >= listed:
            break
    return selection


def _selector(
    options: PreviewOptions, total: int, rows_by_source: dict[str, int]
) -> tuple[Callable[[int, RenderedConversation], bool], int, str]:
    """Return (whether the n-th rendering is selected, how many are, a description)."""
    if options.rows is not None:
        rows = set(options.rows)
        most = max(rows_by_source.values(), default=0)
        missing_rows = sorted(row for row in rows if not 0 <= row < most)
        if missing_rows:
            existing = "; ".join(f"{source} has rows 0 to {count - 1:,}" for source, count in rows_by_source.items())
            raise ConfigError(f"--rows {' '.join(map(str, missing_rows))}: there is no such row: {existing}")
        wanted = sum(row < count for row in rows for count in rows_by_source.values())
        return lambda number, rendering: rendering.row in rows, wanted, f"Rows asked for: {wanted:,} of {total:,}"
    sample = SAMPLE_OF_A_PAGE if options.html is not None and options.sample is None else options.sample
    if sample is None or sample >= total:
        count = min(FIRST_ROWS if sample is None else sample, total)
        words = f"All {total:,} rows" if count == total else f"The first {count:,} of {total:,} rows"
        return lambda number, rendering: number < count, count, words
    drawn = set(random.Random(options.seed).sample(range(total), sample))
    words = f"{sample:,} of {total:,} rows, drawn with seed {options.seed}"
    return lambda number, rendering: number in drawn, sample, words


# ---- in the terminal


def _show(selection: _Selection, prepared: PreparedData, format_name: str, in_segments: Segmenter) -> None:
    """Print the legend, the rows, those not kept whole, and the summary."""
    terminal = PreviewTerminal()
    terminal.say_legend()
    for rendering in selection.rows:
        terminal.say()
        _show_row(terminal, rendering, in_segments)
    count = _num_not_kept(prepared)
    if count:
        terminal.say(["\n", (f"Rows not kept whole: {count:,}", "bold")])
        for row in selection.not_kept:
            terminal.say([harmless(f"  {row.source}, row {row.row}: {row.status}: {reason_of(row)}")])
        if count > len(selection.not_kept):
            terminal.say([f"  ... and {count - len(selection.not_kept):,} more"])
    terminal.say([harmless(f"\n{_names(prepared)} in {format_name}")])
    for line in prepared.summary.lines():
        terminal.say([harmless(f"  {line}")])


def _show_row(terminal: PreviewTerminal, rendering: RenderedConversation, in_segments: Segmenter) -> None:
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


def _page(selection: _Selection, prepared: PreparedData, facts: dict[str, str], in_segments: Segmenter) -> PreviewPage:
    summary = prepared.summary
    return PreviewPage(
        title=_names(prepared),
        facts=[*facts.items(), *summary.described()],
        lengths=summary.length_histogram,
        longest=summary.longest,
        shown=selection.description,
        cards=[sample_of(rendering, in_segments) for rendering in selection.rows],
        not_kept=[(row.source, row.row, row.status, reason_of(row)) for row in selection.not_kept],
        num_not_kept=_num_not_kept(prepared),
    )


# ---- both


def _num_not_kept(prepared: PreparedData) -> int:
    summary = prepared.summary
    return summary.cut + summary.split + summary.dropped


def _names(prepared: PreparedData) -> str:
    return ", ".join(source.name for source in prepared.sources)
