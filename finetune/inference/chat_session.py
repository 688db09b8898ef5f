"""The conversation that is being held; it knows no model and no screen."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.conversation import Turn


@dataclass
class ChatSession:
    """Questions with their answers, behind a system turn if there is one.

    Attributes:
        pairs: what was asked and what was answered; a question without an answer is not kept.
    """

    system: str | None = None
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def turns(self) -> list[Turn]:
        """The conversation as a training row would hold it."""
        system = [Turn("system", self.system)] if self.system else []
        return system + [turn for asked, said in self.pairs for turn in (Turn("human", asked), Turn("model", said))]

    def asking(self, question: str) -> list[Turn]:
        """The conversation with a question at its end, to which an answer is wanted."""
        return [*self.turns(), Turn("human", question)]

    def keep(self, question: str, answer: str) -> None:
        """An answer has been given."""
        self.pairs.append((question, answer))

    def undo(self) -> str | None:
        """Forget the last question and its answer; returns the question, None where there is none."""
        return self.pairs.pop()[0] if self.pairs else None

    def reset(self) -> None:
        """Begin anew; the system turn stays."""
        self.pairs.clear()
