"""A thousand conversations made at random: what is accepted is learned exactly as it stands, the rest has a reason."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from finetune.chat_templates import (
    CHATML,
    JinjaFormat,
    LingoWhaleFormat,
    RenderedConversation,
    Renderer,
    select_chat_format,
)
from finetune.conversation import Conversation, Turn
from finetune.dataset.data_sources import find_sources
from finetune.dataset.prepare import check_dropped_share, prepare_dataset
from tests.helpers.chat_rows import written
from tests.helpers.tiers import mostly_slow

COUNT, LIMIT = 1_000, 600
HUMANS, MODELS = ("human", "user"), ("model", "gpt", "assistant", "bot")
ROLES = {**dict.fromkeys(HUMANS, "human"), **dict.fromkeys(MODELS, "model"), "system": "system"}
WORDS = [
    "hello", "你好，世界", "今天天气很好。", "\U0001f600", "\U0001f469\u200d\U0001f469", "naïve", "e\u0301", "\u202e",
    "日本語", "ﬁ", "\t", "\n\n", "  ", "'", '"', "\\", "\x1b[0m", "\u2028", "İ", "한국어", "\ufffd", "{{ content }}",
    "{% endif %}", "user", "assistant", "Ω≈ç√",
]  # fmt: skip
FORMATS = ("own template", "chatml", "lingowhale")


class Maker:
    """Makes rows; `spellings` are the tokenizer's control tokens, put into contents like any other word."""

    def __init__(self, seed: str, spellings: list[str]) -> None:
        self.random = random.Random(seed)
        self.spellings = spellings

    def text(self, number: int) -> str:
        """Words and control tokens; the number makes each row another one."""
        pick = self.random.random()
        length = 3_000 if pick > 0.985 else self.random.randint(0, 12)
        words = self.random.choices([*WORDS, *self.spellings * 2], k=length)
        return self.random.choice(["", " "]).join([*words[: length // 2], str(number), *words[length // 2 :]])

    def fine(self, number: int) -> dict:
        """A row that must be accepted."""
        speaks, says = self.random.choice([("from", "value"), ("role", "content")])
        turns = [{speaks: "system", says: self.text(number)}] if self.random.random() < 0.2 else []
        for _ in range(self.random.choice([1, 1, 2, 5])):
            turns.append({speaks: self.random.choice(HUMANS), says: self.text(number)})
            turns.append({speaks: self.random.choice(MODELS), says: self.text(number)})
        if len(turns) > 3 and self.random.random() < 0.3:
            turns[-3]["train"] = turns[-3][speaks] not in MODELS and None
        key = self.random.choice(["conversations", "messages"])
        return {"id": number, key: turns}

    def broken(self, number: int) -> dict:
        """The same with one to three faults."""
        row = self.fine(number)
        for fault in self.random.sample(FAULTS, self.random.choice([1, 1, 2, 3])):
            fault(row, self.random)
        return row

    def chaos(self, number: int) -> Any:
        """Any roles in any order, any values under any keys; nobody knows whether it is a row."""
        keys = ["from", "value", "role", "content", "train", "name"]
        values = [*ROLES, "robot", "", None, 5, True, float("nan"), ["a"], {"text": "a"}, "\ud800", "a\0"]
        kinds: list[Callable[[], Any]] = [
            lambda: {"from": self.random.choice([*ROLES]), "value": self.text(number)},
            lambda: {"from": self.random.choice([*ROLES]), "value": self.text(number)},
            lambda: {key: self.random.choice(values) for key in self.random.sample(keys, 3)},
            lambda: self.random.choice(values),
        ]
        turns = [self.random.choice(kinds[: self.random.choice([2, 2, 4])])() for _ in range(self.random.randint(0, 4))]
        return self.random.choice([{"conversations": turns}] * 6 + [turns, *values, {"conversations": values}])


def _turns(row: dict) -> list:
    return row.get("conversations") or row.get("messages") or [{}]


def _set(key_of: tuple[str, str], value: Any) -> Callable[[dict, random.Random], None]:
    def fault(row: dict, random_: random.Random) -> None:
        turn = random_.choice([one for one in _turns(row) if isinstance(one, dict)])
        turn[key_of[0] if key_of[0] in turn else key_of[1]] = value

    return fault


def _unanswered(row: dict, random_: random.Random) -> None:
    turns = _turns(row)
    turns.append({**turns[-1], **({"from": "human"} if "from" in turns[-1] else {"role": "user"})})
    turns[-1].pop("train", None)


FAULTS = [
    *(_set(("from", "role"), value) for value in ("robot", "", None, 7, ["human"], "Humane", "tool")),
    *(_set(("value", "content"), value) for value in ("", " \n", None, 5, ["a"], {"a": 1}, float("nan"), "\ud83d")),
    _set(("value", "content"), "a\0b"),
    lambda row, random_: _turns(row).insert(random_.randrange(len(_turns(row))), 5),
    lambda row, random_: _turns(row).append({**_turns(row)[-1]}),
    lambda row, random_: next(one for one in _turns(row) if isinstance(one, dict)).update(weight=-random_.random()),
    lambda row, random_: row.update(tools=["f"]),
    lambda row, random_: row.update(id={}),
    _unanswered,
]  # fmt: skip


def rows_made(seed: str, spellings: list[str]) -> tuple[list[Any], list[str]]:
    """The rows, and which kind each is."""
    maker = Maker(seed, spellings)
    kinds = maker.random.choices(["fine", "broken", "chaos"], [5, 3, 2], k=COUNT)
    return [getattr(maker, kind)(number) for number, kind in enumerate(kinds)], kinds


def said(row: Any) -> list[tuple[str, str, bool]]:
    """(role, text, whether it is learned) of each turn, read without the project."""
    turns = row["conversations"] if "conversations" in row else row["messages"]
    return [
        (ROLES[turn["from" if "from" in turn else "role"]], turn["value" if "value" in turn else "content"],
         turn.get("train") is not False)
        for turn in turns
    ]  # fmt: skip


def learned_runs(labels: list[int]) -> list[list[int]]:
    """The labels that are learned, those behind each other together."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label >= 0:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def check_accepted(one: RenderedConversation, row: Any, tokenizer: Any, end: int, control_ids: list[list[int]]) -> None:
    """Decoded labels are the model turns with their ends, and no content holds a control id.

    `control_ids` are those of the same turns with harmless texts.
    """
    texts = [text for role, text, learned in said(row) if role == "model" and learned]
    runs = [run for example in one.examples for run in learned_runs(example.labels)]
    assert runs and len(runs) <= len(texts)
    for number, (run, text) in enumerate(zip(runs, texts, strict=False)):
        is_cut = one.status == "cut" and number == len(runs) - 1 and run[-1] != end
        read = tokenizer.decode(run if is_cut else run[:-1], clean_up_tokenization_spaces=False)
        assert text.startswith(read.rstrip("\ufffd")) if is_cut else (read == text and run[-1] == end)
    harmless = control_ids[1]
    for example in one.examples:
        found = [number for number in example.input_ids if number in control_ids[0]]
        assert len(example.input_ids) <= LIMIT and len(found) <= len(harmless)
        assert one.status != "kept" or found == harmless
    assert (one.status == "kept" and len(one.examples) == 1) or one.reason
    assert len(runs) == len(texts) or one.status == "cut"


def control_ids_of(renderer: Renderer, row: Any, among: set[int]) -> list[int]:
    turns = tuple(Turn(role, "x", learned) for role, _, learned in said(row))
    (example,) = renderer.render(Conversation(turns, 0, "harmless")).examples
    return [number for number in example.input_ids if number in among]


@pytest.mark.parametrize("name", mostly_slow(FORMATS, ["lingowhale"]))
def test_a_thousand_conversations_at_random(name, smol_tokenizer, golden_tokenizer, tmp_path):
    tokenizer = golden_tokenizer if name == "lingowhale" else smol_tokenizer
    formats = {
        "own template": lambda: select_chat_format(tokenizer, None, is_lingowhale=False)[0],
        "chatml": lambda: JinjaFormat(tokenizer, CHATML, "chatml"),
        "lingowhale": lambda: LingoWhaleFormat(tokenizer, [3], [4]),
    }
    renderer = Renderer(formats[name](), LIMIT)
    control = set(tokenizer.added_tokens_decoder)
    rows, kinds = rows_made(name, [str(token) for token in tokenizer.added_tokens_decoder.values()])
    path = written(tmp_path / "a.json", rows)

    data = prepare_dataset(find_sources([str(path)]), renderer, bad_rows="drop", cache_dir=tmp_path / "cache")

    check_dropped_share(data, 1.0)
    renderings = list(data.renderings())
    assert [one.row for one in renderings] == list(range(COUNT))
    fates: Counter = Counter()
    end = tokenizer.eos_token_id
    for one, row, kind in zip(renderings, rows, kinds, strict=True):
        is_fault = one.status == "dropped" and (one.reason or "").startswith(f"{path}, row {one.row}")
        fates[kind, "fault" if is_fault else one.status] += 1
        assert not (is_fault and kind == "fine"), one.reason
        if one.status == "dropped":
            assert one.examples == () and one.reason
            assert is_fault or one.reason.endswith((f"alone fills {LIMIT}", f"fits into {LIMIT}")), one.reason
        elif isinstance(row.get("text"), str) and not {"conversations", "messages"} & row.keys():
            (example, *_) = one.examples
            assert tokenizer.decode(example.input_ids[:-1]) in (row["text"], "<s>" + row["text"])
        else:
            harmless = control_ids_of(renderer, row, control)
            check_accepted(one, row, tokenizer, end, [control, harmless])
    assert fates["fine", "kept"] > 300 and fates["fine", "cut"] > 10
    assert fates["broken", "fault"] == kinds.count("broken") > 200
    assert fates["chaos", "fault"] > 100 and fates["chaos", "kept"] > 5
    assert data.summary.spelled > 200
