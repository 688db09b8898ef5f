"""Rows that --skip_rows names: read in both forms, found in the data, or each named that is not there."""

import json

import pytest

from finetune.dataset import skip_rows
from finetune.utils.errors import ConfigError

DATA = {"a/rows.json": 20, "owner/name:train": 3}


def test_rows_to_skip_are_read_in_both_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "skip"
    record = json.dumps({"source": "a/rows.json", "row": 3, "id": "x", "text": "é", "loss": None})
    path.write_text(f"# a remark\n\n{record}\n{record}\na/rows.json:17\n{tmp_path}/a/rows.json:0\nowner/name:train:2\n")
    rows = skip_rows.rows_to_skip([str(path)], DATA)
    assert rows == (("a/rows.json", 0), ("a/rows.json", 3), ("a/rows.json", 17), ("owner/name:train", 2))
    assert skip_rows.rows_to_skip([], DATA) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a/rows.json:20", "a/rows.json has rows 0 to 19"),
        ("a/rows.json:-1", "a/rows.json:-1"),
        ("b.json:1", "b.json is not among the data"),
        ("a/rows.json", "line 1: a/rows.json: expected path/to/data.json:17"),
        ('{"source": "a/rows.json"}', "expected path/to/data.json:17"),
        ('{"source": 7, "row": 1}', "expected path/to/data.json:17"),
        ('{"source": "a/rows.json", "row": 1.5}', "expected path/to/data.json:17"),
        ("{broken", "expected path/to/data.json:17"),
    ],
)
def test_a_row_that_the_data_does_not_have_is_named(tmp_path, text, says):
    (tmp_path / "skip").write_text(text + "\n")
    with pytest.raises(ConfigError) as raised:
        skip_rows.rows_to_skip([str(tmp_path / "skip")], DATA)
    assert says in str(raised.value) and "--skip_rows" in str(raised.value)


def test_a_file_of_rows_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--skip_rows .*nowhere: there is no such file"):
        skip_rows.rows_to_skip([str(tmp_path / "nowhere")], DATA)


def test_all_windows_of_a_row_are_left_out():
    from datasets import Dataset

    examples = Dataset.from_dict({"source": ["a", "a", "b", "a"], "row": [0, 1, 1, 1], "id": ["0", "1", '"x"', "1"]})
    assert skip_rows.skip_mask(examples, [("a", 1)]).tolist() == [False, True, False, True]
    assert not skip_rows.skip_mask(examples, []).any()
