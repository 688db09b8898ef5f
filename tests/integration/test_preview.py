"""`finetune preview` in a pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows


@pytest.fixture(scope="module")
def tokenizer_folder(golden_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    golden_tokenizer.save_pretrained(folder)
    return folder


def numbered(count: int, text: str = "Ok"):
    return [[("human", f"Number {number}"), ("model", text)] for number in range(count)]


def test_a_reader_that_has_seen_enough(tokenizer_folder, tmp_path):
    write_rows(tmp_path / "rows.json", numbered(3000, "A long answer. " * 5))
    command = [sys.executable, "-m", "finetune", "preview", "--model_name_or_path", str(tokenizer_folder)]
    command += ["--data_path", str(tmp_path / "rows.json"), "--chat_template", "lingowhale", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert json.loads(running.stdout.readline())["row"] == 0
        running.stdout.close()
        assert running.wait(60) == 141
        assert "Traceback" not in running.stderr.read()
