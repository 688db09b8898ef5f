"""`finetune chat` in a terminal: messages of one or several lines, and commands that begin with a slash."""

from __future__ import annotations

import re
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.conversation import Turn
from finetune.inference.answer_turns import ReasoningText, call_text, turn_text
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import TOOL_COMMAND, ChatSession, save_conversation
from finetune.inference.generate import AnswerStream, is_generating
from finetune.inference.load_result import BASE, TUNED
from finetune.utils.errors import FinetuneError, exit_now

MIN_COLUMNS_FOR_TABLE = 72
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TABLE_FRAME_LINES = 5
BLOCK = '"""'
PROMPT, CONTINUATION_PROMPT = "> ", ". "
NO_SYSTEM = "-"
COMMANDS = {
    "help": ("", "show this list"),
    "system": ("TEXT", "set a system turn before the conversation; without TEXT: show it; -: remove it"),
    "tool": ("RESULT", "give the result of the call that the model has made; it goes on when all calls have one"),
    "retry": ("", "ask the last question again"),
    "undo": ("", "remove the last question and its answer"),
    "reset": ("", "start a new conversation; the system turn stays"),
    "save": ("FILE", "append the conversation to a file of JSON lines, as a training row"),
    "exit": ("", "leave, as Ctrl-D does"),
}
KEYS_HELP = (
    'several lines: end each line but the last with \\, or enclose them in """; a paste is one message',
    "Ctrl-C stops an answer, a second one leaves",
)


def read_message(read: Callable[[str], str]) -> str | tuple[str, str]:
    """Read the next message, or the name and argument of a command, which begins with a slash.

    `read` shows a prompt and returns a line without its line end.
    A line that ends with a backslash continues in the next one; lines in triple quotes are one message, unchanged.
    A terminal with bracketed paste delivers a paste of several lines as one line, which is kept whole.
    """
    line = read(PROMPT)
    if line.lstrip().startswith(BLOCK):
        return _read_block(line.lstrip().removeprefix(BLOCK), read)
    if line.startswith("/") and "\n" not in line:
        name, _, argument = line[1:].strip().partition(" ")
        return name, argument.strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(read(CONTINUATION_PROMPT))
    return "\n".join(lines).strip("\n")


def _read_block(first: str, read: Callable[[str], str]) -> str:
    lines = first.split("\n")
    while not lines[-1].rstrip().endswith(BLOCK):
        lines += read(CONTINUATION_PROMPT).split("\n")
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


class TerminalChat:
    """Reads messages and commands and shows answers; one object is one conversation."""

    def __init__(
        self, models: ChatModels, chat: ChatSession, console: Console, read: Callable[[str], str] | None = None
    ) -> None:
        self.models, self.chat, self.console = models, chat, console
        self.read = read or _line_reader(console)
        self.attempt = 0  # answers so far, including those that were undone
        self.should_exit = False
        self.exit_on_interrupt = False

    def run(self) -> None:
        """Chat until the user leaves."""
        self.note(f"{self.models.model_description}; {self.models.decoding_description}")
        if len(self.models.names) > 1:
            self.note(f"{TUNED} and {BASE} answer the same conversation; the {TUNED} answers are kept in it")
        if self.chat.system:
            self.note(f"system: {self.chat.system}")
        if self.chat.tools:
            self.note(f"tools: {', '.join(tool['function']['name'] for tool in self.chat.tools)}")
        self.note("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves")
        while not self.should_exit:
            try:
                self.handle_message()
            except EOFError:
                self.console.print()
                self.should_exit = True
            except KeyboardInterrupt:
                self.handle_interrupt()
        if is_generating():
            exit_now(0)  # not waiting for a model that is still generating

    def handle_message(self) -> None:
        """Read one message or command and act on it."""
        message = read_message(self.read)
        try:
            if isinstance(message, tuple):
                self.run_command(*message)
            elif message.strip():
                self.ask(message)
        except FinetuneError as error:
            self.console.print(Text(f"error: {error}", style="red"), soft_wrap=True)

    def handle_interrupt(self) -> None:
        """Handle Ctrl-C while nothing is generated: the second one leaves."""
        self.console.print()
        if self.exit_on_interrupt:
            self.should_exit = True
        else:
            self.note("press Ctrl-C again to leave")
        self.exit_on_interrupt = True

    def ask(self, message: str) -> None:
        """Show the answers to a question, or to the result of a call, and keep that of the first model."""
        answers: dict[str, Turn] = {}
        self.exit_on_interrupt = False
        asked = self.chat.asked(message)
        if asked:
            try:
                with no_echo():
                    self.show(self.chat.turns(asked), answers)
            except KeyboardInterrupt:
                self.exit_on_interrupt = True
                self.note("stopped; the partial answer is kept, /undo removes it; press Ctrl-C again to leave")
            self.attempt += 1
            answer = answers.get(self.models.names[0])
            if answer is not None and turn_text(answer):
                self.chat.add(asked, answer)
            else:
                self.note("the answer is empty, so the question is not kept")
                return
        for call in self.chat.open_calls:
            self.note(f"called: {call_text(call)}; give its result with /tool RESULT")

    def show(self, turns: list[Turn], answers: dict[str, Turn]) -> None:
        """Show the answers while they are generated; two models side by side."""
        names = self.models.names
        if len(names) == 1:
            with self.models.stream(names[0], turns, tools=self.chat.tools, attempt=self.attempt) as stream:
                show_answer(self.console, names[0], self.pieces(stream, names[0], answers))
            return
        with SideBySide(self.console, names) as columns:
            for name in names:
                with self.models.stream(name, turns, tools=self.chat.tools, attempt=self.attempt) as stream:
                    columns.show(name, self.pieces(stream, name, answers))

    def pieces(self, stream: AnswerStream, name: str, answers: dict[str, Turn]) -> Iterator[str]:
        """Yield the pieces of an answer; store it in `answers`, also when it is interrupted."""
        trained = self.models.loaded.result.run.get("arguments", {}).get("model_max_length")
        if trained and len(stream.prompt) > trained:
            self.note(
                f"the conversation is longer than the {trained:,} tokens of the training (--model_max_length); "
                "/reset starts a new one"
            )
        try:
            yield from stream
        finally:
            answers[name] = stream.turn
        if not stream.ended:
            yield f" [cut off at {len(stream.ids):,} tokens, see --max_new_tokens]"

    def run_command(self, name: str, argument: str) -> None:
        """Run a command."""
        if name not in COMMANDS:
            self.note(
                f"unknown command /{name}: /help lists the commands; enclose a message that begins with / in "
                '""" and """'
            )
        else:
            getattr(self, f"do_{name}")(argument)

    def do_help(self, _: str) -> None:
        usages = {f"/{name} {argument}": effect for name, (argument, effect) in COMMANDS.items()}
        width = max(map(len, usages)) + 2
        for line in (*(f"{usage:<{width}}{effect}" for usage, effect in usages.items()), *KEYS_HELP):
            self.note(line)

    def do_system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == NO_SYSTEM else text
        self.note(f"system: {self.chat.system}" if self.chat.system else "no system turn")

    def do_tool(self, result: str) -> None:
        self.ask(TOOL_COMMAND + result)

    def do_retry(self, _: str) -> None:
        question = self.chat.undo()
        if question is None:
            self.note("there is no question yet")
            return
        if self.models.sampling.temperature == 0:
            self.note("greedy decoding gives the same answer again; sample with --temperature")
        self.ask(question)

    def do_undo(self, _: str) -> None:
        question = self.chat.undo()
        self.note("there is no question yet" if question is None else f"removed: {question}")

    def do_reset(self, _: str) -> None:
        self.chat.reset()
        self.note("new conversation" + (f"; system: {self.chat.system}" if self.chat.system else ""))

    def do_save(self, name: str) -> None:
        if not name:
            self.note("/save needs a file name: /save FILE")
        elif not self.chat.pairs:
            self.note("there is nothing to save yet")
        else:
            path = Path(name).expanduser()
            rows = save_conversation(path, self.chat.turns(), self.chat.tools)
            self.note(f"saved: {path} has {rows:,} {'row' if rows == 1 else 'rows'}")

    def do_exit(self, _: str) -> None:
        self.should_exit = True

    def note(self, line: str) -> None:
        """Print a line that is not part of the conversation."""
        self.console.print(Text(printable(line), style="dim"), soft_wrap=True)


