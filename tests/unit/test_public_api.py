"""The functions of the package itself; the examples of all docstrings are run."""

import doctest
import importlib

import pytest

import finetune
from finetune.utils.errors import DataError
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows

MODULES_WITH_EXAMPLES = sorted(path for path in (ROOT / "finetune").rglob("*.py") if ">>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("path", MODULES_WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_of_docstrings_are_true(path, pretrained, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed


def test_conversations_are_rendered_as_training_renders_them(smol_tokenizer, tmp_path):
    rows = [[("human", "Hi"), ("model", "Yes")], [("human", "What?"), ("model", "word " * 300)]]
    conversations = finetune.read_conversations(write_rows(tmp_path / "rows.json", rows))
    kept, cut = finetune.render(conversations, smol_tokenizer, max_length=100)
    assert (kept.status, cut.status) == ("kept", "cut")
    assert len(cut.examples[0].input_ids) == 100
    assert finetune.render(conversations, smol_tokenizer, max_length=100, too_long="drop")[1].status == "dropped"


def test_every_conversation_that_cannot_be_rendered_is_named(smol_tokenizer, tmp_path):
    long = [("human", "What?"), ("model", "word " * 300)]
    conversations = finetune.read_conversations(
        write_rows(tmp_path / "rows.json", [long, [("human", "So?"), *long[1:]]])
    )
    with pytest.raises(DataError) as raised:
        finetune.render(conversations, smol_tokenizer, max_length=100, too_long="error")
    assert "row 0" in str(raised.value) and "row 1" in str(raised.value)
