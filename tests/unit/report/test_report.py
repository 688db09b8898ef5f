"""The report says what the files of a run say, whatever stands in them, and needs nothing else."""

import base64
import hashlib
import json
import re
from pathlib import Path
from random import Random

import pytest

from finetune import diagnostics
from finetune.cli import report
from finetune.diagnostics import Failure
from finetune.report import read_run, render_report, write_at_the_end
from finetune.report.curves import MAX_POINTS, plot_data, thinned
from finetune.report.report_page import as_script_data, render_state
from finetune.report.run_outcome import against_the_plan, duration
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.eval_results import HELD_OUT_FILE, versioned, write_results
from finetune.utils.errors import ConfigError
from tests.helpers.hostile_json import mutated
from tests.helpers.preview_pages import HOSTILE
from tests.helpers.report_pages import Page
from tests.helpers.reported import answer, card, line, output_dir


def page_of(*folders: Path) -> Page:
    return Page(render_report([read_run(folder) for folder in folders]))


def test_the_numbers_are_those_of_the_metrics(tmp_path):
    lines = [line(step, loss_by_source={"a": 1.0 / step}, loss_by_turn={"1": 2.0, "0": 3.0}) for step in (1, 2, 4)]
    lines.insert(2, {"step": 2, "eval_loss": 3.25})
    (run,) = page_of(output_dir(tmp_path / "one", lines)).numbers()["runs"]
    assert run["name"] == "one"
    assert run["x"] == {"step": [1, 2, 4], "tokens": [400, 800, 1600], "seconds": [0.5, 1.0, 2.0]}
    for name in ("loss", "grad_norm", "learning_rate", "supervised_tokens_per_second", "peak_memory_bytes", "mfu"):
        assert run["columns"][name] == [one[name] for one in lines if "loss" in one], name
    assert run["evaluations"] == {"x": {"step": [2], "tokens": [800], "seconds": [1.0]}, "loss": [3.25]}
    assert run["groups"]["loss_by_source"] == {"a": [1.0, 0.5, 0.25]}
    assert list(run["groups"]["loss_by_turn"]) == ["0", "1"]


def test_only_our_scripts_may_run_and_nothing_is_fetched(tmp_path):
    page = page_of(output_dir(tmp_path / "one"))
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert len(run) == 3 and all(f"'sha256-{one}'" in page.policy() for one in hashes)
    directives = dict(one.strip().split(" ", 1) for one in page.policy().split(";"))
    assert directives["default-src"] == "'none'" and directives["img-src"] == "data: blob:"
    assert set(directives) == {"default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"}
    named = {name for _, attributes in page.elements for name in attributes}
    assert not named & {"src", "href", "onerror", "onclick", "style"}
    assert not {tag for tag, _ in page.elements} & {"img", "link", "iframe", "form", "a", "object"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "data_ledger.jsonl", "samples.json", "answers.json", "failure.json"])
@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"step": 1, "loss": ' + "9" * 400 + "}", '{"source": "a", "row": Infinity, "status": 1}'],
)
def test_files_of_anyone_break_no_page(name, content, tmp_path):
    folder = output_dir(tmp_path / "one")
    (folder / name).write_text(content + "\n")
    assert page_of(folder).text


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "data_ledger.jsonl", "samples.json", "answers.json"])
def test_changed_values_are_one_error_with_the_file_or_a_page(name, tmp_path):
    entry = {"source": "a.json", "row": 9, "id": 9, "status": "cut", "reason": "too long"}
    folder = output_dir(
        tmp_path / "one", [line(1, loss_by_source={"a": 1.0})], ledger=[entry], answers=[answer("a", "b", "c")]
    )
    random, original, read = Random(name), json.loads((folder / name).read_text()), 0
    for _ in range(60):
        (folder / name).write_text(json.dumps(mutated(original, random)) + "\n")
        try:
            parts, numbers = render_state([read_run(folder)])
            read += bool(parts and as_script_data(numbers))
        except ConfigError as error:
            assert name == "run.json" and str(folder / name) in str(error)
    assert read > 30


