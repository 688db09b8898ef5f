"""The page that a user reads after a failure: at most one page, whatever the failure contains."""

import re
import traceback
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.diagnostics import Failure, format_failure_page, likely_cause, summarize_failure
from tests.helpers.failure_samples import FAILURES, died, raised


def test_the_page_of_a_rank_that_was_killed():
    later = [raised("RuntimeError: Connection reset by peer\nmore", rank=rank, host="node0") for rank in range(5)]
    failure = died(
        9, rank=3, host="node1", phase="step", step=1200, hints=["oom_kill 0 -> 1"],
        checkpoint="output/checkpoint-1000", also=list(map(summarize_failure, later)),
    )  # fmt: skip
    lines = format_failure_page(failure, record="output/failure.json").splitlines()
    assert "rank 3 on node1" in lines[0] and "SIGKILL" in lines[0] and "1,200" in lines[0]
    assert lines[1] == "Where: rank 3 on node1, in step 1,200 (oom_kill 0 -> 1)"
    assert lines[2].startswith(f"Likely cause: {likely_cause(failure).title}. ")
    assert any(line.startswith("What to do: ") for line in lines)
    (start,) = (index for index, line in enumerate(lines) if line.startswith("5 more failed"))
    assert lines[start + 1 : start + 4] == [
        f"  rank {rank} on node0: RuntimeError: Connection reset by peer" for rank in range(3)
    ]
    assert lines[-2] == "Record: output/failure.json"
    assert "output/checkpoint-1000" in lines[-1] and "--resume_from_checkpoint auto" in lines[-1]


@pytest.mark.parametrize(
    ("failure", "parts"),
    [
        (raised("x", "error", rank=0, phase="data"), ("rank 0 ", "error", "data")),
        (died(11, rank=1, phase="save", step=20), ("rank 1 crashed", "SIGSEGV", "save, step 20")),
        (Failure("died", rank=1, status=0, phase="end"), ("rank 1 ", "status 0", "at the end")),
        (Failure("stuck", rank=2, host="b", seconds=301.4, step=7, phase="step"), ("rank 2 on b", "301 s", "step 7")),
        (
            Failure("missing", ranks=[4, 6, 5, 9], hosts=["b", "c"], phase="rendezvous", seconds=60),
            ("ranks 4-6, 9 on b, c", "rendezvous", "60 s"),
        ),
        (Failure("missing", ranks=range(0, 99, 2)), ("ranks 0, 2, 4, 6, 8, 10, 12, 14 and 42 more",)),
        (Failure("lost", host="b", rank=1, phase="model"), ("host b", "reached", "model")),
        (Failure("launcher", status=-9), ("the launcher was killed", "SIGKILL")),
        (Failure("launcher", status=3, host="a"), ("the launcher on a ", "status 3")),
        (Failure("later kind"), ("a rank failed",)),
    ],
)  # fmt: skip
def test_the_headline_says_who_what_and_where(failure, parts):
    headline = format_failure_page(failure, width=160).splitlines()[0]
    assert [part for part in ("The run failed: ", *parts) if part not in headline] == []


@given(FAILURES, st.integers(20, 200))
@settings(max_examples=300, deadline=None)
def test_any_failure_fits_on_one_page(failure, width):
    check_page(format_failure_page(failure, width=width, record="output/failure.json"), width)


def check_page(page: str, width: int) -> None:
    assert len(page.splitlines()) == page.count("\n") + 1 <= 25
    for line in page.splitlines():
        assert sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line) <= max(width, 60)
    assert "error: " not in page and "Traceback (most recent" not in page
    assert not re.search(r'^\s*File "', page, re.MULTILINE)
    assert all(letter == "\n" or letter.isprintable() for letter in page)


@pytest.mark.parametrize("width", [40, 80, 100])
def test_very_long_errors_stay_on_one_page(width):
    try:
        raise RuntimeError(
            f"error: {'a long word ' * 5000}{chr(10)}{'error: ' * 900}{'x' * 9000}\x1b[31mred\x1b[0m\r\t\0"
        )
    except RuntimeError as error:
        trace = traceback.format_exc()
        failure = Failure(
            "exception", f"{trace}\n{error}", rank=1, host="h" * 300, traceback=trace, step=5, seconds=7.0,
            hints=["CUDA error: " + "y" * 999] * 9, also=["error: rank 1: " + "z" * 999] * 900,
            checkpoint="/" + "c" * 999,
        )  # fmt: skip
    check_page(format_failure_page(failure, width=width, record="/" + "r" * 999), width)


def test_the_words_of_a_cuda_error_are_kept():
    assert "CUDA error - device-side assert triggered" in format_failure_page(
        raised("RuntimeError: CUDA error: device-side assert triggered")
    )


def test_chinese_text_is_kept_and_counts_two_columns():
    text = "第三行的数据有问题：" * 12
    page = format_failure_page(raised(f"ValueError: {text}"), width=80)
    assert text in re.sub(r"\n\s+", "", page)
    check_page(page, 80)


def test_a_list_of_faults_keeps_its_lines_and_is_marked_as_cut():
    faults = "20 faulty rows:\n" + "\n".join(f"  a.json, row {row}: no turns" for row in range(20))
    lines = format_failure_page(raised(faults, "error", status=3)).splitlines()
    assert lines[1:7] == ["  20 faulty rows:", *(f"    a.json, row {row}: no turns" for row in range(4)), "  ..."]


def test_only_the_headline_is_coloured():
    failure = died(9, rank=3, phase="step", step=12, error="x\ny")
    plain = format_failure_page(failure).splitlines()
    coloured = format_failure_page(failure, colour=True).splitlines()
    assert coloured[0] == f"\033[1;31m{plain[0]}\033[0m" and coloured[1:] == plain[1:]
