"""`finetune preview`: show what rows render to, through the pipeline that trains."""

import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from finetune.chat_templates import ChatFormat, RenderedConversation
from finetune.chat_templates.format_selection import read_template
from finetune.chat_templates.text_segments import segmenter
from finetune.config import DataArguments, ModelArguments, RunArguments
from finetune.config import build_parser as build_training_parser
from finetune.config.argument_parser import below, data_faults, locate_model, missing, read_flags
from finetune.dataset.data_sources import find_local_sources
from finetune.dataset.prepare import PreparedData
from finetune.dataset.text_overlap import check_datasketch
from finetune.models.loader import code_note
from finetune.models.model_folder import check_tokenizer_files
from finetune.report.data_statistics import statistics_section
from finetune.report.html_pages import Preview, check_replaceable, render_preview, write_page
from finetune.report.preview_terminal import PreviewTerminal, print_sections
from finetune.run_dir.data_samples import reason_of, sample_of
from finetune.run_dir.eval_results import ResultSection
from finetune.training.data_setup import check_data, prepare_run_data
from finetune.utils.console import accept_all_characters, configure_logging, quiet_libraries
from finetune.utils.errors import ConfigError, DataError, raise_faults
from finetune.utils.options import CommandParser, fill, option

logger = logging.getLogger(__name__)

FIRST_ROWS, SAMPLE_OF_A_PAGE, MOST_NOT_KEPT = 5, 50, 200
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
    stats: bool = option(
        False, "also lengths, scripts, shares of the loss by source and role, near-duplicates and benchmark questions"
    )
    tasks: list[str] = option(
        ["lingowhale"], "benchmarks whose questions `--stats` looks for, as in `finetune evaluate`, where they are here"
    )
    limit: int | None = option(None, "read the first so many rows of the data only")
    json: bool = option(False, "one JSON line per row, all rows, with token ids and labels, as soon as each is ready")
    html: str | None = option(None, "write the rows to this file as a page; it may replace such a page, no other file")


def build_parser() -> CommandParser:
    """Build the parser of `finetune preview`."""
    usage = "[RECIPE.yaml] --model_name_or_path M --data_path D [--rows N ...|--sample N] [--html FILE|--json]"
    parser = CommandParser("finetune preview", usage, PreviewOptions)
    for group in (ModelArguments, DataArguments):
        parser.add_group(group, only={declared.name for declared in fields(group)} - NOT_OF_PREVIEW)
    parser.add_group(RunArguments, only={"config"})
    return parser


def parse_options(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PreviewOptions]:
    """Return the flags of the model and the data, and which rows are shown and how."""
    given, _, faults = read_flags(argv, build_parser(), build_training_parser())
    raise_faults([*faults, *missing(given, ("model_name_or_path", "data_path"))])
    locate_model(given)
    model, data, options = fill(ModelArguments, given), fill(DataArguments, given), fill(PreviewOptions, given)
    raise_faults([*data_faults(data), *_faults(options)])
    return model, data, options


def _faults(options: PreviewOptions) -> Iterator[str]:
    yield from below(1, "rows", None if options.rows is None else len(options.rows))
    yield from below(0, "rows", min(options.rows or [0]))
    yield from below(1, "sample", options.sample)
    yield from below(1, "limit", options.limit)
    chosen = [f"--{name}" for name in ("rows", "sample") if getattr(options, name) is not None]
    if len(chosen) == 2:
        yield "--rows and --sample exclude each other: keep one of them"
    others = [*chosen, *(f"--{name}" for name in ("html", "stats") if getattr(options, name))]
    if options.json and others:
        yield f"--json prints all rows: it excludes {others[0]}"


