"""The format published with LingoWhale-8B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.chat_templates.example import (
    SYSTEM_RULE,
    SupervisedSpan,
    TokenizedConversation,
    TurnSpan,
    UnrenderableError,
    system_in_front,
)
from finetune.chat_templates.messages import with_reasoning_inside
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.chat_templates.template_skeleton import rules_of_variables
from finetune.chat_templates.template_styles import WITH_TOOLS
from finetune.conversation import Conversation
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LingoWhaleFormat:
    """The format published with LingoWhale-8B: a marker before each turn, an end token after each model turn.

        input_ids   <human> Hi   <model> Yes  <human> Bye  <model> Ok   </s>
        labels      -100    -100 -100    Yes  </s>    -100 -100    Ok   </s>

    After the last token of a model turn the end token is supervised: it is the label at the next human marker, although
    the input there is the marker. The last turn is closed by a real end token. A system turn has no marker; its text is
    put in front of the first human turn.
    """

    name = "lingowhale"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
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

    def split_history(self, conversation: Conversation) -> list[Conversation]:
        """The conversation: this format writes a turn alike whatever follows it."""
        return [conversation]

    def tokenize_all(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation | UnrenderableError]:
        """Tokenize the turns of each conversation as in the drawing above; reasoning is part of the text."""
        return [self._tokenize(conversation) for conversation in conversations]

    def identity(self) -> dict[str, Any]:
        """The markers and the end token."""
        return {"name": self.name, "markers": self.markers, "end": self.end}

    def _tokenize(self, conversation: Conversation) -> TokenizedConversation | UnrenderableError:
        if conversation.tools or any(turn.role == "tool" or turn.tool_calls for turn in conversation.turns):
            return UnrenderableError(f"LingoWhale's format has no tools: {WITH_TOOLS}")
        try:
            rules = rules_of_variables(conversation, "")
        except UnrenderableError as error:
            return error
        turns = tuple(
            replace(turn, text=with_reasoning_inside(turn.reasoning, turn.text)) if turn.reasoning else turn
            for turn in conversation.turns
        )
        spelled = sum(self.plain.spells_control_token(turn.text) for turn in turns)
        tokenized = TokenizedConversation(rules=rules, spelled=spelled)
        num_system = 0
        if turns[0].role == "system":
            if turns[1].role != "human":
                return UnrenderableError(
                    "this format puts a system turn in front of the first human turn, and there is none"
                )
            turns, num_system = system_in_front(turns), 1
            tokenized.rules.append(SYSTEM_RULE)
        if other := next((turn.role for turn in turns if turn.role not in self.markers), None):
            return UnrenderableError(f"this format has no {other} turns behind the first turn")
        try:
            encoded = self.plain.encode_all([turn.text for turn in turns])
        except UnrenderableError as error:
            return error
        for number, (turn, ids) in enumerate(zip(turns, encoded, strict=True)):
            start = len(tokenized.input_ids)
            tokenized.add(self.markers[turn.role], supervised=False)
            if number and turns[number - 1].is_supervised:
                tokenized.labels[start] = self.end
            begin = len(tokenized.input_ids)
            tokenized.add(ids, supervised=turn.is_supervised)
            stop = len(tokenized.input_ids)
            tokenized.turn_spans.append(TurnSpan(number + num_system, turn.role, start, stop))
            if turn.is_supervised:
                tokenized.supervised_spans.append(SupervisedSpan(number + num_system, begin, stop + 1, turn.text))
        tokenized.add([self.end], supervised=turns[-1].is_supervised)
        return tokenized
