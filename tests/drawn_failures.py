"""Failures as hypothesis draws them, and one at a moment."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from finetune.diagnostics import KINDS, PHASES, Failure

PLAIN = st.text(st.characters(codec="utf-8"), max_size=200)


FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(KINDS),
    error=st.text(max_size=300),
    run=PLAIN,
    when=st.datetimes().map(lambda when: when.isoformat() + "+08:00") | PLAIN,
    rank=st.none() | st.integers(0, 4096),
    host=st.none() | st.text(max_size=20),
    ranks=st.lists(st.integers(0, 4096), max_size=20),
    hosts=st.lists(st.text(max_size=20), max_size=5),
    status=st.integers(-64, 255),
    signal=st.none() | st.integers(-1, 70),
    phase=st.sampled_from(["", *PHASES]),
    step=st.none() | st.integers(0),
    seconds=st.none() | st.floats(),
    traceback=st.text(max_size=300),
    hints=st.lists(st.text(max_size=100), max_size=4),
    checkpoint=PLAIN,
    also=st.lists(st.text(max_size=100), max_size=10),
)


def at(second: float, failure: Failure, rank: int | None = None) -> Failure:
    return replace(failure, when=f"2026-11-24T10:00:{second:06.3f}+08:00", rank=rank)
