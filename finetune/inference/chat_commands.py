"""What is typed: messages of one line or several, and commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BLOCK = '"""'
FIRST, NEXT = "> ", ". "
COMMANDS = {
    "help": ("", "this list"),
    "system": ("TEXT", "a system turn in front of the conversation; alone: shows it; - removes it"),
    "retry": ("", "the last question again"),
    "undo": ("", "forget the last question and its answer"),
    "reset": ("", "forget the conversation, but for the system turn"),
    "save": ("FILE", "append the conversation to a JSON or JSON lines file, as a training row"),
    "exit": ("", "leave, as Ctrl-D does"),
}


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash."""

    name: str
    argument: str


def read_message(read: Callable[[str], str]) -> str | Command:
    """What the user says next; `read` returns a line without its end, behind a prompt.

    A line that ends with a backslash goes on in the next; lines between two `\"\"\"` are one message, as they are. A
    paste with several lines is one line to a terminal that brackets it, and is kept whole.

    Raises:
        EOFError: nothing more will come.
    """
    line = read(FIRST)
    if line.lstrip().startswith(BLOCK):
        return _block(line.lstrip().removeprefix(BLOCK), read)
    if line.startswith("/") and "\n" not in line:
        name, _, argument = line[1:].strip().partition(" ")
        return Command(name, argument.strip())
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(read(NEXT))
    return "\n".join(lines).strip("\n")


def _block(first: str, read: Callable[[str], str]) -> str:
    lines = first.split("\n")
    while not lines[-1].rstrip().endswith(BLOCK):
        lines += read(NEXT).split("\n")
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


def help_lines() -> list[str]:
    """The commands and keys, one line each."""
    width = max(len(f"/{name} {argument}") for name, (argument, _) in COMMANDS.items()) + 2
    return [f"{f'/{name} {argument}':<{width}}{does}" for name, (argument, does) in COMMANDS.items()] + [
        'several lines: end each but the last with \\, or begin and end with """; a paste is kept whole',
        "Ctrl-C stops an answer, a second one leaves",
    ]
