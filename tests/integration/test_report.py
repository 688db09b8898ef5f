"""Reports of runs that were really made."""

import json

from finetune.report import read_run
from finetune.report.run_outcome import against_the_plan
from tests.helpers.report_pages import Page

SECTIONS = ("Answers", "Plan", "Data", "Rows", "Ledger", "Arguments")


def test_every_section_of_a_run_that_was_really_made(train):
    flags = "--use_lora True --write_report True --report_answers 2 --model_max_length 40 --deepspeed zero2".split()
    output = train("output", *flags)
    page = Page((output / "report.html").read_text("utf-8"))
    assert set(SECTIONS) <= set(page.sections())
    metrics = [json.loads(one) for one in (output / "metrics.jsonl").read_text().splitlines()]
    (run,) = page.numbers()["runs"]
    assert run["columns"]["loss"] == [one["loss"] for one in metrics] and len(metrics) > 3
    facts = json.loads((output / "run.json").read_text())
    answers = json.loads((output / "answers.json").read_text())["answers"]
    assert len(answers) == 2 and all(one["turns"][-1]["value"] in page.text for one in answers)
    assert [one["how"] for one in facts["starts"]] == ["complete"] and facts["starts"][0]["ended"] is not None
    shown = [facts["run_id"], facts["data"]["fingerprint"], facts["model"]["weights"], facts["versions"]["torch"]]
    shown += ["--use_lora", "--report_answers", f"{facts['plan']['trainable']:,}", "complete"]
    assert [text for text in shown if text not in page.text] == []
    plan = {what: (planned, happened) for what, planned, happened in against_the_plan(read_run(output))}
    assert plan["Steps"][0] == plan["Steps"][1] == f"{facts['result']['steps']}"
    assert plan["Epochs"] == ("2", "2")
    ledger = [json.loads(one) for one in (output / "data_ledger.jsonl").read_text().splitlines()]
    assert ledger and ledger[0]["reason"].rpartition(": ")[2] in page.text
    assert (output / "RUN_COMPLETE").stat().st_mtime_ns >= (output / "report.html").stat().st_mtime_ns


def test_a_run_that_is_told_to_keep_no_text_keeps_none(train):
    output = train("output", "--report_samples", "0", "--max_steps", "1", world_size=1)
    assert not {one.name for one in output.iterdir()} & {"samples.json", "answers.json", "report.html"}
    assert "Nori" not in "".join(path.read_text("utf-8") for path in output.glob("*.json*") if "token" not in path.name)
