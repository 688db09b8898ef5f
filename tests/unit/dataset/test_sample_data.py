"""The sample data is what its README says, and teaches what it should without containing the questions it is asked."""

import json
import re

import pytest

from finetune.dataset.conversation_reader import read_conversations
from tests.helpers.paths import ROOT

DATA = ROOT / "data"
FILES = ("identity.json", "conversations.json")


def counted(name: str, tokenizer) -> list[int]:
    conversations = read_conversations(DATA / name)
    roles = [[turn.role for turn in one.turns] for one in conversations]
    names = {"human": "user", "model": "assistant", "system": "system"}
    tokens = sum(
        len(
            tokenizer.apply_chat_template(
                [{"role": names[turn.role], "content": turn.text} for turn in one.turns], return_dict=False
            )
        )
        for one in conversations
    )
    return [
        len(conversations),
        *(sum(row.count(role) for row in roles) for role in ("system", "human", "model")),
        sum(row.count("model") > 1 for row in roles),
        sum(any("\u4e00" <= letter <= "\u9fff" for turn in one.turns for letter in turn.text) for one in conversations),
        tokens,
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_readme_counts_right(name, smol_tokenizer):
    lines = (DATA / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {name}")]
    stated = [int(cell.replace(",", "")) for cell in line.strip("| ").split("|")[1:]]
    assert stated == counted(name, smol_tokenizer)


def test_sizes(smol_tokenizer):
    rows, system, _, _, several, chinese, tokens = counted("identity.json", smol_tokenizer)
    assert 100 <= rows <= 150 and tokens <= 9000 and system and several and 40 < chinese < rows - 40
    rows, system, _, _, several, chinese, _ = counted("conversations.json", smol_tokenizer)
    assert rows >= 150 and system and several >= 40 and 60 < chinese < rows - 60


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_there_twice(name):
    conversations = read_conversations(DATA / name)
    assert len({one.turns for one in conversations}) == len(conversations)
    assert [one.id for one in conversations] == list(range(len(conversations)))


def test_held_out_questions_are_held_out():
    def bare(text: str) -> str:
        return re.sub(r"[\W_]", "", text.casefold())

    questions = json.loads((DATA / "identity_questions.json").read_text(encoding="utf-8"))
    trained = {bare(turn.text) for name in FILES for one in read_conversations(DATA / name) for turn in one.turns}
    assert len(questions) == 10 and {one["language"] for one in questions} == {"en", "zh"}
    assert bare("Who are you?") in trained
    assert not {bare(one["question"]) for one in questions} & trained
