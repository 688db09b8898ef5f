"""The layouts that rows come in -> turns. The tables say all of it: which keys make a row one of which layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.conversation import Role, Turn
from finetune.dataset.json_decoder import shown
from finetune.dataset.row_checks import is_blank, text_fault

ROLES: dict[str, Role] = {
    "human": "human", "user": "human",
    "model": "model", "gpt": "model", "assistant": "model", "bot": "model",
    "system": "system",
}  # fmt: skip
ACCEPTED_ROLES = "accepted as human: user; as model: gpt, assistant, bot"
TURN_LISTS = ("conversations", "messages", "conversation")
# The key of who speaks -> the key of what is said.
TURN_KEYS = {"from": "value", "role": "content"}
OWN_LAYOUT = "conversations of from and value"
COIG_LAYOUT = "COIG (instruction, and conversations of question and answer)"
SYSTEM_KEYS = ("system", "system_prompt")


@dataclass(frozen=True)
class PairLayout:
    """Rows of one question and one answer: the texts under `asks`, those there are, joined by a newline; so `answers`.

    `needs` make a row one of this layout; `beside` may stand in it and says nothing that is read.
    """

    name: str
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    needs: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({*self.asks, *self.answers, *self.beside})


PAIRS = (
    PairLayout("Alpaca", ("instruction", "input"), ("output",), ("instruction", "output")),
    PairLayout("Dolly", ("instruction", "context"), ("response",), ("instruction", "response")),
    PairLayout("pairs", ("prompt",), ("response",), ("prompt", "response")),
    PairLayout("pairs", ("prompt",), ("completion",), ("prompt", "completion")),
    PairLayout("pairs", ("question",), ("answer",), ("question", "answer")),
    PairLayout("pairs", ("question",), ("response",), ("question", "response")),
    PairLayout("pairs", ("query",), ("response",), ("query", "response")),
    PairLayout("pairs", ("input",), ("output",), ("input", "output")),
    PairLayout(
        "COIG, translated", ("trans_instruction", "trans_input"), ("trans_output",),
        ("trans_instruction", "trans_output"), beside=("instruction", "input", "output"),
    ),
    PairLayout(
        "COIG, exam", ("textbox_q_instruction", "textbox_q_context", "textbox_question"),
        ("textbox_answer_analysis", "textbox_answer"), ("textbox_question", "textbox_answer"),
    ),
)  # fmt: skip
PAIR_KEYS = frozenset().union(*(layout.keys for layout in PAIRS))
# What a chat of text cannot hold: in a row or a turn, anything under these keys is a fault, never left out in silence.
REFUSED = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), "tool calls are not read"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning beside the text is not read"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is read"),
}
REFUSED_ROWS = REFUSED | {
    **dict.fromkeys(("chosen", "rejected"), "preferences are not for supervised fine-tuning"),
    **dict.fromkeys(("round_0", "round_1"), "COIG's rounds are not read: write them as conversations"),
}
WEIGHTS = ("weight", "loss_weight", "loss", "loss_scale")
# What a row says, in whichever layout; any other key is taken for a remark.
WATCHED = frozenset({*TURN_LISTS, *PAIR_KEYS, *SYSTEM_KEYS, *REFUSED_ROWS, "history"})
WATCHED_IN_TURNS = frozenset({*REFUSED, *WEIGHTS, "train"})
EXPECTED = (
    'an object with "conversations" (or a layout that is read as well: "messages", Alpaca, Dolly, prompt and response, '
    "question and answer)"
)


class RowReading:
    """One row read: its turns, all of them where `is_whole`, its layout, the role names as they stand in it."""

    __slots__ = ("place", "turns", "layout", "aliases", "faults", "is_whole")

    def __init__(self, row: Any, place: str) -> None:
        self.place = place
        self.turns: list[Turn] = []
        self.layout: str | None = None
        self.aliases: list[str] = []
        self.faults: list[str] = []
        self.is_whole = True
        if isinstance(row, dict):
            self._read(row)
        else:
            self._lose(f'{place}: expected an object with "conversations", found {shown(row)}')

    def _lose(self, fault: str) -> None:
        """A fault for which some turn is missing, so that nothing can be said about their order."""
        self.faults.append(fault)
        self.is_whole = False

    def _read(self, row: dict[str, Any]) -> None:
        said = {key for key in row.keys() & WATCHED if row[key] is not None}
        lists = [key for key in TURN_LISTS if key in said]
        if len(said) > 1:
            self._refuse(row, said & REFUSED_ROWS.keys(), self.place, REFUSED_ROWS)
            self._system(row)
        if len(lists) > 1:
            names = " and ".join(f'"{key}"' for key in lists)
            self._lose(f"{self.place}: has both {names}: leave one of them out")
        elif lists:
            self._turn_list(row, lists[0], said)
        else:
            self._pair(row, said)

    def _refuse(self, holder: dict[str, Any], keys: set[str], place: str, reasons: dict[str, str]) -> None:
        for key in sorted(keys):
            if holder[key] not in (None, "", [], {}, False):
                self.faults.append(
                    f'{place}: has "{key}": {shown(holder[key])}: {reasons[key]}: leave the row out, or write what it '
                    "says as text"
                )

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
            self._lose(f"{place}: {fault}")

    # ---- a list of turns

    def _turn_list(self, row: dict[str, Any], key: str, said: set[str]) -> None:
        turns = row[key]
        if not isinstance(turns, list):
            self._lose(f'{self.place}: expected "{key}" to be a list of turns, found {shown(turns)}')
            return
        if turns and isinstance(turns[0], dict) and turns[0].get("question") is not None:
            self._coig(row, turns, said)
            return
        before, speaker = len(self.turns), "from"
        for number, turn in enumerate(turns):
            speaker = self._plain_turn(turn) or self._turn(turn, f"{self.place}, turn {number}") or speaker
        self.layout = OWN_LAYOUT if key == "conversations" and speaker == "from" else (
            f"{key} of {speaker} and {TURN_KEYS[speaker]}"
        )  # fmt: skip
        if before and self.is_whole and any(turn.role == "system" for turn in self.turns[before:]):
            self._lose(f'{self.place}: has a system turn and "system" beside the turns: leave one of them out')
        if len(said) > 1:
            self._beside(row, said & (PAIR_KEYS | {"history"}), key)

    def _beside(self, row: dict[str, Any], keys: set[str], key: str) -> None:
        """Only what a turn says as well may stand beside the turns."""
        texts = {turn.text for turn in self.turns}
        for other in sorted(keys):
            value = row[other]
            if value not in ("", []) and not (isinstance(value, str) and value in texts):
                self.faults.append(
                    f'{self.place}: has "{other}" beside "{key}", and no turn says the same: which one is the '
                    "conversation? Leave the other one out"
                )

    def _plain_turn(self, turn: Any) -> str | None:
        """What `_turn` does, for the turns that most data consists of; None for any other, and nothing done."""
        if type(turn) is not dict or len(turn) != 2:
            return None
        speaker = "from" if "from" in turn else "role"
        name, text = turn.get(speaker), turn.get(TURN_KEYS[speaker])
        if type(name) is not str or name not in ROLES or text_fault(text, speaker) is not None:
            return None
        self.turns.append(Turn(ROLES[name], text))
        self.aliases.append(name)
        return speaker

    def _turn(self, turn: Any, place: str) -> str | None:
        """Read one turn; the key under which it says who speaks."""
        if not isinstance(turn, dict):
            self._lose(f'{place}: expected an object with "from" and "value", found {shown(turn)}')
            return None
        speaker = "from"
        if turn.get("role") is not None or turn.get("content") is not None:
            speaker = "role"
            if turn.get("from") is not None or turn.get("value") is not None:
                self._lose(f'{place}: has keys of both "from", "value" and "role", "content": leave two out')
                return speaker
        name, field = turn.get(speaker), TURN_KEYS[speaker]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            self._lose(
                f'{place}: expected "{speaker}" to be human, model or system, found {shown(name)} ({ACCEPTED_ROLES})'
            )
        train = True
        if len(turn) > 2:
            train = self._train(turn, role, place)
        self._add(role or "human", turn.get(field), place, field, train)
        if role is not None:
            self.aliases.append(name)
        return speaker

    def _train(self, turn: dict[str, Any], role: Role | None, place: str) -> bool:
        said = {key for key in turn.keys() & WATCHED_IN_TURNS if turn[key] is not None}
        self._refuse(turn, said & REFUSED.keys(), place, REFUSED)
        for key in WEIGHTS:
            if key in said:
                self.faults.append(
                    f'{place}: has "{key}": {shown(turn[key])}: weights of turns are not supported: leave it out, or '
                    'write "train": false for a model turn that is not to be learned'
                )
        if "train" not in said:
            return True
        if not isinstance(turn["train"], bool):
            self.faults.append(f'{place}: expected "train" to be true or false, found {shown(turn["train"])}')
        elif turn["train"] and role not in ("model", None):
            self.faults.append(f'{place}: has "train": true, but only model turns are learned: leave it out')
        return turn["train"] is not False or role != "model"

    def _coig(self, row: dict[str, Any], turns: list[Any], said: set[str]) -> None:
        """COIG as it is loaded: the instruction stands before the first question."""
        self.layout = COIG_LAYOUT
        ahead = row.get("instruction")
        if ahead is not None and not isinstance(ahead, str):
            self._lose(f'{self.place}: expected "instruction" to be a string, found {shown(ahead)}')
        ahead = ahead if isinstance(ahead, str) and not is_blank(ahead) else None
        for number, pair in enumerate(turns):
            place = f"{self.place}, pair {number}"
            if not isinstance(pair, dict):
                self._lose(f'{place}: expected an object with "question" and "answer", found {shown(pair)}')
                continue
            question = pair.get("question")
            if number == 0 and ahead is not None and isinstance(question, str) and not is_blank(question):
                question = f"{ahead}\n{question}"
            self._refuse(pair, pair.keys() & REFUSED.keys(), place, REFUSED)
            self._add("human", question, place, "question")
            self._add("model", pair.get("answer"), place, "answer")
        self._beside(row, said & (PAIR_KEYS | {"history"}) - {"instruction"}, "conversations")

    # ---- one question, one answer

    def _pair(self, row: dict[str, Any], said: set[str]) -> None:
        keys = said & PAIR_KEYS
        layout = _pair_layout(keys) or (None if _fitting(keys) else _pair_layout(row.keys() & PAIR_KEYS))
        if layout is None:
            self._lose(f"{self.place}: {_why_no_layout(row, keys)}")
            return
        names = ", ".join((*layout.asks, *layout.answers))
        self.layout = f"{layout.name} ({names})"
        if row.get("history") is not None:
            self._history(row["history"])
        self._joined("human", row, layout.asks, layout.needs)
        self._joined("model", row, layout.answers, layout.needs)

    def _joined(self, role: Role, row: dict[str, Any], keys: tuple[str, ...], needs: tuple[str, ...]) -> None:
        texts, faulty = [], False
        for key in keys:
            value = row.get(key)
            if isinstance(value, str) and not is_blank(value):
                fault = text_fault(value, key)
                texts.append(value)
            elif isinstance(value, str) or (value is None and key not in needs):
                continue
            else:
                fault = text_fault(value, key)
            if fault is not None:
                self._lose(f"{self.place}: {fault}")
                faulty = True
        if not faulty:
            self._add(role, "\n".join(texts), self.place, next(key for key in keys if key in needs))

    def _history(self, history: Any) -> None:
        if not isinstance(history, list):
            self._lose(f'{self.place}: expected "history" to be a list of pairs, found {shown(history)}')
            return
        for number, pair in enumerate(history):
            place = f'{self.place}, "history", pair {number}'
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                self._lose(f"{place}: expected a question and its answer, found {shown(pair)}")
                continue
            self._add("human", pair[0], place, "question")
            self._add("model", pair[1], place, "answer")


_layouts: dict[frozenset[str], PairLayout | None] = {}


def _pair_layout(keys: set[str]) -> PairLayout | None:
    """The one layout that accounts for all of the keys."""
    known = frozenset(keys)
    if known not in _layouts:
        whole = [layout for layout in _fitting(keys) if known <= layout.keys]
        _layouts[known] = whole[0] if len(whole) == 1 else None
    return _layouts[known]


def _fitting(keys: set[str]) -> list[PairLayout]:
    return [layout for layout in PAIRS if keys.issuperset(layout.needs)]


def _why_no_layout(row: dict[str, Any], keys: set[str]) -> str:
    fitting = _fitting(keys)
    if fitting:
        whole = " or ".join(dict.fromkeys("/".join((*layout.asks, *layout.answers)) for layout in fitting))
        names = ", ".join(sorted(keys))
        return f"can be read in more than one way ({whole}): it has the keys {names}: leave out those that do not count"
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
    found = ", ".join(shown(key)[1:-1] for key in [*row][:8]) or "none"
    return f"expected {EXPECTED}, found the keys {found}"


def _wrapped_lists(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value[:3]):
            yield key, len(value)
