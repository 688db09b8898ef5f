"""Prompts out of the data or a file, answers that are made once, and what stands in their way."""

from __future__ import annotations

import json
import time

import pytest

from finetune.cli import report
from finetune.conversation import Turn
from finetune.dataset.conversation_reader import read_conversations
from finetune.inference.generate import AnswerGenerator
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.report import read_run, sample_answers, write_at_the_end
from finetune.report.sample_answers import SamplePrompt, generate_answers, prompts_of, read_answers, read_prompts
from finetune.run_dir.data_samples import read_samples
from finetune.run_dir.run_json import load_run_json
from finetune.utils.errors import ConfigError, FinetuneError
from tests.helpers.reported import answer, card, output_dir
from tests.helpers.short_runs import LORA


def asked(*texts: str) -> list[SamplePrompt]:
    return [SamplePrompt((Turn("human", text),)) for text in texts]


def test_prompts_are_the_first_human_turns_of_rows_kept_whole(tmp_path):
    rows = [
        card(0, "First?", "One."),
        card(1, "Cut?", "No.", status="cut"),
        card(2, "First?", "One."),
        card(3, "好", "嗯"),
    ]
    rows.append({**card(4, "Long", "x"), "unshown": 5})
    cards = read_samples(output_dir(tmp_path / "one", cards=rows))
    assert prompts_of(cards, 9) == [
        SamplePrompt((Turn("human", "First?"),), "One."),
        SamplePrompt((Turn("human", "好"),), "嗯"),
    ]
    assert len(prompts_of(cards, 1)) == 1 and prompts_of(cards, 0) == []


def test_samples_of_a_run_hold_the_words_of_the_data(train, conversation_file):
    output = train("output", "--max_steps", "1", "--report_samples", "6", world_size=1)
    cards = read_samples(output)
    rows = {one.row: one for one in read_conversations(conversation_file)}
    assert [one.row for one in cards] == sorted({one.row for one in cards}) and len(cards) == 6
    for one in cards:
        (example,) = one.examples
        words = [(turn.role, turn.text) for turn in example if turn.role]
        assert words == [(turn.role, turn.text) for turn in rows[one.row].turns]
    assert any(prompt.turns[0].role == "system" for prompt in prompts_of(cards, 6))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "\ufeffWho?\n\n  What? \n你好\n", ["Who?", "What?", "你好"]),
        ("a.json", '["Who?", {"question": "What?"}, ""]', ["Who?", "What?"]),
    ],
)
def test_prompts_of_a_file(tmp_path, name, text, found):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [one.turns[0].text for one in read_prompts(tmp_path / name)] == found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("a.json", b"{\n", "line 2: not JSON"),
        ("a.json", b'{"question": "x"}', "expected an array of texts"),
        ("a.json", b"[1]", "expected an array of texts"),
        ("a.json", b"3", "expected an array of texts"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_answers_are_those_of_base_and_result_and_are_kept(train, kind, capsys):
    output = train("output", *(LORA if kind == "adapter" else ()), "--deepspeed", "zero2", world_size=1)
    flags = {"html": None, "prompts": None, "no_answers": False, "base_model": None, "watch": False}
    report.main([str(output)], **flags, every=5.0, port=0)
    kept = read_run(output).answers
    assert len(kept.answered) == report.PROMPTS
    opened = load_for_inference(read_result(output))
    for one in kept.answered:
        with opened.base() as base:
            for model, text in ((base, one.before),):
                answerer = AnswerGenerator(model, opened.chat_format, opened.stop_token_ids)
                assert answerer.answer(one.prompt.turns, max_new_tokens=kept.new_tokens) == text
        answerer = AnswerGenerator(opened.tuned, opened.chat_format, opened.stop_token_ids)
        assert answerer.answer(one.prompt.turns, max_new_tokens=kept.new_tokens) == one.after
    assert any(one.before != one.after for one in kept.answered)

    written = (output / sample_answers.ANSWERS_FILE).stat().st_mtime_ns
    report.main([str(output)], **flags, every=5.0, port=0)
    assert (output / sample_answers.ANSWERS_FILE).stat().st_mtime_ns == written
    assert read_answers(output, {**load_run_json(output), "run_id": "another"}) is None


def test_an_adapter_whose_base_is_gone_gets_a_report_without_answers(train, tmp_path, capsys):
    output = train("output", *LORA, "--max_steps", "1", world_size=1)
    flags = {"html": None, "prompts": None, "no_answers": False, "base_model": str(tmp_path / "gone"), "watch": False}
    report.main([str(output)], **flags, every=5.0, port=0)
    told = capsys.readouterr()
    assert "note: no answers before and after: " in told.err and "gone is not there" in told.err
    assert "None were made yet" in (output / "report.html").read_text("utf-8")


def test_time_and_memory_that_do_not_suffice(train, monkeypatch):
    output = train("output", *LORA, "--max_steps", "1", world_size=1)
    result = read_result(output)
    assert sample_answers.reason_not_answered(result, 30) is None
    assert "may take longer than --report_seconds 0.001 leave" in sample_answers.reason_not_answered(result, 0.001)
    with pytest.raises(FinetuneError, match="0.1 seconds were not enough"):
        generate_answers(result, asked("Hi"), seconds=0.1)
    made = generate_answers(result, asked("Hi", "Ho"), seconds=3.0, new_tokens=100_000)
    assert any(one.hurried for one in made.answered)

    result.run["plan"]["parameters"] = 10**13
    assert "TB" not in sample_answers.reason_not_answered(
        result, 30
    ) and "40000.0 GB of memory" in sample_answers.reason_not_answered(result, 30)
    monkeypatch.setattr("finetune.report.report_file.reason_not_answered", lambda *_: "it is too large")
    line = write_at_the_end(output, answers=1, seconds=30)
    assert line.endswith(f"it is too large: finetune report {output} makes them")
    assert not (output / sample_answers.ANSWERS_FILE).exists() and (output / "report.html").is_file()


def test_what_the_libraries_refuse_never_fails_a_finished_run(train, monkeypatch):
    output = train("output", *LORA, "--max_steps", "1", world_size=1)

    def refuse(*_, **__):
        raise RuntimeError("CUDA out of memory\nof much more")

    monkeypatch.setattr(sample_answers, "load_for_inference", refuse)
    line = write_at_the_end(output, answers=1, seconds=30)
    assert line == f"{output}/report.html; no answers before and after: RuntimeError: CUDA out of memory"


def test_hurried_answers_are_made_again(tmp_path, monkeypatch):
    folder = output_dir(tmp_path / "one", answers=[answer("Q", "a", "b", hurried=True)])
    assert report._needs_answers(read_run(folder), [])
    stored = json.loads((folder / "answers.json").read_text())
    stored["answers"][0]["hurried"] = False
    (folder / "answers.json").write_text(json.dumps(stored))
    run = read_run(folder)
    assert not report._needs_answers(run, []) and not report._needs_answers(run, asked("Q"))
    assert report._needs_answers(run, asked("Other"))


def test_the_time_is_divided_among_the_answers_that_are_left():
    clock = sample_answers._Clock(10.0, 4, began=time.monotonic() - 2.0)
    assert [round(clock.next()) for _ in range(4)] == [2, 3, 4, 8]
    assert sample_answers._Clock(None, 2).next() is None
