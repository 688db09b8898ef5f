"""Whether a run that ended is started again, and on which hosts."""

import json

import pytest

from finetune.diagnostics import Failure
from finetune.launcher import parse_launcher_args, resolve_resources, restarts
from finetune.run_dir import run_json
from finetune.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("private_files")


@pytest.fixture
def resources(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\nsmall slots=1 spare\nc slots=4 spare  # larger\n")
    flags = parse_launcher_args([f"--hostfile={path}", "--num_gpus=1", "x.py"])
    assert list(resolve_resources(flags).slots) == ["a", "b", "small", "c"]  # to bare deepspeed they are hosts
    return restarts.resources_of_first_start(parse_launcher_args([f"--hostfile={path}", "x.py"]))


@pytest.mark.parametrize(
    ("filters", "hosts", "spares"),
    [
        ("--exclude=small@b", {"a": 2}, ["c"]),
        ("--exclude=small@c", {"a": 2, "b": 2}, []),
        ("--include=a:0@c", {"a": 1}, ["c"]),
    ],
)
def test_spares_are_those_that_the_filters_leave(resources, filters, hosts, spares):
    def resolve(words):
        return restarts.resources_of_first_start(parse_launcher_args([f"--hostfile={resources.path}", words, "x.py"]))

    chosen = resolve(filters)
    assert {host: len(ids) for host, ids in chosen.slots.items()} == hosts and list(chosen.spares) == spares
    with pytest.raises(ConfigError, match="may leave out last slots of a host only"):
        resolve("--exclude=a:0")
    with pytest.raises(ConfigError, match="every host is a spare: take the word off those that train first"):
        resolve("--include=c")


@pytest.mark.parametrize(
    ("status", "failure", "restarts_it"),
    [
        (137, Failure("died", "rank 1 ended", rank=1, status=137), True),
        (255, Failure("lost", "the connection ended", hosts=("b",)), True),
        (1, Failure("stuck", "no progress", rank=0), True),
        (1, Failure("exception", "NCCL error: unhandled system error, remote process exited"), True),
        (75, None, True),
        (0, None, False),
        (1, Failure("exception", "KeyError: 'x'"), False),
        (1, Failure("error", "an error with a remedy"), False),
        *((status, Failure("error", "wrong", status=status), False) for status in (2, 3, 4, 5, 6)),
    ],
)
def test_only_what_another_start_may_survive_is_started_again(status, failure, restarts_it, tmp_path):
    assert (restarts.cause_of(status, failure, tmp_path) is not None) is restarts_it


def test_a_run_that_a_stop_file_ended_stays_ended(tmp_path):
    (tmp_path / "STOP").touch()
    assert restarts.cause_of(75, None, tmp_path) is None


def test_a_spare_with_enough_slots_takes_the_place_and_the_ranks_of_the_host_that_failed(resources):
    assert resources.hostfile_text() == "a slots=2\nb slots=2\n"
    assert restarts.failed_host(Failure("died", rank=1), resources) == "a"
    host = restarts.failed_host(Failure("lost", host="its own name", rank=2), resources)
    replaced = restarts.without_host(resources, host, may_shrink=True)
    returning = restarts.without_host(resources, host, may_shrink=False)
    assert list(returning.spares) == ["small", "b"]  # it may be up again when the next one fails
    assert restarts.without_host(returning, "a", may_shrink=False).slots == {"b": [0, 1], "c": [0, 1]}
    assert replaced.slots == {"a": [0, 1], "c": [0, 1]} and replaced.spares == {"small": 1}
    assert restarts.without_host(replaced, "a", may_shrink=False) is replaced
    assert restarts.without_host(replaced, "a", may_shrink=True).slots == {"c": [0, 1]}
    assert restarts.failed_host(Failure("missing", ranks=(1, 2)), resources) is None


def test_a_restart_resumes_from_the_newest_checkpoint():
    words = "--a 1 --resume_from_checkpoint old --overwrite_output_dir=True --b".split()
    assert restarts.resuming(words) == ["--a", "1", "--b", "--resume_from_checkpoint", "auto"]
    assert [restarts.seconds_to_wait(count) for count in (0, 1, 2, 20)] == [5, 10, 20, 300]


def test_run_json_tells_why_a_start_was_made_and_what_it_cost(monkeypatch):
    first = run_json.new_start(0)
    assert run_json.restarted([], first, None) == [first]
    monkeypatch.setenv(
        restarts.RESTART, json.dumps({"cause": "rank 1 was killed", "ended": "2026-01-01T00:00:00+0000"})
    )
    earlier, again = run_json.restarted([first], run_json.new_start(4), None)
    assert earlier["how"] == "failed: rank 1 was killed" and again["restarted_after"] == "rank 1 was killed"
    assert 0 <= again["seconds_lost"] < 60