def _line_reader(console: Console) -> Callable[[str], str]:
    """Read lines with editing and a history for this process; the escape codes of the prompt take no width."""
    import readline  # noqa: F401 (input() edits lines once it is imported)

    color, reset = ("\x01\x1b[1;36m\x02", "\x01\x1b[0m\x02") if console.color_system else ("", "")

    def read(prompt: str) -> str:
        return input(f"{color}{prompt}{reset}")

    return read


# ---- answers on the screen, one after the other or in columns side by side


def printable(text: str) -> str:
    """Replace control characters: generated text must not control the terminal."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def styled(piece: str) -> Text:
    """A piece of an answer, dim if it is reasoning."""
    return Text(printable(piece), style="dim" if isinstance(piece, ReasoningText) else "")


def show_answer(console: Console, name: str, pieces: Iterable[str]) -> None:
    """Print a name and, after it, an answer while it is generated."""
    console.print(Text(f"{name}: ", style="bold green"), end="", soft_wrap=True)
    try:
        for piece in pieces:
            console.print(styled(piece), end="", soft_wrap=True)
    finally:
        console.print()


@contextmanager
def no_echo() -> Iterator[None]:
    """Do not echo keys inside the block; they are read afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    attributes = termios.tcgetattr(handle)
    silent = [*attributes[:3], attributes[3] & ~termios.ECHO, *attributes[4:]]
    termios.tcsetattr(handle, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, attributes)


class SideBySide:
    """Answers in columns; one below the other where the output is narrow or no terminal."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.texts = {name: Text() for name in names}
        self.in_columns = console.is_terminal and console.width >= MIN_COLUMNS_FOR_TABLE
        self._live = Live(console=console, refresh_per_second=12, transient=True)

    def __enter__(self) -> SideBySide:
        if self.in_columns:
            self._live.start()
            self._live.update(self._table(cropped=True))
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_columns:
            self._live.stop()
            self.console.print(self._table(cropped=False))

    def show(self, name: str, pieces: Iterable[str]) -> None:
        """Show an answer while it is generated."""
        if not self.in_columns:
            show_answer(self.console, name, pieces)
            return
        for piece in pieces:
            self.texts[name].append_text(styled(piece))
            self._live.update(self._table(cropped=True))

    def _table(self, *, cropped: bool) -> Table:
        """Draw all answers; `cropped` to the last lines that fit the screen, for a live display."""
        table = Table(expand=True, show_edge=False, pad_edge=False, header_style="bold green")
        for name in self.texts:
            table.add_column(name, ratio=1, overflow="fold")
        width = max(1, (self.console.width - 3 * (len(self.texts) - 1)) // len(self.texts))
        cells = [text.copy() for text in self.texts.values()]
        if cropped:
            height = max(1, self.console.height - TABLE_FRAME_LINES)
            cells = [Text("\n").join(list(cell.wrap(self.console, width))[-height:]) for cell in cells]
        table.add_row(*cells)
        return table