def test_a_text_of_megabytes_is_cut(tmp_path):
    page = page_of(output_dir(tmp_path / "one", notes=["x" * 3_000_000]))
    assert len(page.text) < 300_000 and "2,800,000 more characters" in page.text


def test_hostile_text_is_text(tmp_path):
    folder = output_dir(
        tmp_path / "<b>&name",
        [line(1, loss_by_source={HOSTILE: 1.0})],
        cards=[card(1, HOSTILE, HOSTILE, source=HOSTILE)],
        ledger=[{"source": HOSTILE, "row": 1, "id": 1, "status": HOSTILE, "reason": HOSTILE + "\u202e\ud800"}],
        answers=[answer(HOSTILE, HOSTILE, "\u202egnp")],
        arguments={"model_name_or_path": HOSTILE, "data_path": [HOSTILE], HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        deepspeed={HOSTILE: HOSTILE},
        data={"path": [HOSTILE], "fingerprint": HOSTILE, "left_out": [HOSTILE]},
    )
    diagnostics.write_failure(
        folder, Failure("error", HOSTILE, run=HOSTILE, host=HOSTILE, traceback=HOSTILE, also=(HOSTILE,))
    )
    plain = page_of(output_dir(tmp_path / "two", cards=[card(1, "a", "b")]))
    page = page_of(folder)
    assert page.text.count("<script>document.title='gone'</script>") > 15
    assert {tag for tag, _ in page.elements} - {tag for tag, _ in plain.elements} <= {"pre", "i", "ul", "li", "article"}
    assert len(page.scripts) == 4
    assert list(page.numbers()["runs"][0]["groups"]["loss_by_source"]) == [HOSTILE]
    html = render_report([read_run(folder)])
    numbers = html[html.index('id="numbers">') :].partition("</script>")[0]
    assert "<" not in numbers and "\u202e" not in html


def test_broken_and_unfinished_lines_are_left_out_and_counted(tmp_path):
    lines = [line(1), "{broken", "[]", '{"step": true, "loss": 1}', json.dumps(line(2, loss=None)), '{"step": 3}']
    lines += [json.dumps(line(4, grad_norm="high", loss_by_source=[1])), '{"step": 5, "loss": NaN}', "[" * 5000]
    folder = output_dir(tmp_path / "one", lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = read_run(folder)
    assert [one["step"] for one in run.lines] == [1, 2, 4, 5]
    assert [one["loss"] for one in run.lines] == [3.9, None, 3.6, None] and run.lines[2]["grad_norm"] is None
    assert run.unread == 5
    assert plot_data([run])["runs"][0]["lost"] == [2, 5]
    assert "5 could not be read" in page_of(folder).text


def test_steps_made_anew_replace_those_before(tmp_path):
    run = read_run(output_dir(tmp_path / "one", [line(1), line(2), line(3), line(2, loss=9.0)]))
    assert [(one["step"], one["loss"]) for one in run.lines] == [(1, 3.9), (2, 9.0)]


def test_a_run_that_has_left_next_to_nothing(tmp_path):
    (tmp_path / "run.json").write_text('{"run_id": "x", "plan": {"steps": 3}, "starts": [1], "data": null}')
    for name in ("samples.json", "answers.json", "failure.json"):
        (tmp_path / name).write_text('{"half')
    page = page_of(tmp_path)
    assert page.numbers()["plots"] == [] and "end unknown" in page.text
    assert "Arguments" in page.sections() and "Data" not in page.sections()


def test_no_run_no_report(tmp_path):
    with pytest.raises(ConfigError, match="holds no run.json"):
        report_of(tmp_path)


def test_facts_of_another_shape_are_an_error_that_says_so(tmp_path):
    folder = output_dir(tmp_path / "one", data={"path": [], "summary": {"rows": "many"}})
    with pytest.raises(ConfigError, match=f"{folder}/run.json: is not as this version writes it"):
        report_of(folder)
    assert "no report was written: " in write_at_the_end(folder, answers=0, seconds=1.0)


def test_a_failed_run_shows_the_likely_cause_first(tmp_path):
    folder = output_dir(tmp_path / "one", complete=False)
    died = {"rank": 3, "host": "node1", "status": -9, "signal": 9, "phase": "step", "step": 20}
    diagnostics.write_failure(folder, Failure("died", run="run-1", hints=("oom_kill 0 -> 1",), **died))
    page = page_of(folder)
    assert page.sections()[0] == "Failure"
    assert "rank 3 on node1 was killed (SIGKILL)" in page.text and "the host ran out of memory" in page.text
    assert "20 steps are logged" in page.text


def test_how_a_run_stands(tmp_path):
    folder = output_dir(tmp_path / "one", [line(step) for step in range(1, 11)], complete=False)
    assert read_run(folder).state == "unknown"
    assert output_dir_lock.acquire_lock(folder) is None
    assert read_run(folder).state == "running" and "In progress: 10 of 20 steps" in page_of(folder).text
    assert "logged, about 5 s to go." in page_of(folder).text
    output_dir_lock.release_lock()
    assert read_run(folder).state == "unknown"
    run_json.update_run_json(
        folder, {"stopped": {"by": "SIGTERM", "step": 20}, "starts": run_json.ended(folder, "stopped by x")}
    )
    assert read_run(folder).state == "stopped" and "Stopped by SIGTERM after 20 of 20 steps" in page_of(folder).text
    run_json.update_run_json(folder, {"completed": True, "result": {"steps": 20}})
    assert read_run(folder).state == "complete"


def test_the_plan_stands_beside_what_happened(tmp_path):
    lines = [line(step, non_finite_steps=int(step > 8)) for step in range(1, 11)]
    resumed = [{"step": 5, "from": "output/checkpoint-5", "at": "", "changes": ["x"]}]
    starts = [{"began": "2026-11-25T10:00:00+0000", "from_step": 0, "ended": "2026-11-25T11:02:00+0000", "how": "done"}]
    folder = output_dir(tmp_path / "one", lines, complete=False, resumed=resumed, starts=starts)
    (folder / "non_finite_rows.jsonl").write_text("{}\n{}\n")
    found = {what: (planned, happened) for what, planned, happened in against_the_plan(read_run(folder))}
    assert found["Steps"] == ("20", "10") and found["Epochs"] == ("2", "1")
    assert found["Tokens per step"] == ("about 400", "400")
    assert found["Tokens in total"] == ("about 8,000", "about 4,000")
    assert found["Trained parameters"][0] == "250 (25.00% of the model's)"
    assert found["Non-finite steps"] == ("0", "1; 2 rows are in non_finite_rows.jsonl")
    assert found["Resumed"][1] == "from step 5, 1 changes allowed: output/checkpoint-5"
    assert found["Wall clock"][1] == "began 2026-11-25 10:00:00, done after 62 min"
    assert found["Peak memory of a rank"][1] == "3.00 GiB"


def test_several_runs_lie_over_each_other(tmp_path):
    one = output_dir(tmp_path / "a" / "run", answers=[answer("Q?", "base", "first")])
    flags = {"model_name_or_path": "models/tiny", "data_path": ["a.json"], "use_lora": True, "learning_rate": 0.5}
    two = output_dir(tmp_path / "b" / "run", [line(1)], answers=[answer("Q?", "base", "second")], arguments=flags)
    names = report.names([one, two])
    assert names == ["a/run", "b/run"]
    page = Page(render_report([read_run(*pair) for pair in zip((one, two), names, strict=True)]))
    assert [len(run["x"]["step"]) for run in page.numbers()["runs"]] == [20, 1]
    assert page.text.count("base") == 1 and "first" in page.text and "second" in page.text
    differing = page.text.partition("Differences between the runs")[2].partition("Plan and outcome")[0].split()
    assert differing == ["a/run", "b/run", "--lora_r", "4", "8", "--learning_rate", "5e-05", "0.5"]


def test_long_runs_are_thinned_and_keep_their_extremes():
    losses = [1.0] * 30_000
    losses[17_001], losses[9] = 50.0, None
    kept = thinned(losses, MAX_POINTS)
    assert len(kept) <= MAX_POINTS and {0, 17_001, 29_999} <= set(kept) and kept == sorted(kept)
    assert thinned([3.0, None, 1.0], 10) == [0, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1234, "0.123 s"), (99, "99 s"), (135, "2 min 15 s"), (3725, "62 min"), (9000, "2 h 30 min"), (4e5, "4.6 days")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_disk_that_is_almost_full_is_left_to_the_run(tmp_path, monkeypatch):
    folder = output_dir(tmp_path / "one")
    monkeypatch.setattr("finetune.report.report_page.BYTES_TO_LEAVE", 1 << 60)
    assert "no report was written: " in write_at_the_end(folder, answers=0, seconds=1.0)
    assert not (folder / "report.html").exists()


# ---- the verb


def report_of(*folders: Path, **changes) -> None:
    flags = [f"--{name}={value}" for name, value in {"no_answers": True, "port": 0, **changes}.items()]
    report.main([*map(str, folders), *flags])


def test_where_it_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (output_dir(tmp_path / name) for name in ("one", "two"))
    report_of(one)
    assert capsys.readouterr().out == f"{one}/report.html: one (complete)\n"
    report_of(one, two)
    assert capsys.readouterr().out == "report.html: one (complete), two (complete)\n"
    assert (tmp_path / "report.html").is_file() and not (two / "report.html").exists()
    report_of(one, two, html=str(tmp_path / "new" / "both.html"))
    assert (tmp_path / "new" / "both.html").is_file()


def test_no_other_file_is_replaced(tmp_path):
    one = output_dir(tmp_path / "one")
    (one / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by finetune report and is not replaced"):
        report_of(one)
    assert "no report was written: " in write_at_the_end(one, answers=0, seconds=1.0)
    assert (one / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": "x", "no_answers": True}, "not with --no_answers"),
        ({"prompts": "nowhere.txt", "no_answers": False}, "--prompts nowhere.txt: there is no such file"),
        ({"every": 0.0}, "--every 0: expected at least"),
    ],
)
def test_flags_that_cannot_be_meant(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        report_of(output_dir(tmp_path / "one"), **changes)


def test_what_was_evaluated_is_a_section_each(tmp_path):
    folder = output_dir(tmp_path / "run", lines=[line(1), line(2)])
    segments = [{"kind": "context", "text": HOSTILE, "turn": 0, "read": True},
                {"kind": "learned", "text": "我是 Nori", "turn": 1, "read": True}]  # fmt: skip
    row = {"source": "h.json", "row": 3, "id": None, "tokens": 5, "base": 2.0, "tuned": 1.25, "segments": segments}
    losses = {"base": {"loss": 2.5, "perplexity": 12.2}, "tuned": {"loss": 1.5, "perplexity": 4.48}}
    apart = {"loss": -1.0, "interval": [-1.2, -0.8], "rows_worse": 1}
    found = {
        "data": {"rows": 9, "tokens": 90, "not_measured": 0}, "non_finite": [], "verdict": "better than the base",
        "groups": [{"name": "all", "rows": 9, "tokens": 90, **losses, "difference": apart}],
        "worst": [row], "worsened": [],
    }  # fmt: skip
    write_results(folder, HELD_OUT_FILE, versioned(found))
    (folder / "forgetting.json").write_text('{"version": 1}')

    page = Page(render_report([read_run(folder)]))

    assert "Held-out conversations" in page.sections() and "better than the base" in page.text
    assert "-1.0000" in page.text and "-1.200 to -0.800" in page.text and "我是 Nori" in page.text
    assert "not as this version writes it" in page.text
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_each_start_of_a_run_is_told(tmp_path):
    folder = output_dir(tmp_path / "run", lines=[line(1)])
    first = {"began": "2026-11-30T10:00:00+0000", "ended": "2026-11-30T10:01:05+0000", "how": "stopped"}
    again = {"began": "2026-11-30T11:00:00+0000", "from_step": 1200, "restarted_after": "a lost host"}
    run_json.update_run_json(folder, {"starts": [first, {"began": 7}, {**again, "seconds_lost": 90}]})

    told = [text for quantity, _, text in against_the_plan(read_run(folder)) if quantity == "Wall clock"]

    assert told[0].startswith("began 2026-11-30 ") and told[0].endswith(f", stopped after {duration(65)}")
    assert told[1].endswith(f", from step 1,200, restarted after: a lost host ({duration(90)} lost)")
    assert len(told) == 2
