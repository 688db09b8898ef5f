"""The types that all packages share: turns, conversations, how these are rendered, and rows that could not be read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

Role = Literal["human", "model", "system", "tool", "text"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a declared function; `arguments` is a JSON object, its keys in the order of the data."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; a model turn with `train` False is context.

    `text` is blank only in a model turn with `tool_calls`, and in a `tool` turn. `reasoning` is what was written beside
    the text; reasoning inside the text (`<think>...</think>`) stays there. A `tool` turn is the result of the call
    `tool_call_id`, of the function `tool_name`, where the data name them. A `text` turn, alone in its conversation, is
    plain text for continued pretraining. The loss of a supervised turn's tokens is multiplied by `weight`.
    """

    role: Role
    text: str
    train: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tool_name: str | None = None
    weight: float = 1.0

    @property
    def is_supervised(self) -> bool:
        """Whether the labels hold this turn."""
        return self.role in ("model", "text") and self.train


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: `row` counts from 0 in its source, bad rows included; `repairs` describes the repairs made.

    `tools` are the declarations as chat templates take them: `{"type": "function", "function": {"name": ...,
    "description": ..., "parameters": <JSON Schema>}}`. `template_kwargs` are variables for the chat template that the
    row sets itself, such as `enable_thinking`.
    """

    turns: tuple[Turn, ...]
    row: int = 0
    source: str = ""
    id: Any = None
    repairs: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are rendered, beside the chat template; run.json records it, so that a result is served so.

    Attributes:
        human_token_ids, model_token_ids: the markers before turns in the LingoWhale format.
        content_tokens: added tokens that human turns may use, too.
        reasoning: that of model turns is supervised, is context, or is left out.
        history: `as_served` supervises each answer behind the prompt that serving would send; `as_is` all answers
            where the template writes them.
        template_kwargs: variables for the template, such as `enable_thinking`.
    """

    human_token_ids: Sequence[int] = (3,)
    model_token_ids: Sequence[int] = (4,)
    content_tokens: Sequence[str] = ()
    reasoning: Literal["learn", "context", "drop"] = "learn"
    history: Literal["as_served", "as_is"] = "as_served"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_SETTINGS = ChatSettings()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row with faults, each a complete message with its place.

    `row` None: the file, or the rest of it, cannot be read at all; such a fault can never be dropped. A row that a
    repair leaves out is no fault; its reason stands in `faults`.
    """

    row: int | None
    source: str
    id: Any
    faults: tuple[str, ...]
    is_fault: bool = True
    status: ClassVar[Literal["dropped"]] = "dropped"

    @property
    def reason(self) -> str:
        """All faults, for the ledger."""
        return "; ".join(self.faults)


def trained_on(turns: Sequence[Turn], numbers: Collection[int]) -> tuple[Turn, ...]:
    """The turns with all model turns but those of these numbers as context."""
    return tuple(
        replace(turn, train=False) if turn.role == "model" and number not in numbers else turn
        for number, turn in enumerate(turns)
    )


def answer_numbers(roles: Mapping[int, str]) -> dict[int, int]:
    """The number of the answer that each model turn belongs to, from 1, by the number of the turn.

    All model turns behind a human turn are one answer: tool calls and what is said after their results. A greeting that
    begins a conversation counts as part of answer 1.

    Args:
        roles: the role of each turn, by its number in the conversation.
    """
    humans, numbers = 0, {}
    for turn in sorted(roles):
        humans += roles[turn] == "human"
        if roles[turn] in ("model", "text"):
            numbers[turn] = max(1, humans)
    return numbers


def to_row(
    turns: Sequence[Turn],
    id: Any = None,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The turns in this project's own row format; keys that say nothing are left out.

    >>> to_row([Turn("model", "", tool_calls=(ToolCall("f", {"x": 1}),))])
    {'conversations': [{'from': 'model', 'value': '', 'tool_calls': [{'name': 'f', 'arguments': {'x': 1}}]}]}
    """
    given = {"id": id, "tools": [*tools] or None, "chat_template_kwargs": template_kwargs or None}
    row = {key: value for key, value in given.items() if value is not None}
    if [turn.role for turn in turns] == ["text"]:
        return row | {"text": turns[0].text} | ({} if turns[0].weight == 1 else {"weight": turns[0].weight})
    return row | {"conversations": [_turn_values(turn) for turn in turns]}


def _turn_values(turn: Turn) -> dict[str, Any]:
    calls = [
        {"name": call.name, "arguments": call.arguments} | ({} if call.id is None else {"id": call.id})
        for call in turn.tool_calls
    ]
    weight = turn.weight if turn.weight != 1 else None
    others = {
        "reasoning": turn.reasoning or None, "tool_calls": calls or None, "tool_call_id": turn.tool_call_id,
        "name": turn.tool_name, "weight": weight, "train": None if turn.train else False,
    }  # fmt: skip
    return {"from": turn.role, "value": turn.text} | {key: value for key, value in others.items() if value is not None}
