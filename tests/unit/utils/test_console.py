"""Whatever the encoding of a terminal or pipe, output does not raise, and drawings can still be read."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from finetune.dataset.data_summary import BARS
from finetune.training.metrics import loss_curve
from finetune.utils import console

TEXTS = ["你好 🙂", "⟦«</s>»⟧ → ‹NUL› … ±", BARS, "“quoted” – dash", "half \ud83d of a pair", "café Ω"]
NARROW = ["ascii", "cp1252", "gbk", "latin-1", "shift-jis", "koi8-r"]


@pytest.fixture
def printed(monkeypatch) -> Callable[..., str]:
    """What a text becomes on a stdout of this encoding that is set up as every command sets it up."""

    def print_(text: str, encoding: str, *, read_as: str = "", **options: bool) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            console.accept_all_characters(**options)
            print(text, end="")
        return stream.buffer.getvalue().decode(read_as or encoding)

    return print_


@pytest.mark.parametrize("encoding", [*NARROW, "utf-8", "utf-16"])
def test_no_text_is_refused(encoding, printed):
    text = "\n".join([*TEXTS, loss_curve([1, 2, 3], [3.0, 2.0, 1.0], 60)])
    assert printed(text, encoding).count("\n") == text.count("\n")


def test_a_curve_is_drawn_with_what_there_is(printed):
    curve = loss_curve([1, 2, 3], [3.0, 2.0, 1.0], 60)
    drawn = printed(curve, "ascii")
    assert "\\u" not in drawn and "|" in drawn and "---" in drawn and "**" in drawn
    assert [len(line) for line in drawn.splitlines()] == [len(line) for line in curve.splitlines()]


def test_signs_become_similar_ones_and_letters_escapes(printed):
    assert printed("⟦«</s>»⟧ → 你 🙂 …", "ascii") == r"[[<<</s>>>]] -> \u4f60 \U0001f642 ..."
    assert printed(BARS, "ascii") == " .:-=+*##"


def test_what_the_encoding_has_stays(printed):
    assert printed("你好 ▁▃█ │ 🙂", "gbk") == "你好 ▁▃█ │ \\U0001f642"


def test_output_for_programs_is_utf_8(printed):
    assert printed("你 🙂", "ascii", utf8=True, read_as="utf-8") == "你 🙂"


def test_a_stream_that_is_replaced_by_another_kind_is_left_alone(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.StringIO())
        console.accept_all_characters()
        print("你", end="")
        assert sys.stdout.getvalue() == "你"
