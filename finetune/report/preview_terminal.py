"""Rows and the results of evaluations in a terminal, which their text cannot steer."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from finetune.chat_templates.text_segments import Segment
from finetune.report.html_pages import SHAPELESS, Preview, name_of
from finetune.run_dir.data_samples import RowSample, TurnSample
from finetune.run_dir.eval_results import ResultSection, ResultTable
from finetune.utils.console import rich_console
from finetune.utils.errors import SHOWN_FAULTS

PIPED_WIDTH, MAX_NAME_WIDTH, COLUMN_GAP = 120, 24, 2  # of tables
CONTEXT, SUPERVISED, CONTROL, END = "dim", "bold green", "reverse magenta", "reverse green"


class PreviewTerminal:
    """Stdout, in colour where the terminal has colours."""

    def __init__(self) -> None:
        self.console = rich_console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.in_colour = self.console.color_system is not None and not self.console.no_color

    def say(self, parts: Iterable[str | tuple[str, str]] = ()) -> None:
        """Print texts or (text, style) pairs as one line or several, ended by one line feed."""
        from rich.text import Text

        text = Text.assemble(*parts)
        self.console.print(text, end="" if text.plain.endswith("\n") else "\n")

    def say_legend(self) -> None:
        """Print what the styles mean."""
        if self.in_colour:
            words = (("context", CONTEXT), ("supervised", SUPERVISED), ("control token", CONTROL), ("end of turn", END))
            self.say([part for word in words for part in (word, "  ")][:-1])
        else:
            self.say(["context  ⟦supervised⟧  «control token»  ⟦«end of turn»⟧"])

    def say_rows(self, cards: Iterable[RowSample]) -> None:
        """Print rows, each after an empty line."""
        for card in cards:
            self.say()
            identity = "" if card.id is None else f", id {card.id}"
            share = f" ({card.supervised / card.tokens:.1%})" if card.tokens else ""
            facts = f"{card.status}, {card.tokens:,} tokens, {card.supervised:,} supervised{share}"
            self.say([(harmless(f"{card.source}, row {card.row}{identity}: {facts}"), "bold underline")])
            if card.reason:
                self.say([(harmless(card.reason), "yellow")])
            for number, example in enumerate(card.examples, start=1):
                if len(card.examples) > 1:
                    self.say([(f"window {number} of {len(card.examples)}", "bold")])
                self.say_turns(example)

    def say_totals(self, preview: Preview) -> None:
        """Print what the rows of the data set are, counted, and which were not kept whole."""
        if count := preview.summary.not_whole:
            self.say(["\n", (f"Rows not kept whole: {count:,}", "bold")])
            for source, row, status, reason in preview.not_kept[:SHOWN_FAULTS]:
                self.say([harmless(f"  {source}, row {row}: {status}: {reason}")])
            if count > SHOWN_FAULTS:
                self.say([f"  ... and {count - SHOWN_FAULTS:,} more"])
        self.say([harmless(f"\n{preview.title} in {preview.facts['Format']}")])
        for line in preview.summary.lines():
            self.say([harmless(f"  {line}")])

    def say_turns(self, turns: Sequence[TurnSample]) -> None:
        """Print an example, each turn under a line with its role and what it is."""
        between: list[Segment] = []
        parts: list[tuple[str, list[Segment]]] = []
        for turn in turns:
            if turn.role is None:
                between += turn.pieces
                continue
            if parts and sum(segment.is_control for segment in between) > 1 and between[0].is_control:
                parts[-1][1].append(between.pop(0))  # the end of the turn before it
            if parts and between and not between[0].text.strip():
                parts[-1][1].append(between.pop(0))
            parts.append((", ".join([turn.role, *turn.facts]), [*between, *turn.pieces]))
            between = []
        parts[-1][1].extend(between)
        for label, segments in parts:
            self.say([(harmless(f"── {label}"), "cyan")])
            self.say_segments(segments)

    def say_segments(self, segments: Sequence[Segment]) -> None:
        """Print segments. An arrow marks the label of a position whose input is another token."""
        if self.in_colour:
            self.say([(_shown(segment), _style(segment)) for segment in segments])
            return
        parts = []
        for supervised, run in groupby(segments, attrgetter("is_supervised")):
            text = "".join(f"«{_shown(segment)}»" if segment.is_control else _shown(segment) for segment in run)
            parts.append(f"⟦{text}⟧" if supervised else text)
        self.say(parts)


def _style(segment: Segment) -> str:
    if segment.is_supervised:
        return END if segment.is_control else SUPERVISED
    return CONTROL if segment.is_control else CONTEXT


def _shown(segment: Segment) -> str:
    return ("" if segment.read else "→") + harmless(segment.text)


def harmless(text: str) -> str:
    """Return text that can neither steer a terminal nor hide in it."""
    return SHAPELESS.sub(lambda match: "".join(f"‹{name_of(character)}›" for character in match.group()), text)


def print_sections(section: ResultSection) -> None:
    """Print the results of an evaluation to stdout: tables, conversations, verdict."""
    terminal = PreviewTerminal()
    terminal.say([("\n" + harmless(section.title), "bold underline")])
    for table in section.tables:
        _show_table(terminal, table)
    for title, rows in section.rows:
        terminal.say([("\n" + title, "bold")])
        for row in rows:
            terminal.say([(harmless(row.title), "underline")])
            terminal.say_segments(row.segments)
    for note in section.notes:
        terminal.say([(harmless(f"  {note}"), "dim")])
    for line in section.verdict:
        terminal.say([(harmless(line[:1].upper() + line[1:]), "bold"), "."])


def _show_table(terminal: PreviewTerminal, table: ResultTable) -> None:
    """Print a table. In a narrow terminal names and head are folded, and columns that do not fit follow below."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if not terminal.console.is_terminal:
        terminal.console.width = max(terminal.console.width, PIPED_WIDTH)
    columns = [[name, *(harmless(row[place]) for row in table.rows)] for place, name in enumerate(table.head)]
    widths = [max(map(cell_len, cells)) for cells in columns]
    if sum(widths) + COLUMN_GAP * (len(widths) - 1) > terminal.console.width:
        widths = [max(map(cell_len, [*name.split(), *cells]), default=0) for name, *cells in columns]
        widths[0] = min(widths[0], MAX_NAME_WIDTH)
    shown = min(2, len(widths))  # names and numbers, however narrow it is
    while shown < len(widths) and sum(widths[: shown + 1]) + COLUMN_GAP * shown <= terminal.console.width:
        shown += 1
    grid = Table(title=Text(table.title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place in range(shown):
        grid.add_column(
            Text(table.head[place]), justify="right" if place else "left", overflow="fold", width=widths[place]
        )
    for cells in zip(*(cells[1:] for cells in columns[:shown]), strict=True):
        grid.add_row(*map(Text, cells))
    terminal.console.print(grid, soft_wrap=False, crop=False)
    if shown < len(widths):
        head, *rows = (cells[:1] + cells[shown:] for cells in (table.head, *table.rows))
        _show_table(terminal, ResultTable("", head, rows))
