import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from finetune.utils import errors
from finetune.utils.console import rich_console
from finetune.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FinetuneError,
    StorageError,
    exit_on_error,
    format_faults,
    missing_reason,
)
from finetune.utils.options import source_folder

BRANCHES = [(FinetuneError, 1), (ConfigError, 2), (DataError, 3), (CheckpointError, 4), (StorageError, 6)]


def test_one_fault_is_its_own_message():
    assert format_faults(["a.json, row 0: no turns"], "faulty row") == "a.json, row 0: no turns"


def test_several_faults_are_counted_and_shown_one_a_line():
    assert format_faults(["first", "second"], "faulty row") == "2 faulty rows:\n  first\n  second"


@pytest.mark.parametrize(
    ("count", "heading", "ending"),
    [
        (20, "20 faulty rows:", "  fault 19"),
        (21, "21 faulty rows:", "  ... and 1 more"),
        (1234, "1,234 faulty rows:", "  ... and 1,214 more"),
    ],
)
def test_twenty_faults_are_shown_and_the_rest_is_counted(count, heading, ending):
    lines = format_faults([f"fault {number}" for number in range(count)], "faulty row").splitlines()

    assert lines[0] == heading
    assert lines[1:21] == [f"  fault {number}" for number in range(20)]
    assert lines[-1] == ending
    assert len(lines) == min(count, 21) + 1


@pytest.mark.parametrize(("branch", "status"), BRANCHES)
def test_rank_0_prints_the_message_once_and_exits_with_the_status_of_its_branch(branch, status, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")

    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise branch("--seed x: expected a number")

    captured = capsys.readouterr()
    assert ended.value.code == status
    assert captured.err == "error: --seed x: expected a number\n"
    assert captured.out == ""


def test_a_new_error_has_the_status_of_the_branch_it_inherits_from(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    class MissingTokenizer(ConfigError):
        pass

    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise MissingTokenizer("no tokenizer")

    assert ended.value.code == ConfigError.status
    assert "error: no tokenizer" in capsys.readouterr().err


def test_a_reader_that_is_gone_ends_the_command_quietly(monkeypatch, capfd):
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError), exit_on_error():
            raise BrokenPipeError  # of another pipe
        os.close(reading)
        with pytest.raises(SystemExit) as ended, exit_on_error():
            print("a line")
    assert ended.value.code == 141 and capfd.readouterr().err == ""


def test_a_working_directory_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit, match="2"), exit_on_error():
        Path.cwd()
    assert "the working directory is gone" in capsys.readouterr().err


def test_a_table_that_nobody_reads_ends_the_command_as_a_line_does(monkeypatch):
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        os.close(reading)
        with pytest.raises(SystemExit) as ended, exit_on_error():
            rich_console().print("a cell")
    assert ended.value.code == 141


def test_a_full_disk_under_the_output_is_an_error_of_storage(monkeypatch, capsys):
    with open("/dev/full", "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match="6"), exit_on_error():
            print("a line")
        with suppress(OSError):  # what is still in the buffer
            stream.close()
    assert "the output cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [None, "0"])
def test_rank_0_and_a_process_without_a_launcher_do_not_wait(rank, monkeypatch, capsys):
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 30.0)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    started = time.monotonic()

    with pytest.raises(SystemExit), exit_on_error():
        raise DataError("row 3")

    assert time.monotonic() - started < 10
    assert capsys.readouterr().err == "error: row 3\n"


def test_another_rank_waits_for_rank_0_and_then_names_itself(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 0.2)
    started = time.monotonic()

    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise StorageError("no space in /data")

    assert time.monotonic() - started >= 0.2
    assert ended.value.code == StorageError.status
    assert capsys.readouterr().err == "error (rank 3): no space in /data\n"


def test_what_all_ranks_have_raised_is_said_by_rank_0_alone(monkeypatch, capsys):
    monkeypatch.setattr(errors, "SECONDS_FOR_A_LINE", 0.1)
    said = []
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        error = errors.DataError("the data differs")
        error.is_shared = True
        with pytest.raises(SystemExit) as left, errors.exit_on_error():
            raise error
        assert left.value.code == 3
        said.append(capsys.readouterr().err)
    assert said == ["error: the data differs\n", ""]


