"""A conversation in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from finetune.conversation import Turn
from finetune.inference.chat_commands import COMMANDS, Command, help_lines, read_message
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_screen import SideBySide, nothing_echoed, printable, show_answer
from finetune.inference.chat_session import ChatSession
from finetune.inference.generate import AnswerStream, is_busy
from finetune.inference.load_result import BASE, TUNED
from finetune.inference.save_chat import save_conversation
from finetune.utils.errors import FinetuneError

NO_SYSTEM = "-"


class TerminalChat:
    """Reads questions and commands, shows answers; one object is one conversation."""

    def __init__(
        self, voices: ChatModels, chat: ChatSession, console: Console, read: Callable[[str], str] | None = None
    ) -> None:
        self.voices, self.chat, self.console = voices, chat, console
        self.read = read or _typed(console)
        self.take = 0  # answers so far, also those that were taken back
        self.leaves = False
        self.is_warned = False  # that a second Ctrl-C leaves

    def run(self) -> None:
        """Talk until the user leaves."""
        self.note(f"{self.voices.what}; {self.voices.how}")
        if len(self.voices.names) > 1:
            self.note(f"{TUNED} and {BASE} answer the same conversation; the {TUNED} answers are kept in it")
        if self.chat.system:
            self.note(f"system: {self.chat.system}")
        self.note("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves")
        while not self.leaves:
            try:
                self.turn()
            except EOFError:
                self.console.print()
                self.leaves = True
            except KeyboardInterrupt:
                self.interrupted()
        if is_busy():
            _leave_now()

    def turn(self) -> None:
        """One message or command."""
        message = read_message(self.read)
        try:
            if isinstance(message, Command):
                self.do(message)
            elif message.strip():
                self.ask(message)
        except FinetuneError as error:
            self.console.print(Text(f"error: {error}", style="red"), soft_wrap=True)

    def interrupted(self) -> None:
        """Ctrl-C where nothing was being answered."""
        self.console.print()
        if self.is_warned:
            self.leaves = True
        else:
            self.note("Ctrl-C once more leaves")
        self.is_warned = True

    def ask(self, question: str) -> None:
        """Answer, and keep what the first voice said."""
        turns = self.chat.asking(question)
        answers: dict[str, str] = {}
        self.is_warned = False
        try:
            with nothing_echoed():
                self.show(turns, answers)
        except KeyboardInterrupt:
            self.is_warned = True
            self.note("stopped; what was said is kept, /undo forgets it; Ctrl-C once more leaves")
        self.take += 1
        kept = answers.get(self.voices.names[0], "")
        if kept:
            self.chat.keep(question, kept)
        else:
            self.note("nothing was said, so the question is not kept")

    def show(self, turns: list[Turn], answers: dict[str, str]) -> None:
        """The answer as it comes; two next to each other."""
        if len(self.voices.names) == 1:
            (name,) = self.voices.names
            with self.voices.speaking(name, turns, take=self.take) as answering:
                show_answer(self.console, name, self.heard(answering, name, answers))
            return
        with SideBySide(self.console, self.voices.names) as columns:
            for name in self.voices.names:
                with self.voices.speaking(name, turns, take=self.take) as answering:
                    columns.show(name, self.heard(answering, name, answers))

    def heard(self, answering: AnswerStream, name: str, answers: dict[str, str]) -> Iterator[str]:
        """The pieces of an answer; its text is kept however it ends."""
        trained = self.voices.trained_length
        if trained and len(answering.prompt) > trained:
            self.note(
                f"the conversation is longer than the {trained:,} tokens that were trained on; /reset begins anew"
            )
        try:
            yield from answering
        finally:
            answers[name] = answering.text
        if not answering.ended:
            yield f" [cut off at {len(answering.ids):,} tokens, see --max_new_tokens]"

    def do(self, command: Command) -> None:
        """Carry a command out."""
        if command.name not in COMMANDS:
            self.note(
                f"unknown command /{command.name}: /help lists them; a message that begins with / goes between "
                '""" and """'
            )
        else:
            getattr(self, f"do_{command.name}")(command.argument)

    def do_help(self, _: str) -> None:
        for line in help_lines():
            self.note(line)

    def do_system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == NO_SYSTEM else text
        self.note(f"system: {self.chat.system}" if self.chat.system else "no system turn")

    def do_retry(self, _: str) -> None:
        question = self.chat.undo()
        if question is None:
            self.note("nothing has been asked yet")
            return
        if self.voices.sampling.temperature == 0:
            self.note("greedy: the same again, unless --temperature is given")
        self.ask(question)

    def do_undo(self, _: str) -> None:
        question = self.chat.undo()
        self.note("nothing has been asked yet" if question is None else f"forgotten: {question}")

    def do_reset(self, _: str) -> None:
        self.chat.reset()
        self.note("a new conversation" + (f"; system: {self.chat.system}" if self.chat.system else ""))

    def do_save(self, name: str) -> None:
        if not name:
            self.note("/save needs the name of a file")
        elif not self.chat.pairs:
            self.note("there is nothing to save yet")
        else:
            path = Path(name).expanduser()
            rows = save_conversation(path, self.chat.turns())
            self.note(f"saved: {path} has {rows:,} {'row' if rows == 1 else 'rows'}")

    def do_exit(self, _: str) -> None:
        self.leaves = True

    def note(self, line: str) -> None:
        """A line that nobody of the conversation says."""
        self.console.print(Text(printable(line), style="dim"), soft_wrap=True)


def _typed(console: Console) -> Callable[[str], str]:
    """Lines with editing and history, which this process forgets; colours of the prompt take no width."""
    import readline  # noqa: F401 (input() edits lines once it is imported)

    colour, plain = ("\x01\x1b[1;36m\x02", "\x01\x1b[0m\x02") if console.color_system else ("", "")

    def read(prompt: str) -> str:
        return input(f"{colour}{prompt}{plain}")

    return read


def _leave_now() -> None:
    """The end while a model is still busy: nothing of it is waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
