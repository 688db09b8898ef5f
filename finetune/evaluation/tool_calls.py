"""Tool calls on held-out rows: whether a model calls where the data does, the right tool with the right arguments.

reference   get_weather({"place": "Bergen"})       "It rains."
generated   get_weather({"place": "Oslo"})         get_weather({"place": "Bergen"})
            valid, right name, wrong arguments     a false call
"""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat_templates import UnrenderableError, answer_ids, prompt_ids
from finetune.conversation import BadRow, Conversation, ToolCall, Turn, to_row
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import Source
from finetune.dataset.tool_checks import check_tools
from finetune.evaluation.question_answering import generate_ids
from finetune.evaluation.token_losses import MeasuredModel, measure_each
from finetune.inference.answer_turns import answer_turn, tools_of
from finetune.inference.load_result import LoadedModel

logger = logging.getLogger(__name__)

NEW_TOKENS = 128  # that an answer may have more than the longest of the data
BATCH_SIZE = 8
MAX_LENGTH = 8192  # of a prompt, in tokens


@dataclass(frozen=True)
class ToolTurn:
    """A model turn of the data, in a row that declares tools: what is asked, and the answer of the data."""

    asked: Conversation
    number: int  # of the turn in its row
    expected: Turn
    prompt: list[int]
    length: int  # of the expected answer, in tokens


def rows_with_tools(sources: Sequence[Source], repairs: Collection[str], limit: int) -> list[Conversation]:
    """The first rows that declare tools; none if no row has a call."""
    rows: list[Conversation] = []
    for row in ConversationReader(sources, repairs=repairs) if limit else ():
        if not isinstance(row, BadRow) and tools_of(row):
            rows.append(row)
            if len(rows) == limit:
                break
    return rows if any(turn.tool_calls for row in rows for turn in row.turns) else []


def evaluate_tool_calls(loaded: LoadedModel, rows: Sequence[Conversation]) -> dict[str, Any]:
    """Let the models write the model turns of these rows, greedily; return JSON values, on every rank."""
    turns, left_out = _turns_of(loaded, rows)
    new_tokens = NEW_TOKENS + max((turn.length for turn in turns), default=0)

    def write(model: MeasuredModel) -> list[Turn]:
        prompts = [turn.prompt for turn in turns]
        with model.bar(len(turns), " answers", ": tool calls") as progress:
            generated = generate_ids(
                model, prompts, max_new_tokens=new_tokens, batch_size=BATCH_SIZE, done=progress.update
            )
        return [
            answer_turn(loaded.chat_format, turn.asked, turn.prompt, ids)
            for turn, ids in zip(turns, generated, strict=True)
        ]

    answers = measure_each(loaded, write)
    return {
        "rows": len(rows),
        "with_call": sum(bool(turn.expected.tool_calls) for turn in turns),
        "without_call": sum(not turn.expected.tool_calls for turn in turns),
        "left_out": left_out,
        "counts": {model: count_calls(turns, written) for model, written in answers.items()},
        "turns": [
            {"source": turn.asked.source, "row": turn.asked.row, "id": turn.asked.id, "turn": turn.number,
             "expected": _json(turn.expected), **{model: _json(written[index]) for model, written in answers.items()}}
            for index, turn in enumerate(turns)
        ],
    }  # fmt: skip


def _json(turn: Turn) -> dict[str, Any]:
    return to_row([turn])["conversations"][0]


def _turns_of(loaded: LoadedModel, rows: Sequence[Conversation]) -> tuple[list[ToolTurn], int]:
    """The supervised model turns of rows with the prompts of serving, and how many are too long or cannot be asked."""
    turns, left_out = [], 0
    for row in rows:
        for number, turn in enumerate(row.turns):
            if turn.role != "model" or not turn.train or not number:
                continue
            asked = Conversation(row.turns[:number], row.row, row.source, row.id, (), row.tools, row.template_kwargs)
            try:
                prompt = prompt_ids(loaded.chat_format, asked)
            except UnrenderableError:
                prompt = []
            ids = answer_ids(loaded.chat_format, asked, prompt, turn) if prompt else None
            if ids is None or len(prompt) > MAX_LENGTH:
                left_out += 1
            else:
                turns.append(ToolTurn(asked, number, turn, prompt, len(ids)))
    return turns, left_out


def count_calls(turns: Sequence[ToolTurn], answers: Sequence[Turn]) -> dict[str, int]:
    """Count answers, of the turns whose reference is a call but for `false_calls`, which are of the others.

    `valid`: calls that are read, of declared names, with arguments that fit the schema. `right_name`: also the names of
    the reference; `right_arguments`: also its arguments, equal as JSON. Parallel calls may come in any order.
    """
    counts = dict.fromkeys(("valid", "right_name", "right_arguments", "false_calls"), 0)
    for turn, answer in zip(turns, answers, strict=True):
        if not turn.expected.tool_calls:
            counts["false_calls"] += bool(answer.tool_calls)
            continue
        _, faults = check_tools([(turn.number, answer)], tools_of(turn.asked), "")
        is_valid = bool(answer.tool_calls) and not faults
        names, expected = (
            sorted(call.name for call in calls) for calls in (answer.tool_calls, turn.expected.tool_calls)
        )
        has_names = is_valid and names == expected
        counts["valid"] += is_valid
        counts["right_name"] += has_names
        counts["right_arguments"] += has_names and _as_json(answer.tool_calls) == _as_json(turn.expected.tool_calls)
    return counts


def _as_json(calls: Sequence[ToolCall]) -> list[str]:
    return sorted(json.dumps([call.name, call.arguments], sort_keys=True) for call in calls)
