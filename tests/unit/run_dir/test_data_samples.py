"""Sample rows are written and read back; a file written by 0.1 stays readable."""

import json

from finetune.chat_templates import Example, RenderedConversation
from finetune.chat_templates.example import TurnSpan
from finetune.chat_templates.text_segments import Segment
from finetune.report import read_run, render_report
from finetune.run_dir.data_samples import MAX_CHARACTERS, read_samples, write_samples
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


def test_a_long_row_is_kept_up_to_its_first_characters_and_no_row_leaves_no_file(tmp_path):
    spans = tuple(TurnSpan(turn, role, turn, turn + 1) for turn, role in enumerate(("human", "model", "human")))
    example = Example([7, 8, 9], [-100, 8, -100], 3, "a.json", turn_spans=spans)
    texts = ["q", "a" * MAX_CHARACTERS, "more"]

    def in_segments(example: Example) -> list[Segment]:
        return [Segment("context", text, turn, True) for turn, text in enumerate(texts)]

    write_samples(tmp_path, [RenderedConversation(3, ["x"], "kept", (example,), source="a.json")], in_segments)

    (sample,) = read_samples(tmp_path)
    assert [[turn.text for turn in one] for one in sample.examples] == [["q", "a" * (MAX_CHARACTERS - 1)]]
    assert (sample.unshown, list(sample.prompt), sample.id) == (5, [], '["x"]')
    write_samples(tmp_path, [], in_segments)
    assert list(tmp_path.iterdir()) == []
