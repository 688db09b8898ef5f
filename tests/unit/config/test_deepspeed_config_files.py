"""Finding a DeepSpeed config by path or name, and reading it strictly."""

import json
from pathlib import Path

import pytest

from finetune.config.deepspeed_config import find_config, load_config, shipped_names
from finetune.utils.errors import ConfigError
from tests.helpers.paths import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- finding


def test_every_shipped_config_is_found_by_its_name():
    assert shipped_names() == SHIPPED
    assert {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme", "zeropp"} <= set(SHIPPED)
    for name in SHIPPED:
        assert find_config(name) == ROOT / "ds_configs" / f"{name}.json"
        assert find_config(f"{name}.json") == ROOT / "ds_configs" / f"{name}.json"


def test_a_path_comes_before_a_shipped_name(tmp_path, monkeypatch):
    written(tmp_path / "zero3.json", "{}")
    monkeypatch.chdir(tmp_path)

    assert find_config("zero3.json").resolve() == tmp_path / "zero3.json"
    assert find_config(str(tmp_path / "zero3.json")) == tmp_path / "zero3.json"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("zero33", "did you mean zero3?"), ("here/zeropp_.json", "did you mean zeropp?"), ("qqq", "no such file; the")],
)
def test_a_missing_config_names_the_closest_and_all_that_are_shipped(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as raised:
        find_config(name)

    assert str(raised.value).startswith(f"--deepspeed {name}: ")
    assert hint in str(raised.value)
    assert ", ".join(SHIPPED) in str(raised.value)


def test_a_config_written_on_the_command_line_is_no_file():
    inline = json.dumps({"zero_optimization": {"stage": 3, "allgather_bucket_size": 500_000_000}, "notes": "x" * 300})

    with pytest.raises(ConfigError, match="no such file"):
        find_config(inline)


def test_the_config_that_the_published_command_names_is_zero3():
    assert (ROOT / "finetune/ds_config.json").read_bytes() == (ROOT / "ds_configs/zero3.json").read_bytes()


# ---- reading


def test_a_byte_order_mark_is_no_part_of_the_config(tmp_path):
    path = written(tmp_path / "a.json", b'\xef\xbb\xbf{"zero_optimization": {"stage": 2}}')

    assert load_config(path) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{\n  "bf16": {,}\n}', ", line 2, column 12: not JSON: "),
        ("", ", line 1, column 1: not JSON: it is empty"),
        ("{} {}", ", line 1, column 4: not JSON: "),
        ('{"bf16": {"enabled": true, "enabled": false}}', ': the key "enabled" is given twice'),
        ('{"gradient_clipping": NaN}', ": NaN is not JSON"),
        ('{"gradient_clipping": -Infinity}', ": -Infinity is not JSON"),
        ('{"fp16": {},}', ", line 1, column 13: not JSON: a comma before the closing bracket, near "),
        ("{'fp16': {}}", ", line 1, column 2: not JSON: a single quote, near "),
        ('{"fp16": {} // off\n}', ", line 1, column 13: not JSON: a comment, near "),
        ("[1]", ": expected a JSON object, found an array"),
        ("null", ": expected a JSON object, found null"),
        ('"zero3"', ": expected a JSON object, found a string"),
        ("3", ": expected a JSON object, found a number"),
        ("true", ": expected a JSON object, found a boolean"),
        (b'{"a": "\xe9"}', ": not UTF-8 at byte 7"),
        ('{"a":' * 100_000, ""),
        ('{"a": ' + "1" * 5_000 + "}", ""),
    ],
    ids=[
        "comma", "empty", "two-values", "duplicate", "NaN", "Infinity", "last-comma", "quotes",
        "comment", "array", "null", "string", "number", "boolean", "latin-1", "too-deep", "too-many-digits",
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused_with_its_place(content, said, tmp_path):
    path = written(tmp_path / "a.json", content)

    with pytest.raises(ConfigError) as raised:
        load_config(path)

    assert str(raised.value).startswith(f"{path}{said}")


def test_a_folder_cannot_be_read_as_a_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
