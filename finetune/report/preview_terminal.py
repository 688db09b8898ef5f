"""Rows and the results of evaluations in a terminal, which their text cannot steer."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from finetune.chat_templates.text_segments import Segment
from finetune.report.html_pages import SHAPELESS, name_of
from finetune.run_dir.data_samples import TurnSample
from finetune.run_dir.eval_results import ResultSection, ResultTable
from finetune.utils.console import rich_console

PIPED_WIDTH, MAX_NAME_WIDTH = 120, 24  # of tables
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
    """Print a table. In a narrow terminal the names and the head are folded, never the numbers."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(table.title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(table.head):
        cells = [row[column] for row in table.rows]
        if column == 0:
            grid.add_column(Text(name), overflow="fold", min_width=min(MAX_NAME_WIDTH, max(map(len, cells), default=0)))
        else:
            widest = max(map(len, [*cells, *name.split()]))
            grid.add_column(Text(name), justify="right", overflow="fold", min_width=widest)
    for row in table.rows:
        grid.add_row(*(Text(harmless(cell)) for cell in row))
    width = terminal.console.width if terminal.console.is_terminal else max(terminal.console.width, PIPED_WIDTH)
    terminal.console.print(grid, soft_wrap=False, crop=False, width=width)
