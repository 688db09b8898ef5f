"""An evaluation in the terminal: a verdict, tables, conversations as text."""

from __future__ import annotations

from finetune.chat_templates.text_segments import Segment
from finetune.report.preview_terminal import PreviewTerminal, harmless
from finetune.run_dir.eval_results import ResultSection, ResultTable

PIPED_WIDTH, WIDEST_NAME = 120, 24


def print_sections(section: ResultSection) -> None:
    """Everything of a section, on stdout."""
    terminal = PreviewTerminal()
    terminal.say([("\n" + harmless(section.title), "bold underline")])
    for table in section.tables:
        _show_table(terminal, table)
    for title, rows in section.rows:
        terminal.say([("\n" + title, "bold")])
        for row in rows:
            terminal.say([(harmless(row.title), "underline")])
            terminal.say_segments([Segment(**one) for one in row.segments])
    for note in section.notes:
        terminal.say([(harmless(f"  {note}"), "dim")])
    for line in section.verdict:
        terminal.say([(harmless(line[:1].upper() + line[1:]), "bold"), "."])


def _show_table(terminal: PreviewTerminal, table: ResultTable) -> None:
    """Numbers stay whole; where the terminal is narrow, the names in front and the head are folded."""
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(title=Text(table.title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(table.head):
        cells = [row[number] for row in table.rows]
        if number == 0:
            drawn.add_column(Text(name), overflow="fold", min_width=min(WIDEST_NAME, max(map(len, cells), default=0)))
        else:
            widest = max(map(len, [*cells, *name.split()]))
            drawn.add_column(Text(name), justify="right", overflow="fold", min_width=widest)
    for row in table.rows:
        drawn.add_row(*(Text(harmless(cell)) for cell in row))
    width = terminal.console.width if terminal.console.is_terminal else max(terminal.console.width, PIPED_WIDTH)
    terminal.console.print(drawn, soft_wrap=False, crop=False, width=width)
