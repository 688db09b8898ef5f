"""The format published with LingoWhale-8B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.chat_templates.example import SupervisedSpan, TokenizedConversation, TurnSpan, UnrenderableError
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.supervision_rules import SYSTEM_RULE, is_supervised, system_in_front
from finetune.conversation import Turn
from finetune.utils.errors import ConfigError


class LingoWhaleFormat:
    """The format published with LingoWhale-8B: a marker before each turn, an end token learned after each model turn.

        input_ids   <human> Hi   <model> Yes  <human> Bye  <model> Ok   </s>
        labels      -100    -100 -100    Yes  </s>    -100 -100    Ok   </s>

    After a model turn's last token the model learns to stop: the label at the next human marker is the end token,
    although the id seen there is the marker. The last turn is closed by a real end token. A system turn has no marker
    of its own and is put in front of the first human turn.
    """

    name = "lingowhale"

    def __init__(
        self,
        tokenizer: Any,
        human_token_ids: Sequence[int],
        model_token_ids: Sequence[int],
        content_tokens: Sequence[str] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "--chat_template lingowhale: the tokenizer has no end-of-sequence token to end a turn with"
            )
        self.plain = PlainTextTokenizer(tokenizer, content_tokens)
        self.end = tokenizer.eos_token_id
        self.markers = {"human": list(human_token_ids), "model": list(model_token_ids)}

    def tokenize_all(self, rows: Sequence[Sequence[Turn]]) -> list[TokenizedConversation | UnrenderableError]:
        """See the drawing above."""
        return [self._lay_out(turns) for turns in rows]

    def identity(self) -> dict[str, Any]:
        """The markers and the end."""
        return {"name": self.name, "markers": self.markers, "end": self.end}

    def _lay_out(self, turns: Sequence[Turn]) -> TokenizedConversation | UnrenderableError:
        layout = TokenizedConversation(spelled=sum(self.plain.spells_control_token(turn.text) for turn in turns))
        skipped = 0
        if turns[0].role == "system":
            if turns[1].role != "human":
                return UnrenderableError(
                    "this format puts a system turn in front of the first human turn, and there is none"
                )
            turns, skipped = system_in_front(turns), 1
            layout.rules.append(SYSTEM_RULE)
        try:
            encoded = self.plain.encode_all([turn.text for turn in turns])
        except UnrenderableError as refusal:
            return refusal
        for number, (turn, ids) in enumerate(zip(turns, encoded, strict=True)):
            start = len(layout.input_ids)
            layout.add(self.markers[turn.role], learned=False)
            if number and is_supervised(turns[number - 1]):
                layout.labels[start] = self.end
            layout.add(ids, learned=is_supervised(turn))
            stop = len(layout.input_ids)
            layout.spans.append(TurnSpan(number + skipped, turn.role, start, stop))
            if is_supervised(turn):
                begin = start + len(self.markers["model"])
                layout.answers.append(SupervisedSpan(number + skipped, begin, stop + 1, turn.text))
        layout.add([self.end], learned=is_supervised(turns[-1]))
        return layout
