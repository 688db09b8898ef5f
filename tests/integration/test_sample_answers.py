"""Answers of base and result to the samples of runs that were really made."""

import pytest

from finetune.cli import report
from finetune.conversation import Turn
from finetune.dataset.conversation_reader import read_conversations
from finetune.inference.generate import AnswerGenerator
from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.report import read_run, sample_answers, write_at_the_end
from finetune.report.sample_answers import SamplePrompt, generate_answers, prompts_of, read_answers
from finetune.run_dir.data_samples import read_samples
from finetune.run_dir.run_json import load_run_json
from finetune.utils.errors import FinetuneError
from tests.helpers.short_runs import LORA
from tests.helpers.tiers import mostly_slow


def asked(*texts: str) -> list[SamplePrompt]:
    return [SamplePrompt((Turn("human", text),)) for text in texts]


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


@pytest.mark.parametrize("kind", mostly_slow(["adapter", "full"], ["adapter"]))
def test_answers_are_those_of_base_and_result_and_are_kept(train, kind, capsys):
    output = train("output", *(LORA if kind == "adapter" else ()), "--deepspeed", "zero2", world_size=1)
    report.main([str(output)])
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
    report.main([str(output)])
    assert (output / sample_answers.ANSWERS_FILE).stat().st_mtime_ns == written
    assert read_answers(output, {**load_run_json(output), "run_id": "another"}) is None


def test_an_adapter_whose_base_is_gone_gets_a_report_without_answers(train, tmp_path, capsys):
    output = train("output", *LORA, "--max_steps", "1", world_size=1)
    report.main([str(output), "--base_model", str(tmp_path / "gone")])
    told = capsys.readouterr()
    assert f"{tmp_path / 'gone'} does not exist" in told.err and "--base_model" in told.err
    assert "None were made yet" in (output / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_time_and_memory_that_do_not_suffice(train, monkeypatch):
    output = train("output", *LORA, "--max_steps", "1", world_size=1)
    result = read_result(output)
    assert sample_answers.reason_not_answered(result, 30) is None
    assert "may take longer than --report_seconds 0.001 leave" in sample_answers.reason_not_answered(result, 0.001)
    with pytest.raises(FinetuneError, match="0.1 seconds were not enough"):
        generate_answers(result, asked("Hi"), seconds=0.1)
    made = generate_answers(result, asked("Hi"), seconds=6.0, new_tokens=100_000)
    assert any(one.hurried for one in made.answered)

    result.run["plan"]["parameters"] = 10**13
    assert "TB" not in sample_answers.reason_not_answered(
        result, 30
    ) and "40000.0 GB of memory" in sample_answers.reason_not_answered(result, 30)
    monkeypatch.setattr("finetune.report.report_page.reason_not_answered", lambda *_: "it is too large")
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
