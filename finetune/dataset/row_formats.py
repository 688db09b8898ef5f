"""Which keys make a row one of which format: tables only, read by `row_reading`."""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune.dataset.content_parts import REASONING_KEYS
from finetune.dataset.json_decoder import shown
from finetune.dataset.row_verdicts import ROW_WEIGHTS, VERDICT_KEYS
from finetune.dataset.tool_reading import TOOL_KEYS
from finetune.dataset.turn_lists import is_turns
from finetune.dataset.turn_reading import ONLY_LAST, REFUSED, TEMPLATE_VARIABLES, role_of

TURN_LISTS = (
    "conversations",
    "messages",
    "conversation",
    "contents",
    "dialog",
    "dialogue",
    "turns",
    "chat",
    "trajectory",
    "traj",
    "data",
)
TURN_LIST_KEYS = frozenset(TURN_LISTS)
MAIN_TURN_LISTS = frozenset(TURN_LISTS[:4])  # a value that is no list is a fault; under the others it is a remark
# Lists of turns of one exchange each: the key of the question -> the key of the answer.
EXCHANGES = {
    "question": "answer", "human": "assistant", "input": "output", "user": "assistant", "prompt": "response",
    "query": "response", "instruction": "output",
}  # fmt: skip
OWN_FORMAT = "conversations of from and value"
COIG_FORMAT = "COIG (instruction, and conversations of question and answer)"
# What chat templates write in front of an answer, in a text that is no chat.
CHAT_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|\[/INST\]|<start_of_turn>|<\|assistant\|>|<｜Assistant｜>"
    r"|### ?(?:Assistant|Response|Answer):|(?m:^(?:ASSISTANT|Assistant):)"
)
CHAT_AS_TEXT = (
    'text with the marks of a chat, all of which is supervised, human turns and marks too: write chats as "messages"'
)
SYSTEM_KEYS = (
    "system", "system_prompt", "system_message", "meta_instruction", "systemInstruction", "system_instruction",
    "instructions", "preamble",
)  # fmt: skip


@dataclass(frozen=True)
class PairFormat:
    """Rows of one question and one answer: the texts under `asks`, or `answers`, that are present, joined by newlines.

    `needs` are the keys that identify the format; keys in `ignored` may be present and are not read.
    """

    name: str
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    needs: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({*self.asks, *self.answers, *self.ignored})


PAIRS = (
    PairFormat("Alpaca", ("instruction", "input"), ("output",), ("instruction", "output")),
    PairFormat("Dolly", ("instruction", "context", "input"), ("response",), ("instruction", "response")),
    *(PairFormat("pairs", (ask,), (answer,), (ask, answer)) for ask, answer in (
        ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("question", "response"),
        ("query", "response"), ("query", "answer"), ("problem", "solution"), ("input", "output"), ("inputs", "targets"),
    )),
    PairFormat("question, context", ("question", "context"), ("answer",), ("question", "answer", "context")),
    PairFormat("xLAM", ("query",), ("answers",), ("query", "answers")),
    PairFormat(
        "COIG, translated", ("trans_instruction", "trans_input"), ("trans_output",),
        ("trans_instruction", "trans_output"), ignored=("instruction", "input", "output"),
    ),
    PairFormat(
        "COIG, exam", ("textbox_q_instruction", "textbox_q_context", "textbox_question"),
        ("textbox_answer_analysis", "textbox_answer"), ("textbox_question", "textbox_answer"),
    ),
)  # fmt: skip
ANSWERS = frozenset(answer for pair_format in PAIRS for answer in pair_format.answers if len(pair_format.needs) == 2)
PAIR_KEYS = frozenset().union(*(pair_format.keys for pair_format in PAIRS))
OTHER_TEXTS = PAIR_KEYS | {"history", *REASONING_KEYS}  # may stand beside a list of turns if they repeat one of them
PREFERENCES = "preferences are not for supervised fine-tuning"
# A value under one of these keys of a row is a fault, as under those of a turn.
REFUSED_ROWS = {key: reason for key, reason in REFUSED.items() if key not in TOOL_KEYS} | {
    **dict.fromkeys(
        (
            "chosen",
            "rejected",
            "chosen_response",
            "rejected_response",
            "rejected_messages",
            "conversation_a",
            "conversation_b",
            "response_a",
            "response_b",
            "response_0",
            "response_1",
            "overall_preference",
        ),
        PREFERENCES,
    ),
    **dict.fromkeys(
        ("loss_mask", "train_mask", "turn_weights", "loss_weights", "weights", "masks"),
        'write "train" or "weight" into the turns',
    ),
    **dict.fromkeys(("round_0", "round_1"), "COIG's rounds are not read: write them as conversations"),
    "documents": "documents beside the turns are not read",
}
_KEYS = frozenset({*TURN_LISTS, *PAIR_KEYS, *SYSTEM_KEYS, *TOOL_KEYS, *REASONING_KEYS, *ROW_WEIGHTS, "history"})
DECIDING_KEYS = PAIR_KEYS.union(TURN_LISTS, ["text"])
COLUMN_KEYS = _KEYS | {"id", "text"}  # --columns can name a column for these
# Keys that are read, or refused, in some format.
WATCHED = _KEYS.union(REFUSED_ROWS, VERDICT_KEYS, TEMPLATE_VARIABLES, ("chat_template_kwargs", *ONLY_LAST))
# Names of rows decide nothing.
NAMES_OF_ROWS = frozenset({"id", "uuid", "idx", "index", "conversation_id", "prompt_id", "__index_level_0__"})
EXPECTED = (
    'an object with "conversations" (or another format that is read: "messages", Alpaca, Dolly, prompt and response, '
    'question and answer, "text"; --columns names other columns)'
)


