"""The table of known causes: each entry is well formed and is found for messages that really occur."""

import re
from dataclasses import fields, replace

import pytest
import yaml

from finetune.config import DoctorArguments, build_parser
from finetune.config.deepspeed_config import shipped_names
from finetune.diagnostics import KINDS, PHASES, Failure, format_failure_page, likely_cause, load_known_causes
from finetune.diagnostics.causes import KNOWN_CAUSES_FILE
from finetune.launcher.deepspeed_args import LauncherArgs
from tests.helpers.failure_samples import SAMPLES, raised

FLAGS_OF_OTHER_TOOLS = {"shm-size", "ipc", "gpus", "pids-limit", "mem", "no-build-isolation"}  # docker, Slurm, pip
TABLE = yaml.safe_load(KNOWN_CAUSES_FILE.read_text(encoding="utf-8"))
ENTRIES = pytest.mark.parametrize("entry", TABLE["causes"], ids=lambda entry: entry["code"])
CONDITIONS = {"patterns", "possible_patterns", "unless", "stack", "kinds", "phases", "signals"}
CODES_AND_FAILURES = [(code, failure) for code, failures in SAMPLES.items() for failure in failures]
EACH_SAMPLE = pytest.mark.parametrize(("code", "failure"), CODES_AND_FAILURES)


def code_of(failure: Failure) -> str | None:
    cause = likely_cause(failure)
    return cause and cause.code


@EACH_SAMPLE
def test_a_real_message_finds_its_cause(code, failure):
    """An entry that an earlier one hides, or a pattern that hides a later sample, fails here."""
    assert code_of(failure) == code


@pytest.mark.parametrize(
    ("code", "failure"),
    [(code, failure) for code, failure in CODES_AND_FAILURES if failure.kind == "exception" and not failure.traceback],
)
def test_a_message_in_the_traceback_alone_finds_it_too(code, failure):
    trace = f'Traceback (most recent call last):\n  File "/x/y.py", line 3, in z\n    w()\n{failure.error}'
    assert code_of(replace(failure, error="", traceback=trace)) == code


def test_every_code_is_unique_and_has_a_sample():
    codes = [entry["code"] for entry in TABLE["causes"]]
    assert len(codes) == len(set(codes)) and set(codes) == set(SAMPLES)
    assert len({entry["title"] for entry in TABLE["causes"]}) == len(codes)


@ENTRIES
def test_an_entry_has_all_texts_and_valid_conditions(entry):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["code"])
    assert all(entry[name].strip() for name in ("title", "explanation", "remedy"))
    conditions = entry.keys() - {"code", "title", "explanation", "remedy"}
    assert conditions and conditions <= CONDITIONS
    for pattern in [
        pattern for key in ("patterns", "possible_patterns", "unless", "stack") for pattern in entry.get(key, ())
    ]:
        assert re.compile(pattern).search("") is None, "a pattern that fits every text hides all later entries"
    assert set(entry.get("kinds", ())) <= set(KINDS) and set(entry.get("phases", ())) <= {"", *PHASES}


@pytest.mark.parametrize("known", load_known_causes(), ids=lambda known: known.cause.code)
def test_the_texts_are_sentences_and_name_flags_and_configs_that_exist(known):
    others = {field.name for arguments in (DoctorArguments, LauncherArgs) for field in fields(arguments)}
    flags = {*build_parser().types, *others, *FLAGS_OF_OTHER_TOOLS}
    assert not known.cause.title.endswith(".")
    for text in (known.cause.explanation, known.cause.remedy):
        assert set(re.findall(r"--([a-z][a-z0-9_-]*)", text)) <= flags
        assert set(re.findall(r"\bzero(?:pp|\d\w*)", text)) <= set(shipped_names())
        assert "error: " not in text and text.endswith(".") and "  " not in text and "$" not in text


def test_every_phrase_is_used():
    texts = " ".join(entry["explanation"] + entry["remedy"] for entry in TABLE["causes"])
    assert set(re.findall(r"\$(\w+)", texts)) == set(TABLE["phrases"])


@EACH_SAMPLE
def test_the_page_shows_cause_and_remedy_in_full(code, failure):
    cause = likely_cause(failure)
    for width in (80, 100, 160):
        page = " ".join(format_failure_page(failure, width=width).split())
        assert [text for text in (cause.title, cause.explanation, cause.remedy) if text not in page] == []


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (raised("ValueError: the moon is full"), None),
        # errors of the data quote rows
        (raised("a.json, row 3: broken pipe, disk quota exceeded", "error", status=3), None),
        (raised("disk quota exceeded", "error", status=6), "disk-full"),
        # frames and source lines are no messages
        (raised("ValueError: x", traceback='  File "x.py", line 1\n    f("CUDA_HOME", "no space left")'), None),
        # a message counts more than the traceback, what was observed more than the signal
        (raised("MemoryError", traceback="OSError: [Errno 98] Address already in use"), "host-out-of-memory"),
        (Failure("died", signal=9, phase="model", hints=["oom_kill 0 -> 1"]), "host-out-of-memory-while-loading"),
        # a counter that is still 0 says nothing
        (Failure("died", signal=9, hints=["oom_kill 0"]), "killed"),
    ],
)  # fmt: skip
def test_what_counts_as_a_message(failure, code):
    assert code_of(failure) == code
