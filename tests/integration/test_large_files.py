"""Files far larger than what reading them may take of memory; each in a process of its own, which measures itself.

`pytest -m faults -s tests/integration/test_large_files.py` prints the figures of the documentation.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.faults

MIB = 1 << 20
# 28 MiB are an interpreter with the reader; a row's two digests take 110 bytes, a growing table up to twice that.
READER_MIB, BYTES_A_ROW = 64, 220
# Beyond the libraries and the tokenizer, in each process.
PREPARATION_MIB = 96
SECONDS_TO_THE_FIRST_ROW, LEAST_MIB_A_SECOND = 3.0, 10
WORDS = "some words that are said again and again, 再说一遍。 "
MEASURE = """
import json, sys, time
def peak_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
"""
READ = (
    MEASURE
    + """
from finetune.conversation import Conversation
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
begin, first, rows, good = time.monotonic(), None, 0, 0
for one in ConversationReader(find_sources([sys.argv[1]])):
    first = first or time.monotonic() - begin
    rows += 1
    good += isinstance(one, Conversation)
print(json.dumps({"peak": peak_mib(), "first": first, "seconds": time.monotonic() - begin, "rows": rows, "good": good}))
"""
)
PREPARE = MEASURE + """
import resource
from finetune.config import DataArguments, ModelArguments
from finetune.training.data_setup import load_chat_format, prepare_run_data
model = ModelArguments(sys.argv[2])
data = DataArguments([sys.argv[1]], data_cache_dir=sys.argv[3], bad_rows="drop", preprocessing_num_workers=2)
load_chat_format(model, data)
before, begin = peak_mib(), time.monotonic()
summary = prepare_run_data(model, data)[2].summary
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"before": before, "peak": peak_mib(), "child": child, "seconds": time.monotonic() - begin,
                  "rows": summary.rows, "bad": summary.bad, "kept": summary.kept + summary.cut}))
"""  # fmt: skip


@contextmanager
def large_file(path: Path, form: str, mib: int, *, characters: int, every: int = 1) -> Iterator[tuple[Path, int]]:
    """A file of so many MiB, and its number of rows; of each `every` rows one has a model turn. Removed at the end."""
    free = shutil.disk_usage(path.parent).free
    assert free > (mib + 1024) * MIB, f"{path.parent}: this test needs {mib + 1024} MiB, {free // MIB} are free"
    said, rows, size = (WORDS * (characters // len(WORDS) + 1))[:characters], 0, 0
    try:
        with open(path, "wb", buffering=MIB) as file:
            while size < mib * MIB:
                speaker = "gpt" if rows % every == 0 else "system"
                row = f'{{"conversations": [{{"from": "human", "value": "{rows} {said}"}}, ' + (
                    f'{{"from": "{speaker}", "value": "{said}"}}]}}'
                )
                before = ("[" if not rows else ",\n") if form == "array" else ("" if not rows else "\n")
                size += file.write((before + row).encode())
                rows += 1
            file.write(b"]" if form == "array" else b"\n")
        yield path, rows
    finally:
        path.unlink(missing_ok=True)


def measured(code: str, *arguments: Path | str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.parametrize(
    ("form", "mib", "characters"),
    [("lines", 2048, 4_000), ("array", 512, 4_000), ("array", 512, 400)],
    ids=["2-GiB-lines", "array", "array-of-short-rows"],
)
def test_a_file_larger_than_memory_may_be_is_streamed(form, mib, characters, tmp_path):
    with large_file(tmp_path / "a.json", form, mib, characters=characters) as (path, rows):
        found = measured(READ, path)

    assert found["rows"] == found["good"] == rows > 50_000
    assert found["peak"] < READER_MIB + rows * BYTES_A_ROW / MIB
    assert found["first"] < SECONDS_TO_THE_FIRST_ROW
    assert mib / found["seconds"] > LEAST_MIB_A_SECOND


def test_preparing_takes_the_memory_of_a_few_batches_not_of_the_file(pretrained, tmp_path):
    """Three rows of four are faulty, so that the time goes into the file and not into its tokens."""
    with large_file(tmp_path / "a.json", "lines", 200, characters=4_000, every=4) as (path, rows):
        found = measured(PREPARE, path, pretrained, tmp_path / "cache")

    assert (found["rows"], found["kept"], found["bad"]) == (rows, -(-rows // 4), rows - -(-rows // 4))
    assert max(found["peak"], found["child"]) < found["before"] + PREPARATION_MIB
