"""Rows in a terminal: what is context, what is learned, what controls; text that can do the terminal no harm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from finetune.chat_templates.text_segments import Segment
from finetune.report import pages

STYLES = {"context": "dim", "learned": "bold green", "control": "reverse magenta", "learned_control": "reverse green"}
LEGEND = {"context": "context", "learned": "learned", "control": "control token", "learned_control": "end of a turn"}


class PreviewTerminal:
    """Stdout, in colour where it shows colour."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.in_colour = self.console.color_system is not None and not self.console.no_color

    def say(self, parts: Iterable[str | tuple[str, str]] = ()) -> None:
        """One line, or several, of texts or (text, style) pairs; a line feed at the end is enough of an end."""
        from rich.text import Text

        text = Text.assemble(*parts)
        self.console.print(text, end="" if text.plain.endswith("\n") else "\n")

    def say_legend(self) -> None:
        """What the styles mean."""
        between = Segment("context", "  ", None)
        legend = [one for kind, text in LEGEND.items() for one in (between, Segment(kind, text, None))]
        self.say_segments(legend[1:])

    def say_segments(self, found: Sequence[Segment]) -> None:
        """An example as text; an arrow says that the token is learned where another one is read."""
        self.say(self._marked(found))

    def _marked(self, found: Sequence[Segment]) -> list[tuple[str, str]]:
        if self.in_colour:
            return [(_shown(one), STYLES[one.kind]) for one in found]
        parts = []
        for learned, run in groupby(found, lambda one: one.is_learned):
            text = "".join(f"«{_shown(one)}»" if one.is_control else _shown(one) for one in run)
            parts.append((f"⟦{text}⟧" if learned else text, ""))
        return parts


def _shown(one: Segment) -> str:
    return ("" if one.read else "→") + harmless(one.text)


def harmless(text: str) -> str:
    """Text that can neither steer a terminal nor hide in it."""
    return pages.SHAPELESS.sub(lambda match: "".join(f"‹{pages.name_of(one)}›" for one in match.group()), text)
