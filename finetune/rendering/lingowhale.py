"""The format published with LingoWhale-8B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.conversations import Turn
from finetune.errors import ConfigError
from finetune.rendering.examples import Layout, TurnSpan, Unrenderable
from finetune.rendering.plain_text import PlainText

SYSTEM_SEPARATOR = "\n\n"


class LingoWhaleFormat:
    """The format published with LingoWhale-8B: a marker before each turn, an end token learned after each model turn.

        input_ids   <human> Hi   <model> Yes  <human> Bye  <model> Ok   </s>
        labels      -100    -100 -100    Yes  </s>    -100 -100    Ok   </s>

    After a model turn's last token the model learns to stop: the label at the next human marker is the end token,
    although the id seen there is the marker. The last turn is closed by a real end token. A system turn has no marker
    of its own and is put in front of the first human turn.
    """

    name = "lingowhale"

    def __init__(self, tokenizer: Any, human_token_ids: Sequence[int], model_token_ids: Sequence[int]) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "--chat_template lingowhale: the tokenizer has no end-of-sequence token to end a turn with"
            )
        self.plain = PlainText(tokenizer)
        self.end = tokenizer.eos_token_id
        self.markers = {"human": list(human_token_ids), "model": list(model_token_ids)}
        self.rule: str | None = None

    def lay_out(self, turns: Sequence[Turn]) -> Layout:
        """See the drawing above."""
        layout = Layout()
        skipped = 0
        self.rule = None
        if turns[0].role == "system":
            system, first, *others = turns
            if first.role != "human":
                raise Unrenderable("this format puts a system turn in front of the first human turn, and there is none")
            turns = [Turn("human", system.text + SYSTEM_SEPARATOR + first.text), *others]
            skipped = 1
            self.rule = "system turn put in front of the first human turn"
        for number, turn in enumerate(turns):
            start = len(layout.input_ids)
            layout.add(self.markers[turn.role], learned=False)
            if number and turns[number - 1].role == "model":
                layout.labels[start] = self.end
            layout.add(self.plain.encode(turn.text), learned=turn.role == "model")
            layout.spans.append(TurnSpan(number + skipped, turn.role, start, len(layout.input_ids)))
        layout.add([self.end], learned=turns[-1].role == "model")
        return layout
