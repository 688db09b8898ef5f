"""Row formats -> turns. The tables define which keys make a row one of which format."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune.conversation import Role, Turn
from finetune.dataset.json_decoder import shown
from finetune.dataset.row_checks import is_blank, text_fault
from finetune.dataset.row_verdicts import VERDICT_KEYS, VERDICTS_OF_TURNS, verdict_faults

ROLES: dict[str, Role] = {
    "human": "human", "user": "human",
    "model": "model", "gpt": "model", "assistant": "model", "bot": "model",
    "system": "system",
}  # fmt: skip
ACCEPTED_ROLES = "accepted as human: user; as model: gpt, assistant, bot"
TURN_LISTS = ("conversations", "messages", "conversation")
# The key of the role -> the key of the text.
TURN_KEYS = {"from": "value", "role": "content"}
OWN_FORMAT = "conversations of from and value"
COIG_FORMAT = "COIG (instruction, and conversations of question and answer)"
SYSTEM_KEYS = ("system", "system_prompt")


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
    PairFormat("Dolly", ("instruction", "context"), ("response",), ("instruction", "response")),
    PairFormat("pairs", ("prompt",), ("response",), ("prompt", "response")),
    PairFormat("pairs", ("prompt",), ("completion",), ("prompt", "completion")),
    PairFormat("pairs", ("question",), ("answer",), ("question", "answer")),
    PairFormat("pairs", ("question",), ("response",), ("question", "response")),
    PairFormat("pairs", ("query",), ("response",), ("query", "response")),
    PairFormat("pairs", ("input",), ("output",), ("input", "output")),
    PairFormat(
        "COIG, translated", ("trans_instruction", "trans_input"), ("trans_output",),
        ("trans_instruction", "trans_output"), ignored=("instruction", "input", "output"),
    ),
    PairFormat(
        "COIG, exam", ("textbox_q_instruction", "textbox_q_context", "textbox_question"),
        ("textbox_answer_analysis", "textbox_answer"), ("textbox_question", "textbox_answer"),
    ),
)  # fmt: skip
PAIR_KEYS = frozenset().union(*(pair_format.keys for pair_format in PAIRS))
# What a text chat cannot hold: in a row or a turn, a value under one of these keys is a fault, never dropped silently.
REFUSED = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), "tool calls are not read"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning beside the text is not read"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is read"),
}
REFUSED_ROWS = REFUSED | {
    **dict.fromkeys(("chosen", "rejected"), "preferences are not for supervised fine-tuning"),
    **dict.fromkeys(("round_0", "round_1"), "COIG's rounds are not read: write them as conversations"),
}
# These values say that there is none.
NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")
WEIGHTS = ("weight", "loss_weight", "loss", "loss_scale")
# Keys with a meaning in some format; any other key is ignored.
WATCHED = frozenset({*TURN_LISTS, *PAIR_KEYS, *SYSTEM_KEYS, *REFUSED_ROWS, *VERDICT_KEYS, "history"})
WATCHED_IN_TURNS = frozenset({*REFUSED, *WEIGHTS, *VERDICTS_OF_TURNS, "train"})
EXPECTED = (
    'an object with "conversations" (or another format that is read: "messages", Alpaca, Dolly, prompt and response, '
    "question and answer)"
)


class RowReading:
    """A parsed row: its turns (all of them if `is_complete`), its format, and the role names as written in it.

    With `ignores_verdicts`, keys that say how good the answer is are not read.
    """

    __slots__ = ("place", "ignores_verdicts", "turns", "format", "role_names", "faults", "is_complete")

    def __init__(self, row: Any, place: str, *, ignores_verdicts: bool = False) -> None:
        self.place, self.ignores_verdicts = place, ignores_verdicts
        self.turns: list[Turn] = []
        self.format = ""
        self.role_names: list[str] = []
        self.faults: list[str] = []
        self.is_complete = True
        if isinstance(row, dict):
            self._read(row)
        else:
            self._add_fatal(f'{place}: expected an object with "conversations", found {shown(row)}')

    def _add_fatal(self, fault: str) -> None:
        """Add a fault that leaves some turn unread, so that the order of turns cannot be checked."""
        self.faults.append(fault)
        self.is_complete = False

    def _read(self, row: dict[str, Any]) -> None:
        keys = {key for key in row.keys() & WATCHED if row[key] is not None}
        lists = [key for key in TURN_LISTS if key in keys]
        if len(keys) > 1:
            self._refuse(row, keys & REFUSED_ROWS.keys(), self.place, REFUSED_ROWS)
            self._judge(row, keys & VERDICT_KEYS, self.place)
            self._system(row)
        if len(lists) > 1:
            names = " and ".join(f'"{key}"' for key in lists)
            self._add_fatal(f"{self.place}: has both {names}: leave one of them out")
        elif lists:
            self._turn_list(row, lists[0], keys)
        else:
            self._pair(row, keys)

    def _refuse(self, holder: dict[str, Any], keys: set[str], place: str, reasons: dict[str, str]) -> None:
        for key in sorted(keys):
            value = holder[key].strip() if isinstance(holder[key], str) else holder[key]
            is_verdict = key in VERDICT_KEYS and isinstance(value, int | float)
            if value not in NOTHING and value is not False and not is_verdict:
                self.faults.append(
                    f'{place}: has "{key}": {shown(holder[key])}: {reasons[key]}: leave the row out, or write what it '
                    "says as text"
                )

    def _judge(self, holder: dict[str, Any], keys: set[str], place: str) -> None:
        if keys and not self.ignores_verdicts:
            self.faults += verdict_faults(holder, keys, place)

    def _system(self, row: dict[str, Any]) -> None:
        given = [key for key in SYSTEM_KEYS if row.get(key) not in (None, "")]
        if len(given) > 1:
            self.faults.append(f'{self.place}: has both "system" and "system_prompt": leave one of them out')
        for key in given[:1]:
            if isinstance(row[key], str) and is_blank(row[key]):
                continue
            self._add("system", row[key], self.place, key)

    def _add(self, role: Role, text: Any, place: str, field: str, train: bool = True) -> None:
        fault = text_fault(text, field)
        if fault is None:
            self.turns.append(Turn(role, text, train))
        else:
            self._add_fatal(f"{place}: {fault}")

    # ---- a list of turns

    def _turn_list(self, row: dict[str, Any], key: str, row_keys: set[str]) -> None:
        turns = row[key]
        if not isinstance(turns, list):
            self._add_fatal(f'{self.place}: expected "{key}" to be a list of turns, found {shown(turns)}')
            return
        if turns and isinstance(turns[0], dict) and turns[0].get("question") is not None:
            self._coig(row, turns, row_keys)
            return
        num_system, role_key = len(self.turns), "from"
        for number, turn in enumerate(turns):
            role_key = self._plain_turn(turn) or self._turn(turn, f"{self.place}, turn {number}") or role_key
        self.format = f"{key} of {role_key} and {TURN_KEYS[role_key]}"
        if num_system and self.is_complete and any(turn.role == "system" for turn in self.turns[num_system:]):
            self._add_fatal(f'{self.place}: has a system turn and "system" beside the turns: leave one of them out')
        if len(row_keys) > 1:
            self._check_other_texts(row, row_keys & (PAIR_KEYS | {"history"}), key)

    def _check_other_texts(self, row: dict[str, Any], keys: set[str], key: str) -> None:
        """Other texts of a row with a list of turns must repeat one of the turns."""
        texts = {turn.text for turn in self.turns}
        for other in sorted(keys):
            value = row[other]
            if value not in ("", []) and not (isinstance(value, str) and value in texts):
                self.faults.append(
                    f'{self.place}: has "{other}" beside "{key}", and no turn says the same: which one is the '
                    "conversation? Leave the other one out"
                )

    def _plain_turn(self, turn: Any) -> str | None:
        """Read a turn of the most frequent form, faster than `_turn`; None, and nothing done, for any other."""
        if type(turn) is not dict or len(turn) != 2:
            return None
        role_key = "from" if "from" in turn else "role"
        name: Any = turn.get(role_key)
        text: Any = turn.get(TURN_KEYS[role_key])
        if type(name) is not str or name not in ROLES or text_fault(text, role_key) is not None:
            return None
        self.turns.append(Turn(ROLES[name], text))
        self.role_names.append(name)
        return role_key

    def _turn(self, turn: Any, place: str) -> str | None:
        """Read one turn; return the key under which it has its role."""
        if not isinstance(turn, dict):
            self._add_fatal(f'{place}: expected an object with "from" and "value", found {shown(turn)}')
            return None
        role_key = "from"
        if turn.get("role") is not None or turn.get("content") is not None:
            role_key = "role"
            if turn.get("from") is not None or turn.get("value") is not None:
                self._add_fatal(f'{place}: has keys of both "from", "value" and "role", "content": leave two out')
                return role_key
        name: Any = turn.get(role_key)
        field = TURN_KEYS[role_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            self._add_fatal(
                f'{place}: expected "{role_key}" to be human, model or system, found {shown(name)} ({ACCEPTED_ROLES})'
            )
        train = True
        if len(turn) > 2:
            train = self._train(turn, role, place)
        self._add(role or "human", turn.get(field), place, field, train)
        if role is not None:
            self.role_names.append(name)
        return role_key

    def _train(self, turn: dict[str, Any], role: Role | None, place: str) -> bool:
        keys = {key for key in turn.keys() & WATCHED_IN_TURNS if turn[key] is not None}
        self._refuse(turn, keys & REFUSED.keys(), place, REFUSED)
        if role == "model":
            self._judge(turn, keys & VERDICTS_OF_TURNS, place)
        for key in WEIGHTS:
            if key in keys:
                self.faults.append(
                    f'{place}: has "{key}": {shown(turn[key])}: weights of turns are not supported: leave it out, or '
                    'write "train": false for a model turn to be excluded from training'
                )
        if "train" not in keys:
            return True
        if not isinstance(turn["train"], bool):
            self.faults.append(f'{place}: expected "train" to be true or false, found {shown(turn["train"])}')
        elif turn["train"] and role not in ("model", None):
            self.faults.append(f'{place}: has "train": true, but only model turns are supervised: leave it out')
        return turn["train"] is not False or role != "model"

    def _coig(self, row: dict[str, Any], turns: list[Any], row_keys: set[str]) -> None:
        """Read COIG; its instruction comes before the first question, as its loading script has it."""
        self.format = COIG_FORMAT
        instruction = row.get("instruction")
        if instruction is not None and not isinstance(instruction, str):
            self._add_fatal(f'{self.place}: expected "instruction" to be a string, found {shown(instruction)}')
        prefix = f"{instruction}\n" if isinstance(instruction, str) and not is_blank(instruction) else ""
        for number, pair in enumerate(turns):
            place = f"{self.place}, pair {number}"
            if not isinstance(pair, dict):
                self._add_fatal(f'{place}: expected an object with "question" and "answer", found {shown(pair)}')
                continue
            question = pair.get("question")
            if number == 0 and isinstance(question, str) and not is_blank(question):
                question = prefix + question
            self._refuse(pair, pair.keys() & REFUSED.keys(), place, REFUSED)
            self._judge(pair, pair.keys() & VERDICTS_OF_TURNS, place)
            self._add("human", question, place, "question")
            self._add("model", pair.get("answer"), place, "answer")
        self._check_other_texts(row, row_keys & (PAIR_KEYS | {"history"}) - {"instruction"}, "conversations")

    # ---- one question, one answer

    def _pair(self, row: dict[str, Any], row_keys: set[str]) -> None:
        keys = row_keys & PAIR_KEYS
        pair_format = _pair_format(frozenset(keys))
        if pair_format is None and not _matching(keys):
            pair_format = _pair_format(PAIR_KEYS.intersection(row))
        if pair_format is None:
            self._add_fatal(f"{self.place}: {_why_no_format(row, keys)}")
            return
        names = ", ".join((*pair_format.asks, *pair_format.answers))
        self.format = f"{pair_format.name} ({names})"
        if row.get("history") is not None:
            self._history(row["history"])
        self._add_joined("human", row, pair_format.asks, pair_format.needs)
        self._add_joined("model", row, pair_format.answers, pair_format.needs)

    def _add_joined(self, role: Role, row: dict[str, Any], keys: tuple[str, ...], needs: tuple[str, ...]) -> None:
        texts, faults = [], []
        for key in keys:
            value: Any = row.get(key)
            if (isinstance(value, str) and is_blank(value)) or (value is None and key not in needs):
                continue
            texts.append(value)
            if (fault := text_fault(value, key)) is not None:
                faults.append(fault)
                self._add_fatal(f"{self.place}: {fault}")
        if not faults:
            self._add(role, "\n".join(texts), self.place, next(key for key in keys if key in needs))

    def _history(self, history: Any) -> None:
        if not isinstance(history, list):
            self._add_fatal(f'{self.place}: expected "history" to be a list of pairs, found {shown(history)}')
            return
        for number, pair in enumerate(history):
            place = f'{self.place}, "history", pair {number}'
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                self._add_fatal(f"{place}: expected a question and its answer, found {shown(pair)}")
                continue
            self._add("human", pair[0], place, "question")
            self._add("model", pair[1], place, "answer")


@cache
def _pair_format(keys: frozenset[str]) -> PairFormat | None:
    """The one format that accounts for all of the keys."""
    complete = [pair_format for pair_format in _matching(keys) if keys <= pair_format.keys]
    return complete[0] if len(complete) == 1 else None


def _matching(keys: Set[str]) -> list[PairFormat]:
    return [pair_format for pair_format in PAIRS if keys >= {*pair_format.needs}]


def _why_no_format(row: dict[str, Any], keys: set[str]) -> str:
    if matching := _matching(keys):
        choices = " or ".join(dict.fromkeys("/".join((*match.asks, *match.answers)) for match in matching))
        names = ", ".join(sorted(keys))
        return (
            f"can be read in more than one way ({choices}): it has the keys {names}: leave out those that do not count"
        )
    empty = next((key for key in TURN_LISTS if key in row), None)
    if empty is not None:
        return f'expected "{empty}" to be a list of turns, found null'
    wrapped = next(_wrapped_lists(row), None)
    if wrapped is not None:
        key, count = wrapped
        return (
            f"an object whose {shown(key)} holds a list of {count:,} objects: is that the data? "
            f"Write that list alone, for example with jq '.[{shown(key)}]'"
        )
    if isinstance(row.get("text"), str):
        return f'expected {EXPECTED}, found "text": it does not say who speaks'
    names = ", ".join(shown(key)[1:-1] for key in [*row][:8]) or "none"
    return f"expected {EXPECTED}, found the keys {names}"


def _wrapped_lists(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value[:3]):
            yield key, len(value)