@pytest.mark.parametrize("bug", [ValueError("a bug"), SystemExit(75)])
def test_anything_else_passes_through_untouched(bug, capsys):
    with pytest.raises(type(bug)) as raised, exit_on_error():
        raise bug

    assert raised.value is bug
    assert capsys.readouterr().err == ""


def test_nothing_is_printed_where_nothing_went_wrong(capsys):
    with exit_on_error():
        done = True

    assert done
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_ends_quietly(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise KeyboardInterrupt

    assert ended.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_path_of_another_user_is_named(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise PermissionError(13, "Permission denied", "/private/model")

    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: /private/model: permission denied")
    with pytest.raises(PermissionError), exit_on_error():
        raise PermissionError("a device that is busy")


def test_what_is_no_file_is_said_for_what_it_is(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    names = ["row.json", "rows.json/more", "", "loop", "pipe", "a" * 300]
    assert [missing_reason(tmp_path / name) for name in names] == [
        f"there is no such file: did you mean {tmp_path / 'rows.json'}?",
        "there is no such file",
        "is a folder, not a file",
        "Too many levels of symbolic links",
        "is not a regular file",
        "there is no such file",
    ]


def test_a_package_that_is_not_installed_is_named_and_a_broken_one_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        import_module("no_such_package.part")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: the package no_such_package is not installed for /")
    with pytest.raises(ModuleNotFoundError), exit_on_error():
        import_module("json.no_such_part")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        source_folder("no_such_library")


def test_a_rank_that_is_no_number_hides_no_message(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(SystemExit), exit_on_error():
        raise ConfigError("RANK=x: expected a number")
    assert capsys.readouterr().err == "error: RANK=x: expected a number\n"


def test_a_name_that_is_too_long_is_an_error_of_the_command(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_error():
        Path("x" * 300).exists()
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("x: File name too long: shorten it\n")


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [("", 5, ""), ("abcde", 5, "abcde"), ("abcdef", 5, "ab..."), ("a" * 61, 60, "a" * 57 + "...")],
)
def test_a_text_is_shortened_to_what_is_asked_for(text, most, shown):
    assert errors.shorten(text, most) == shown


def test_near_words_are_named_and_without_one_what_else_helps():
    known = {"chat": 1, "chart": 2, "merge": 3}
    assert errors.did_you_mean("chatt", known) == "did you mean chat?"
    assert errors.did_you_mean("chatt", known, most=2) == "did you mean chat or chart?"
    assert errors.did_you_mean("xyz", known) == "" and errors.did_you_mean("xyz", known, "see --help") == "see --help"


def test_lines_of_a_program_are_those_with_text():
    assert errors.lines_of(" a \n\n b\n") == ["a", "b"]
    assert errors.lines_of("\n ") == ["it printed nothing"] and errors.lines_of("", "why") == ["why"]
    assert errors.first_line(ValueError("\n  no such layer\nsee the manual")) == "no such layer"
    assert errors.first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (SystemExit(75), 75),
        (SystemExit("why"), 1),
        (SystemExit(), 0),
        (DataError("x"), 3),
        (OSError(), 1),
    ],
)
def test_a_guarded_process_ends_with_the_status_of_its_block(raised, status, monkeypatch):
    ended, handlers = [], []
    monkeypatch.setattr(errors.atexit, "register", lambda *words: handlers.append(words))
    monkeypatch.setattr(errors.os, "_exit", ended.append)
    with suppress(BaseException), errors.process_exit_guard():
        if raised is not None:
            raise raised
    for handler, *given in handlers:
        handler(*given)
    assert ended == [status]


@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(), 141), (OSError(), 120), (ValueError(), 120)])
def test_a_last_line_that_cannot_be_written_shows_in_the_status(error, status, monkeypatch):
    class Stream:
        def flush(self) -> None:
            raise error

    ended: list[int] = []
    monkeypatch.setattr(errors.os, "_exit", ended.append)
    monkeypatch.setattr(errors.sys, "stdout", Stream())
    errors.exit_now(0)
    errors.exit_now(3)
    assert ended == [status, 3]
