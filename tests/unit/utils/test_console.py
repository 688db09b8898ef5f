"""Whatever the encoding of a terminal or pipe, output does not raise, and drawings can still be read."""

import io
import logging
import os
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


def test_a_pipe_that_nobody_reads_is_dropped_with_one_note(capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        console.write_line("step 1", stream)
        console.write_line("step 2", stream)
    assert capfd.readouterr().err.count("broken pipe") == 1


def test_a_closed_stream_becomes_dev_null(monkeypatch):
    kept = os.dup(0)
    try:
        os.close(0)
        monkeypatch.setattr(sys, "stdin", None)
        console.open_standard_streams()
        assert os.readlink("/proc/self/fd/0") == os.devnull and sys.stdin.read() == ""
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@pytest.mark.parametrize(("locale_encoding", "restarts"), [("UTF-8", False), ("ANSI_X3.4-1968", True), ("GBK", True)])
def test_a_process_of_another_encoding_starts_again_in_utf8_mode(monkeypatch, locale_encoding, restarts):
    started = []
    monkeypatch.setattr(console.locale, "getpreferredencoding", lambda _: locale_encoding)
    monkeypatch.setattr(console.os, "execv", lambda *words: started.append(os.environ["PYTHONUTF8"]))
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    console.use_utf8()
    assert started == ["1"] * restarts and ("PYTHONIOENCODING" in os.environ) is restarts


def test_long_lines_hang_under_their_beginning(monkeypatch):
    monkeypatch.setattr(console, "width", lambda: 100)
    text = "note: " + "word " * 20 + "\n  step        " + "of a plan " * 9 + "\nshort\n" + "⣿" * 90
    lines = console.wrapped(text).split("\n")
    assert max(map(len, lines[:-1])) <= 80 and lines[1].startswith("      word")
    assert lines[3].startswith(" " * 14 + "of") or lines[3].startswith(" " * 14)
    assert "short" in lines and console.wrapped("note: short") == "note: short"


def test_what_is_logged_goes_to_a_file_too(tmp_path, capsys):
    console.configure_logging()
    logger = logging.getLogger("finetune.test")
    logger.info("early")
    console.log_to_file(tmp_path / "train.log")
    logger.warning("a note")
    logger.info("under a bar", extra={"file_only": True})
    assert (tmp_path / "train.log").read_text() == "early\nnote: a note\nunder a bar\n"
    assert capsys.readouterr().out == "early\nnote: a note\n"
    console.log_to_file(tmp_path / "no" / "folder")
    logger.info("go on")
    assert "not written any more" in capsys.readouterr().err
    console.configure_logging()
