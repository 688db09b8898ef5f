"""The page of a run that failed: one page, whatever it is told."""

from __future__ import annotations

import re
import traceback

import pytest
from drawn_failures import FAILURES
from failure_texts import died, said
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.diagnostics import Failure, failure_page, one_line

# The page


def test_the_page_of_a_rank_that_was_killed():
    others = [said("RuntimeError: Connection reset by peer\nmore", rank=rank, host="node0") for rank in range(5)]
    failure = died(
        9, rank=3, host="node1", phase="step", step=1200, hints=["oom_kill 0 -> 1"],
        checkpoint="output/checkpoint-1000", also=list(map(one_line, others)),
    )  # fmt: skip
    lines = failure_page(failure, record="output/failure.json").splitlines()
    assert lines[0] == "The run failed: rank 3 on node1 was killed (SIGKILL) in step 1,200"
    assert lines[1] == "Where: rank 3 on node1, in step 1,200 (oom_kill 0 -> 1)"
    assert lines[2].startswith("Likely cause: the host ran out of memory. ")
    assert any(line.startswith("What to do: ") for line in lines)
    others = lines.index("5 more failed later, mostly because of this; the first 3:")
    assert lines[others + 1 : others + 4] == [
        f"  rank {rank} on node0: RuntimeError: Connection reset by peer" for rank in range(3)
    ]
    assert lines[-2:] == [
        "Record: output/failure.json",
        "Go on from: output/checkpoint-1000 (--resume_from_checkpoint auto)",
    ]


@pytest.mark.parametrize(
    ("failure", "headline"),
    [
        (
            said("x", "error", rank=0, phase="data"),
            "The run failed: rank 0 stopped with an error while data was prepared",
        ),
        (died(11, rank=1, phase="save", step=20), "The run failed: rank 1 crashed (SIGSEGV) in a save, step 20"),
        (
            Failure("died", rank=1, status=0, phase="end"),
            "The run failed: rank 1 ended with status 0 and without a word at the end",
        ),
        (
            Failure("stuck", rank=2, host="b", seconds=301.4, step=7, phase="step"),
            "The run failed: rank 2 on b made no progress for 301 s in step 7",
        ),
        (
            Failure("missing", ranks=[4, 6, 5, 9], hosts=["b", "c"], phase="meeting", seconds=60),
            "The run failed: ranks 4-6, 9 on b, c did not come to where the ranks meet within 60 s",
        ),
        (
            Failure("lost", host="b", phase="model"),
            "The run failed: host b can no longer be reached while the model was loaded",
        ),
        (Failure("launcher", status=-9), "The run failed: the launcher was killed (SIGKILL)"),
        (Failure("launcher", status=3, host="a"), "The run failed: the launcher on a ended with status 3"),
        (Failure("stopped", status=75, step=3), "The run was stopped: it was asked to stop in step 3"),
        (Failure("later kind"), "The run failed: a rank failed"),
    ],
)  # fmt: skip
def test_headlines(failure, headline):
    assert " ".join(failure_page(failure, width=160).splitlines()[0].split()) == headline


@given(FAILURES, st.integers(20, 200))
@settings(max_examples=300, deadline=None)
def test_a_page_is_one_page(failure, width):
    check_page(failure_page(failure, width=width, record="output/failure.json"), width)


def check_page(shown: str, width: int) -> None:
    import unicodedata

    assert len(shown.splitlines()) == shown.count("\n") + 1 <= 25
    for line in shown.splitlines():
        assert sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in line) <= max(width, 60)
    assert "error: " not in shown and "Traceback (most recent" not in shown
    assert not re.search(r'^\s*File "', shown, re.MULTILINE)
    assert shown.isprintable() or all(one == "\n" or one.isprintable() for one in shown)


@pytest.mark.parametrize("width", [40, 80, 100])
def test_very_long_errors_stay_one_page(width):
    try:
        raise RuntimeError(
            "error: " + "a long word " * 5000 + "\nerror: " * 900 + "x" * 9000 + "\x1b[31mred\x1b[0m\r\t\0"
        )
    except RuntimeError as error:
        trace = traceback.format_exc()
        failure = Failure(
            "exception", f"{trace}\n{error}", rank=1, host="h" * 300, traceback=trace, step=5, seconds=7.0,
            hints=["CUDA error: " + "y" * 999] * 9, also=["error: rank 1: " + "z" * 999] * 900,
            checkpoint="/" + "c" * 999,
        )  # fmt: skip
    check_page(failure_page(failure, width=width, record="/" + "r" * 999), width)


def test_an_error_of_cuda_is_still_read():
    shown = failure_page(said("RuntimeError: CUDA error: device-side assert triggered"))
    assert "RuntimeError: CUDA error - device-side assert triggered" in shown
    assert "Likely cause: a token id lies outside the embeddings." in shown


def test_chinese_stays_whole_and_counts_two_columns():
    text = "第三行的数据有问题：" * 12
    shown = failure_page(said(f"ValueError: {text}"), width=80)
    assert text in re.sub(r"\n\s+", "", shown)
    check_page(shown, 80)


def test_a_list_of_faults_keeps_its_lines_and_says_that_there_are_more():
    faults = "20 faulty rows:\n" + "\n".join(f"  a.json, row {n}: no turns" for n in range(20))
    lines = failure_page(said(faults, "error", status=3)).splitlines()
    assert lines[1:7] == ["  20 faulty rows:", *(f"    a.json, row {n}: no turns" for n in range(4)), "  ..."]


def test_colour_is_for_the_headline_alone():
    failure = died(9, rank=3, phase="step", step=12, error="x\ny")
    plain, coloured = failure_page(failure).splitlines(), failure_page(failure, colour=True).splitlines()
    assert coloured[0] == f"\033[1;31m{plain[0]}\033[0m"
    assert coloured[1:] == plain[1:]