def main(argv: Sequence[str]) -> None:
    """Show rows in the terminal, as JSON lines, or as a page."""
    model, data, options = parse_options(argv)
    configure_logging(to_stderr=True)
    page = Path(options.html).expanduser() if options.html is not None else None
    if page is not None:
        check_replaceable(page)
    if options.stats:
        check_datasketch()
    find_local_sources(data.data_path, data.eval_data_path)
    check_tokenizer_files(model.tokenizer_source()[0])
    if data.chat_template is not None:
        read_template(data.chat_template)
    quiet_libraries()
    accept_all_characters(utf8=options.json)
    if model.trusts_code() and (code := code_note(model.model_name_or_path, model.model_revision)):
        logger.warning(code)
    terminal = PreviewTerminal()
    is_first = not (options.json or page or options.rows or options.sample)
    watch = _print_json if options.json else _FirstRows(terminal) if is_first else None
    _, chat_format, prepared = prepare_run_data(model, data, limit=options.limit, watch=watch)
    try:
        check_data(prepared, data)
    except DataError as error:
        logger.warning(f"training would refuse this data: {error}")
    if options.json:
        return
    shown, rows = ("", []) if is_first else _select(prepared, options)
    in_segments = segmenter(chat_format)
    preview = Preview(
        title=", ".join(source.name for source in prepared.sources),
        facts={
            "Model": model.model_name_or_path,
            "Format": chat_format.name,
            "Limit": f"{data.model_max_length:,} tokens (--too_long {data.too_long})",
        },
        summary=prepared.summary,
        shown=shown,
        cards=[sample_of(row, in_segments) for row in rows],
        not_kept=[
            (row.source, row.row, row.status, reason_of(row)) for row in islice(prepared.not_kept(), MOST_NOT_KEPT)
        ],
        statistics=_statistics(prepared, chat_format, options.tasks) if options.stats else None,
    )
    if page is not None:
        write_page(page, render_preview(preview))
        print(f"{page}: {len(rows):,} of {prepared.summary.rows:,} rows")
        return
    if not is_first:
        terminal.say_legend()
        terminal.say_rows(preview.cards)
    terminal.say_totals(preview)
    if preview.statistics is not None:
        print_sections(preview.statistics)


# ---- while the rows are prepared


def _print_json(_: ChatFormat, renderings: Iterator[RenderedConversation]) -> None:
    for rendering in renderings:
        examples = [{"input_ids": example.input_ids, "labels": example.labels} for example in rendering.examples]
        facts = {name: getattr(rendering, name) for name in ("row", "id", "status", "reason")}
        print(json.dumps({**facts, "examples": examples}, ensure_ascii=False))
    sys.stdout.flush()


class _FirstRows:
    """Shows the first rows as soon as they are there; all others are only counted."""

    def __init__(self, terminal: PreviewTerminal) -> None:
        self.terminal, self.left = terminal, FIRST_ROWS

    def __call__(self, chat_format: ChatFormat, renderings: Iterator[RenderedConversation]) -> None:
        in_segments = segmenter(chat_format)
        cards = [sample_of(rendering, in_segments) for rendering in islice(renderings, self.left)]
        if cards and self.left == FIRST_ROWS:
            self.terminal.say_legend()
        self.terminal.say_rows(cards)
        sys.stdout.flush()
        self.left -= len(cards)


# ---- which rows


def _select(prepared: PreparedData, options: PreviewOptions) -> tuple[str, list[RenderedConversation]]:
    """Return a sentence that says which rows are shown, and the rows, read in one pass that ends with the last."""
    total, by_source = prepared.summary.rows, prepared.summary.rows_by_source
    if options.rows is not None:
        rows = set(options.rows)
        most = max(by_source.values(), default=0)
        if missing_rows := sorted(row for row in rows if not 0 <= row < most):
            existing = "; ".join(f"{source} has rows 0 to {count - 1:,}" for source, count in by_source.items())
            raise ConfigError(f"--rows {' '.join(map(str, missing_rows))}: there is no such row: {existing}")
        wanted = sum(row < count for row in rows for count in by_source.values())
        named = (rendering for rendering in prepared.renderings() if rendering.row in rows)
        return f"Rows asked for: {wanted:,} of {total:,}", list(islice(named, wanted))
    sample = SAMPLE_OF_A_PAGE if options.html is not None and options.sample is None else options.sample
    if sample is None or sample >= total:
        count = min(FIRST_ROWS if sample is None else sample, total)
        words = f"All {total:,} rows" if count == total else f"The first {count:,} of {total:,} rows"
        return words, list(islice(prepared.renderings(), count))
    drawn = set(random.Random(options.seed).sample(range(total), sample))
    chosen = (rendering for number, rendering in enumerate(prepared.renderings()) if number in drawn)
    return f"{sample:,} of {total:,} rows, drawn with seed {options.seed}", list(islice(chosen, sample))


def _statistics(prepared: PreparedData, chat_format: ChatFormat, tasks: Sequence[str]) -> ResultSection:
    from finetune.evaluation.benchmarks import read_benchmark_questions  # it needs torch

    questions, unread = read_benchmark_questions(tasks)
    return statistics_section(prepared, chat_format.plain, questions, unread)
