"""Print the results of an evaluation in the terminal: tables, conversations, verdict."""

from __future__ import annotations

from finetune.report.preview_terminal import PreviewTerminal, harmless
from finetune.run_dir.eval_results import ResultSection, ResultTable

PIPED_WIDTH, MAX_NAME_WIDTH = 120, 24


def print_sections(section: ResultSection) -> None:
    """Print a section to stdout."""
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
