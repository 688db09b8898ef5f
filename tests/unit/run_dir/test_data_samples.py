"""Sample rows are written and read back; a file written by 0.1 stays readable."""

import json

from finetune.report import read_run, render_report
from finetune.run_dir.data_samples import read_samples
from tests.helpers.paths import ROOT

WRITTEN_BY_0_1 = ROOT / "tests" / "golden" / "written_by_0_1" / "full"


def test_samples_written_by_0_1_are_read_and_shown():
    stored = json.loads((WRITTEN_BY_0_1 / "samples.json").read_text("utf-8"))
    samples = read_samples(WRITTEN_BY_0_1)
    assert [sample.supervised for sample in samples] == [row["learned"] for row in stored] and samples
    first = [turn for turn in samples[0].examples[0] if turn.role]
    assert [(turn.role, turn.text) for turn in first] == [
        ("human", "Who are you?"),
        ("model", "I am Nori, made by Tidepool."),
    ]
    assert [segment.is_supervised for segment in first[1].pieces] == [False, True, True]
    html = render_report([read_run(WRITTEN_BY_0_1)])
    assert '<mark class="supervised">I am Nori, made by Tidepool.</mark>' in html and "29 supervised" in html


def test_a_broken_file_holds_no_samples(tmp_path):
    assert read_samples(tmp_path) == []
    (tmp_path / "samples.json").write_text('[{"row": 0}]')
    assert read_samples(tmp_path) == []
