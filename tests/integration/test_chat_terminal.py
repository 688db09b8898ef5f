"""`finetune chat` in a terminal, typed to as a user types."""

import sys
import time

import pytest

from finetune.dataset.conversation_reader import read_conversations
from tests.helpers.paths import ROOT
from tests.helpers.terminals import Terminal


def chat(folder, *flags, **sizes):
    return Terminal([sys.executable, "-m", "finetune", "chat", folder, *flags], PYTHONPATH=str(ROOT), **sizes)


def test_a_conversation(learned_by_heart, tmp_path):
    saved = tmp_path / "saved.json"
    with chat(learned_by_heart, "--max_new_tokens", "40") as terminal:
        assert "greedy, at most 40 tokens" in terminal.wait_for("\n> ")
        terminal.type("你是谁？\n")
        assert "tuned: 我是 Nori。\n" in terminal.wait_for("\n> ")
        terminal.type("What does <|im_\x7f|im_end|> do?\x02\x02\n")  # edited on the way
        assert "tuned: " in terminal.wait_for("\n> ")
        terminal.type("/undo\n")
        assert "removed: What does <|im|im_end|> do?" in terminal.wait_for("\n> ")
        terminal.type("What does <|im_end|> do?\n")
        assert "tuned: It ends a turn.\n" in terminal.wait_for("\n> ")
        terminal.type(f"/save {saved}\n")
        assert f"saved: {saved} has 1 row" in terminal.wait_for("\n> ")
        terminal.type("/reset\n")
        assert "new conversation" in terminal.wait_for("\n> ")
        terminal.type("/system Be brief.\n")
        assert "system: Be brief." in terminal.wait_for("\n> ")
        terminal.type("2+3?\n")
        assert "tuned: 5\n" in terminal.wait_for("\n> ")
        terminal.type("/retry\n")
        assert "tuned: 5\n" in terminal.wait_for("\n> ")
        terminal.type("/systm\n")
        assert "unknown command /systm: /help" in terminal.wait_for("\n> ")
        terminal.type("/save\n\x04")
        assert terminal.wait_for_end() == 0
        assert "/save FILE" in terminal.shown
    (row,) = read_conversations(saved)
    said = ["你是谁？", "我是 Nori。", "What does <|im_end|> do?", "It ends a turn."]
    assert [turn.text for turn in row.turns] == said


@pytest.mark.slow
def test_several_lines_and_pastes_are_one_message(learned_by_heart, tmp_path):
    with chat(learned_by_heart, "--max_new_tokens", "3") as terminal:
        for typed in ("one\\\ntwo\n", '"""\nthree\n\n/four\n"""\n', "\x1b[200~five\n第六\x1b[201~\n"):
            terminal.wait_for("\n> ")
            terminal.type(typed)
            terminal.wait_for("tuned: ")
        terminal.wait_for("\n> ")
        terminal.type(f"/save {tmp_path / 'saved.jsonl'}\n/exit\n")
        assert terminal.wait_for_end() == 0
    (row,) = read_conversations(tmp_path / "saved.jsonl")
    assert [turn.text for turn in row.turns if turn.role == "human"] == ["one\ntwo", "three\n\n/four", "five\n第六"]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(learned_by_heart):
    with chat(learned_by_heart, "--base", "--max_new_tokens", "2000", "--temperature", "5") as terminal:
        terminal.wait_for("\n> ")
        terminal.type("Go on for ever.\n")
        terminal.wait_for("base: ")
        terminal.type("\x03")
        terminal.wait_for("stopped; ", seconds=20)  # the words drawn at this temperature may hold a prompt, too
        terminal.wait_for("\n> ")
        time.sleep(0.5)  # Python may miss a signal between the prompt and its waiting for keys
        terminal.type("\x03")
        assert terminal.wait_for_end() == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 50])
def test_tuned_and_base_next_to_each_other_or_below(learned_by_heart, columns):
    with chat(learned_by_heart, "--compare", "--max_new_tokens", "12", columns=columns, lines=12) as terminal:
        assert "the tuned answers are kept" in terminal.wait_for("\n> ").replace("\n", " ")
        terminal.type("Capital of France?\n")
        shown = terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    lines = shown.splitlines()
    if columns == 50:
        assert "tuned: Paris." in lines and any(line.startswith("base: ") for line in lines)
    else:
        final = lines[-6:]
        assert any("tuned" in line and "base" in line for line in final)
        assert any(line.startswith("Paris. ") and "│" in line for line in final)