def with_columns(row: Any, columns: Sequence[tuple[str, str]]) -> Any:
    """The row with its columns under the keys that they stand for; where these decide the format, others do not."""
    if not isinstance(row, dict) or not any(column in row for _, column in columns):
        return row
    taken = {column for _, column in columns}
    decides = DECIDING_KEYS if any(key in DECIDING_KEYS for key, _ in columns) else ()
    others = {f"column {key}" if key in decides else key: value for key, value in row.items() if key not in taken}
    return others | {key: row[column] for key, column in columns if column in row}


def in_lower_case(row: dict[str, Any]) -> dict[str, Any]:
    """The row with keys that are read in lower case, if no key decides the format as it is written."""
    if not DECIDING_KEYS.isdisjoint(row):
        return row
    lower = {key.lower() if key.lower() in WATCHED else key: value for key, value in row.items()}
    return row if len(lower) < len(row) else lower


def key_of_question(exchange: Any) -> str | None:
    """The key of the question in a turn that is an exchange, of several such keys one with a value."""
    if not isinstance(exchange, dict) or "from" in exchange or "role" in exchange:
        return None
    asks = [ask for ask, answer in EXCHANGES.items() if {ask, answer} <= exchange.keys()]
    asks += ["question"] if not asks and "question" in exchange else []
    ask = max(asks, key=lambda ask: exchange[ask] is not None, default=None)
    # A table has {role: text} with nulls under the other role.
    is_one_turn = ask and role_of(ask) and None in (exchange[ask], exchange[EXCHANGES[ask]])
    return None if is_one_turn else ask


@cache
def pair_format_of(keys: frozenset[str]) -> PairFormat | None:
    """The one format that accounts for all of the keys."""
    complete = [pair_format for pair_format in matching(keys) if keys <= pair_format.keys]
    return complete[0] if len(complete) == 1 else None


def matching(keys: Set[str]) -> list[PairFormat]:
    """The formats whose keys are all there."""
    return [pair_format for pair_format in PAIRS if keys >= {*pair_format.needs}]


def format_of_repeated(row: dict[str, Any], keys: Set[str]) -> PairFormat | None:
    """The one format whose answer holds all other answers, as a solution holds the answer alone; others are blank."""
    matches = matching(keys)
    if len(matches) != 1:
        return None
    answer = "\n".join(str(row[key]) for key in matches[0].answers if key in keys)
    others = {key: str(row[key]).strip() for key in keys - matches[0].keys}
    is_repeated = all(text in answer if key in ANSWERS else not text for key, text in others.items())
    return matches[0] if is_repeated else None


def why_no_format(row: dict[str, Any], keys: set[str]) -> str:
    """Why a row with these keys of pairs is of no format."""
    if matches := matching(keys):
        names, choices = ", ".join(sorted(keys)), ["/".join((*match.asks, *match.answers)) for match in matches]
        columns = " ".join(f"{key}={key}" for key in (*matches[0].asks, *matches[0].answers) if key in keys)
        ways = f"can be read in more than one way ({' or '.join(dict.fromkeys(choices))})"
        if len(matches) == 1:
            ways = f"holds {choices[0]} and more texts, which would be lost"
        return (
            f"{ways}: it has the keys {names}: leave out those that do not count, or name the others, as in "
            f"--columns {columns}"
        )
    if isinstance(chat := row.get("chat"), str | dict):
        how = "in one text" if isinstance(chat, str) else f"under the keys {', '.join([*chat][:2])}"
        return (
            f'"chat" holds the turns {how}: write them as a list of "role" and "content", without the marks that '
            "the texts have for roles and ends"
        )
    empty = next((key for key in MAIN_TURN_LISTS if key in row), None)
    if empty is not None:
        return f'expected "{empty}" to be a list of turns, found {shown(row[empty])}'
    if not row.keys().isdisjoint(("role", "from", "parent_id")):
        return 'one message of a conversation: write whole conversations as rows, [[{"role": ...}, ...], ...], or trees'
    if listed := [key for key, value in row.items() if isinstance(value, list) and is_turns(value)]:
        return f"{shown(listed[0])} holds turns: if they are the conversation, --columns messages={listed[0]}"
    names = ", ".join(shown(key)[1:-1] for key in [*row][:8])
    return f"expected {EXPECTED}, found {f'the keys {names}' if names else 'no keys'}"
