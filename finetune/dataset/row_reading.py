"""A parsed row -> its turns, tools and template variables, and its faults."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.conversation import Role, Turn
from finetune.dataset.content_parts import REASONING_KEYS, system_text, text_of_parts
from finetune.dataset.json_decoder import shown
from finetune.dataset.row_checks import is_blank, text_fault
from finetune.dataset.row_formats import (
    ANSWERS,
    CHAT_AS_TEXT,
    CHAT_MARKS,
    COIG_FORMAT,
    EXCHANGES,
    MAIN_TURN_LISTS,
    NAMES_OF_ROWS,
    OTHER_TEXTS,
    PAIR_KEYS,
    REFUSED_ROWS,
    SYSTEM_KEYS,
    TURN_LIST_KEYS,
    WATCHED,
    format_of_repeated,
    in_lower_case,
    key_of_question,
    matching,
    pair_format_of,
    why_no_format,
)
from finetune.dataset.row_verdicts import GRADES, VERDICT_KEYS, is_remark, verdict_faults
from finetune.dataset.tool_reading import TOOL_KEYS, declared_tools, is_empty
from finetune.dataset.turn_lists import is_listed, is_turns, listed_turns, turns_in_text
from finetune.dataset.turn_reading import (
    PLAIN_ROLES,
    TEMPLATE_VARIABLES,
    TurnReading,
    apply_weights,
    is_mode,
    read_reasoning,
    refusals,
    template_kwargs_of,
)
from finetune.dataset.written_calls import declared_in_text, written_calls


class RowReading:
    """A parsed row: its turns (all of them if `is_complete`), its format, and the role names as written in it.

    `numbers` are the numbers of the turns in the row. `declared` are the tools that calls may name; `tools` are those
    for the chat template: none where the system turn's text has them. `unread` are keys with values that are not read.
    With `ignores_verdicts`, keys that say how good the answer is are not read.
    """

    is_complete = True
    format = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    declared: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = {}

    def __init__(self, row: Any, place: str, *, ignores_verdicts: bool = False) -> None:
        self.place, self.ignores_verdicts = place, ignores_verdicts
        self.turns: list[Turn] = []
        self.numbers: list[int] = []
        self.role_names: list[str] = []
        self.faults: list[str] = []
        self.unread: list[str] = []
        if isinstance(row, list) and row and all(isinstance(turn, dict) and is_turns(turn) for turn in row):
            row = {"messages": row}
        if isinstance(row, dict):
            self._read(in_lower_case(row))
        else:
            self._add_fatal(f'{place}: expected an object with "conversations", found {shown(row)}')

    @property
    def is_plain(self) -> bool:
        """Whether the row holds nothing but roles, texts and which turns are supervised."""
        return not (self.declared or self.template_kwargs) and all(
            turn.role in ("human", "model", "system") and not (turn.reasoning or turn.tool_calls) and turn.weight == 1
            for turn in self.turns
        )

    def _add_fatal(self, fault: str) -> None:
        """Add a fault that leaves some turn unread, so that the order of turns cannot be checked."""
        self.faults.append(fault)
        self.is_complete = False

    def _read(self, row: dict[str, Any]) -> None:
        keys = {key for key in row if key in WATCHED and row[key] is not None}
        lists = [key for key in keys if key in TURN_LIST_KEYS and (key in MAIN_TURN_LISTS or is_listed(row[key]))]
        has_more = len(row) > 1 + ("id" in row)
        is_text = "text" in row and not (lists or keys & PAIR_KEYS or "role" in row or "parent_id" in row)
        if has_more:
            self._beside(row, keys, lists, is_text=is_text)
        if len(lists) > 1:
            names = " and ".join(f'"{key}"' for key in sorted(lists))
            self._add_fatal(f"{self.place}: has both {names}: leave one of them out")
        elif lists and not (lists[0] == "data" and self.place and _advice(row)):
            self._turn_list(row, lists[0], keys)
        elif is_text:
            self._text(row, keys)
        else:
            self._pair(row, keys)
        has_results = any(turn.role == "tool" or turn.text.startswith("<tool_response>") for turn in self.turns)
        if self.declared or has_results or (self.turns and self.turns[0].role == "system"):
            self._written_calls(has_results=has_results)
        if has_more:
            self.faults += [f"{self.place}: {fault}" for fault in apply_weights(self.turns, row)]

    def _beside(self, row: dict[str, Any], keys: set[str], lists: Sequence[str], *, is_text: bool) -> None:
        remarks = {key for key in keys & {*REASONING_KEYS} if is_mode(row[key])}
        remarks |= keys.intersection(GRADES) if is_text else set()  # they grade a page of the web, and no answer
        remarks |= {key for key in keys & VERDICT_KEYS - REFUSED_ROWS.keys() if is_remark(key, row[key])}
        keys -= remarks
        read = (WATCHED - TURN_LIST_KEYS - remarks).union(lists, NAMES_OF_ROWS)
        self.unread = [key for key in row.keys() - read if not is_empty(row[key])]
        is_verdict = {key for key in keys & VERDICT_KEYS if isinstance(row[key], int | float)}
        for refusal in refusals(row, [*(keys & REFUSED_ROWS.keys()) - is_verdict], REFUSED_ROWS, self.place):
            self._add_fatal(refusal)
        if not self.ignores_verdicts and keys & VERDICT_KEYS:
            self.faults += verdict_faults(row, keys & VERDICT_KEYS, self.place)
        if keys & {*TOOL_KEYS}:
            self.tools, faults = declared_tools(row, self.unread)
            self.faults += [f"{self.place}: {fault}" for fault in faults]
            self.declared = self.tools
        if keys & {"chat_template_kwargs", *TEMPLATE_VARIABLES}:
            self.template_kwargs, fault = template_kwargs_of(row)
            self.faults += [f"{self.place}: {fault}"] if fault else []
        self._system(row)

    def _system(self, row: dict[str, Any]) -> None:
        given = {key: system_text(row[key]) for key in SYSTEM_KEYS if row.get(key) not in (None, "", [])}
        given = {key: text for key, text in given.items() if not (isinstance(text, str) and is_blank(text))}
        if len({str(text) for text in given.values()}) > 1:
            names = " and ".join(f'"{key}"' for key in given)
            self.faults.append(f"{self.place}: has both {names}: leave one of them out")
        for key in [*given][:1]:
            self._add("system", given[key], self.place, key)
            self.numbers[-1:] = [-1] * bool(self.numbers)

    def _add(self, role: Role, text: Any, place: str, field: str) -> None:
        fault = text_fault(text, field)
        if fault is None:
            self.numbers.append(len(self.turns))
            self.turns.append(Turn(role, text))
        else:
            self._add_fatal(f"{place}: {fault}")

    def _text(self, row: dict[str, Any], keys: set[str]) -> None:
        is_chat = isinstance(row["text"], str) and CHAT_MARKS.search(row["text"])
        self.format = CHAT_AS_TEXT if is_chat else "text, for continued pretraining"
        if self.turns or self.tools or keys & OTHER_TEXTS:
            others = "a system prompt, tools, reasoning or a history"
            self.faults.append(f'{self.place}: has {others} beside "text", all of which is supervised')
            self.turns, self.numbers = [], []
        self.unread = [key for key in self.unread if key != "text"]
        self._add("text", row["text"], self.place, "text")

    # ---- a list of turns

    def _turn_list(self, row: dict[str, Any], key: str, row_keys: set[str]) -> None:
        if (turns := self._listed(row, key, "turns")) is None:
            return
        first = turns[0] if turns else None
        num_system = len(self.turns)
        if (ask := key_of_question(first)) is not None:
            self._exchanges(row, turns, ask, key, row_keys)
            self._check_system(num_system)
            return
        if isinstance(first, str):
            self.format = f"{key}, texts in turn"
            for number, text in enumerate(turns):
                self._add("model" if number % 2 else "human", text, f"{self.place}, turn {number}", "text")
        else:
            role_key = self._turns(turns)
            self.format = f"{key} of {role_key} and {'value' if role_key == 'from' else 'content'}"
        self._check_system(num_system)
        if len(row_keys) > 1:
            self._check_other_texts(row, row_keys & OTHER_TEXTS, key)

    def _listed(self, row: dict[str, Any], key: str, what: str) -> list[Any] | None:
        """A list in a row, also one that is written as JSON; None after a fault."""
        try:
            value = listed_turns(row[key])
        except (ValueError, RecursionError) as error:
            self._add_fatal(f'{self.place}: "{key}" cannot be read as JSON ({error}): {shown(row[key])}')
            return None
        if not isinstance(value, list):
            self._add_fatal(f'{self.place}: expected "{key}" to be a list of {what}, found {shown(value)}')
            return None
        return value

    def _check_system(self, num_system: int) -> None:
        """A system turn that says the same as the system prompt beside the turns is one."""
        others = [turn for turn in self.turns[num_system:] if turn.role == "system"]
        if not num_system or not others:
            return
        if self.turns[num_system] == self.turns[0] and len(others) == 1:
            del self.turns[0], self.numbers[0]
        else:
            self._add_fatal(
                f"{self.place}: has a system turn and another system prompt beside the turns: leave one of them out"
            )

    def _check_other_texts(self, row: dict[str, Any], keys: set[str], key: str) -> None:
        """Other texts of a row with a list of turns answer its last turn, or must stand in one of the turns."""
        answers = keys & ANSWERS
        if len(answers) == 1 and self.turns and self.turns[-1].role == "human":
            self._add("model", row[min(answers)], self.place, min(answers))
            self._reasoning(row, keys)
        said = [text for turn in self.turns for text in (turn.text, turn.reasoning)]
        values = {f'"{other}"': row[other] for other in sorted(keys) if row[other] not in ("", [])}
        others = [
            other
            for other, value in values.items()
            if not (isinstance(value, str | int | float) and any(str(value) in text for text in said))
        ]
        if others:
            self.faults.append(
                f'{self.place}: has {" and ".join(others)} beside "{key}", and no turn says the same: which one is the '
                f"conversation? Leave the other one out, or name the one: --columns {key}={key}"
            )

    def _turns(self, turns: list[Any]) -> str:
        """Read turns, those of the most frequent form faster than `_turn`; return the key of the last role."""
        role_key, num_numbered, add, add_name = "from", 0, self.turns.append, self.role_names.append
        for number, turn in enumerate(turns):
            if type(turn) is dict and len(turn) == 2:
                key = "from" if "from" in turn else "role"
                name: Any = turn.get(key)
                text: Any = turn.get("value" if key == "from" else "content")
                if type(name) is str and name in PLAIN_ROLES and text_fault(text, key) is None:
                    role_key = key
                    add(Turn(PLAIN_ROLES[name], text))
                    add_name(name)
                    continue
            self.numbers += range(num_numbered, number)
            num_numbered = number + 1
            role_key = self._turn(turn, number) or role_key
        self.numbers += range(num_numbered, len(turns))
        return role_key

    def _turn(self, turn: Any, number: int, noun: str = "turn") -> str | None:
        place = f"{self.place}, {noun} {number}"
        reading = TurnReading(turn, place, ignores_verdicts=self.ignores_verdicts)
        self.faults += reading.faults
        self.is_complete &= reading.is_complete
        self.unread += [f"{key} of turns" for key in reading.unread]
        if reading.role_name is not None:
            self.role_names.append(reading.role_name)
        if reading.calls_only and reading.turns and self.turns and self.turns[-1].role == "model":
            before, added = self.turns[-1], reading.turns[0]
            if (before.train, before.weight) == (added.train, added.weight) and not (
                before.reasoning and added.reasoning
            ):
                calls, reasoning = before.tool_calls + added.tool_calls, before.reasoning or added.reasoning
                text = before.text + added.text
                self.turns[-1] = replace(before, text=text, tool_calls=calls, reasoning=reasoning)
                return reading.role_key
        self.turns += reading.turns
        self.numbers += [number if noun == "turn" else len(self.numbers)] * len(reading.turns)
        return reading.role_key

    def _exchanges(self, row: dict[str, Any], pairs: list[Any], ask: str, key: str, row_keys: set[str]) -> None:
        """Read question and answer pairs; COIG's instruction comes before the first question, as its script has it."""
        answer = EXCHANGES[ask]
        instruction = row.get("instruction") if ask == "question" else None
        self.format = COIG_FORMAT if ask == "question" else f"{key} of {ask} and {answer}"
        if instruction is not None and not isinstance(instruction, str):
            self._add_fatal(f'{self.place}: expected "instruction" to be a string, found {shown(instruction)}')
        prefix = f"{instruction}\n" if isinstance(instruction, str) and not is_blank(instruction) else ""
        for number, pair in enumerate(pairs):
            place = f"{self.place}, pair {number}"
            if not isinstance(pair, dict):
                self._add_fatal(f'{place}: expected an object with "{ask}" and "{answer}", found {shown(pair)}')
                continue
            question = pair.get(ask)
            if number == 0 and isinstance(question, str) and not is_blank(question):
                question = prefix + question
            others = {name: pair[name] for name in sorted(pair.keys() - {ask, answer, "system"})}
            if lost := ", ".join(name for name in others if name in PAIR_KEYS and not is_empty(pair[name])):
                self._add_fatal(f"{place}: holds {ask}/{answer} and more texts, which would be lost: {lost}")
            system = pair.get("system")
            if not is_empty(system) and all(turn.text != system for turn in self.turns if turn.role == "system"):
                self._add("system", system, place, "system")
            self._add("human", question, place, ask)
            if fault := text_fault(pair.get(answer), answer):
                self._add_fatal(f"{place}: {fault}")
            else:
                self._turn(others | {"from": "model", "value": pair[answer]}, number, "pair")
        self._check_other_texts(row, row_keys & OTHER_TEXTS - {"instruction" if ask == "question" else ""}, key)

    # ---- one question, one answer

    def _pair(self, row: dict[str, Any], row_keys: set[str]) -> None:
        keys = row_keys & PAIR_KEYS
        pair_format = pair_format_of(frozenset(keys))
        if pair_format is None and not matching(keys):
            pair_format = pair_format_of(PAIR_KEYS.intersection(row))
        if (pair_format := pair_format or format_of_repeated(row, keys)) is None:
            if self.is_complete:
                advice = self.place and _advice(row)  # rows inside a row have no place: they are not looked into
                self._add_fatal(f"{self.place}: {advice or why_no_format(row, keys)}")
            return
        self.unread += keys - pair_format.keys
        names = ", ".join((*pair_format.asks, *pair_format.answers))
        self.format = f"{pair_format.name} ({names})"
        if row.get("history") is not None:
            self._history(self._listed(row, "history", "pairs") or [])
        sides = [row[key] for key in pair_format.needs[:2]]
        if isinstance(sides[0], str) and is_turns(asked := turns_in_text(sides[0])):
            sides = [asked, turns_in_text(sides[1])]
        others = pair_format.keys - {*pair_format.needs}
        if any(map(is_turns, sides)) and all(is_empty(row.get(key)) for key in others):
            self.format = f"{pair_format.name} of turns ({names})"
            self._turns_of_pair(*sides)
        else:
            self._add_joined("human", row, pair_format.asks, pair_format.needs)
            if pair_format.name == "xLAM":
                self._turn({"from": "tool_call", "value": row["answers"]}, len(self.turns))
            else:
                self._add_joined("model", row, pair_format.answers, pair_format.needs)
        self._reasoning(row, row_keys)

    def _turns_of_pair(self, ask: Any, answer: Any) -> None:
        """Read turns, one turn or a text as question and as answer; the model turns of the question are context."""
        begin = len(self.turns)
        asked, answered = (
            value if isinstance(value, list) else [value if isinstance(value, dict) else {"from": role, "value": value}]
            for role, value in (("human", ask), ("model", answer))
        )
        self._turns([*asked, *answered])
        for index in range(begin, len(self.turns)):
            if self.turns[index].role == "model" and self.numbers[index] < len(asked):
                self.turns[index] = replace(self.turns[index], train=False)

    def _reasoning(self, row: dict[str, Any], keys: set[str]) -> None:
        """Read the reasoning that stands beside an answer, the last turn."""
        if (beside := keys & {*REASONING_KEYS}) and self.turns and self.turns[-1].role == "model":
            given = {"the answer": self.turns[-1].reasoning} | {key: row[key] for key in sorted(beside)}
            reasoning, fault = read_reasoning(given)
            self.faults += [f"{self.place}: {fault}"] if fault else []
            self.turns[-1] = replace(self.turns[-1], reasoning=reasoning)

    def _add_joined(self, role: Role, row: Any, keys: tuple[str, ...], needs: tuple[str, ...]) -> None:
        texts, faults = [], []
        for key in keys:
            value: Any = text_of_parts(row.get(key))
            if (isinstance(value, str) and is_blank(value)) or (value is None and key not in needs):
                continue
            texts.append(value)
            if (fault := text_fault(value, key)) is not None:
                faults.append(fault)
                self._add_fatal(f"{self.place}: {fault}")
        if not faults:
            self._add(role, "\n".join(texts), self.place, next(key for key in keys if key in needs))

    def _history(self, history: list[Any]) -> None:
        if any(map(is_turns, history)):
            self._turns(history)
            return
        for number, pair in enumerate(history):
            place = f'{self.place}, "history", pair {number}'
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                self._add_fatal(f"{place}: expected a question and its answer, found {shown(pair)}")
                continue
            self._add("human", pair[0], place, "question")
            self._add("model", pair[1], place, "answer")

    # ---- of all formats

    def _written_calls(self, *, has_results: bool) -> None:
        """Read calls and results that stand in the texts of a row which declares tools, also in its system turn."""
        in_text, fault = declared_in_text(self.turns, self.numbers, self.declared)
        self.faults += [f"{self.place}{fault}"] if fault else []
        if in_text:
            self.declared, self.tools = in_text, ()
        if fault or not (self.declared or has_results):
            return
        turns, numbers, faults = written_calls(self.turns, self.numbers, self.declared, self.unread)
        for fault in faults:
            self._add_fatal(f"{self.place}, {fault}")
        self.turns, self.numbers = turns, numbers


def _advice(row: dict[str, Any]) -> str | None:
    """What to do with a row that holds a list of rows."""
    for key, value in [*row.items(), ("", [*row.values()])]:
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value[:3]):
            if all(RowReading(item, "").is_complete and not {"text", "label"} <= item.keys() for item in value[:3]):
                what = f"whose {shown(key)} holds a list of" if key else "that holds"
                example = f".[{shown(key)}][]" if key else ".[]"
                return (
                    f"an object {what} {len(value):,} rows: write them one a line, for example with jq -c '{example}'"
                )
    return None
