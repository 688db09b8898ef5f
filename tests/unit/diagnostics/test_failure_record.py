"""The record of a failure, through JSON and back."""

import json
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.diagnostics import Failure, format_failure_page, likely_cause
from tests.helpers.failure_samples import FAILURES, raised

KEYS = st.sampled_from([field.name for field in fields(Failure)] + ["likely_cause", "new"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers() | st.text()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


@given(FAILURES)
@settings(max_examples=300, deadline=None)
def test_a_record_survives_standard_json(failure):
    text = json.dumps(failure.to_json(), allow_nan=False, ensure_ascii=False)
    restored = Failure.from_json(json.loads(text.encode("utf-8")))
    assert restored == failure and likely_cause(restored) == likely_cause(failure)


@given(st.dictionaries(KEYS, VALUES))
@settings(max_examples=300, deadline=None)
def test_any_values_are_read_or_refused(values):
    try:
        failure = Failure.from_json(values)
    except ValueError:
        assert not isinstance(values.get("kind"), str)
    else:
        assert failure.kind == values["kind"].encode("utf-8", "backslashreplace").decode()
        json.dumps(failure.to_json(), allow_nan=False)
        assert format_failure_page(failure)


def test_unknown_keys_and_values_of_another_type_are_left_out():
    failure = Failure.from_json({"kind": "died", "rank": 3, "step": "7", "ranks": [1, "2"], "colour": "red"})
    assert failure == Failure("died", rank=3)


@pytest.mark.parametrize("values", [{"rank": 3}, {"kind": 3}, [], None])
def test_values_without_a_kind_are_refused(values):
    with pytest.raises(ValueError, match='"kind"'):
        Failure.from_json(values)


def test_a_record_of_version_0_1_is_read():
    old = {
        "kind": "missing", "error": "2 of 4 ranks of node1 have not arrived within 60 s", "run": "r1",
        "when": "2026-11-24T10:00:01.000+08:00", "rank": None, "host": None, "ranks": [2, 3], "hosts": ["node1"],
        "status": 1, "signal": None, "phase": "meeting", "step": None, "seconds": 60.0, "traceback": "", "hints": [],
        "checkpoint": "", "also": [],
        "likely_cause": {"title": "some ranks never arrived", "why": "Their hosts did not start them.", "do": "..."},
    }  # fmt: skip
    failure = Failure.from_json(old)
    assert (failure.ranks, failure.hosts, failure.phase) == ((2, 3), ("node1",), "rendezvous")
    assert likely_cause(failure).code == "ranks-missing"


def test_long_texts_lose_the_end_of_the_message_and_the_start_of_the_traceback():
    numbers = "\n".join(str(number) for number in range(999))
    failure = raised(numbers, traceback=numbers)
    assert failure.error.splitlines() == [str(number) for number in range(40)]
    assert failure.traceback.splitlines() == [str(number) for number in range(939, 999)]


def test_the_prefix_of_torch_is_removed():
    assert raised("[rank1]: ValueError: x\n[rank1]:   y").error == "ValueError: x\n  y"


@pytest.mark.parametrize(
    ("failure", "signal"),
    [
        (Failure("died", signal=9), 9), (Failure("died", status=-9), 9), (Failure("died", status=137), 9),
        (Failure("launcher", status=247), 9), (Failure("died", status=1), None),
        (Failure("exception", status=137), None),
    ],
)  # fmt: skip
def test_the_signal_is_read_from_the_exit_status(failure, signal):
    assert failure.killed_by() == signal
