"""The launcher's flags and the hosts that they choose, read as the launcher reads them, or refused."""

import argparse
import contextlib
import io
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune import launcher
from finetune.launcher import deepspeed_args as launcher_flags
from finetune.launcher import hostfile
from finetune.utils.errors import ConfigError
from tests.helpers.launcher_tests import REFUSED, property_test

pytestmark = pytest.mark.usefixtures("private_files")

# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_parser(runner) -> argparse.ArgumentParser:
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, args=None: kept.append(parser))
        runner.parse_args([])
    return kept[0]


def test_the_flags_are_those_of_the_launcher(real_parser):
    def spelled(parser: argparse.ArgumentParser) -> dict[str, tuple]:
        return {action.dest: (sorted(action.option_strings), action.nargs) for action in parser._actions}

    assert len(spelled(real_parser)) > 25
    assert spelled(launcher_flags.build_parser()) == spelled(real_parser)
    for declared in fields(launcher.LauncherArgs):
        if declared.default is not MISSING and declared.name != "hostfile":
            assert declared.default == real_parser.get_default(declared.name), declared.name
    assert real_parser.get_default("hostfile") == str(hostfile.JOB_HOSTFILE)


WORDS = st.one_of(
    st.sampled_from(
        "--hostfile=hosts --hostfile= -Hhosts -H=hosts --hostf=a --num_gpus=2 --num_g=3 --num_a=1 --num_nodes=2 "
        "--inc=a:1 -ia@b -ea:0 --master_p=1 --quiet -q -qHx --no_ssh_c --no_ssh --module --force --launcher_a=-x "
        "--log_level=info "
        "--ssh_port=22 --venv=x --node_rank=-1 --num --no --unknown -z -- run.py x=1 --learning_rate -1 1".split()
    ),
    st.sampled_from(["--num_gpus 2", "--hostfile ''", "-H hosts", "--num_nodes -1", "--master_addr 'a b'", "run.py"]),
)


@property_test
@given(parts=st.lists(WORDS, max_size=5), tail=st.lists(WORDS, max_size=3), script=st.booleans())
def test_words_are_read_as_the_launcher_reads_them(real_parser, parts, tail, script):
    words = [one for part in [*parts, *["train.py"] * script, *tail] for one in shlex.split(part)]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            real = vars(real_parser.parse_args(words))
        except SystemExit:
            real = None
    try:
        ours = launcher.parse_launcher_args(words)
    except ConfigError:
        ours = None
    assert (ours is None) == (real is None), words
    if real:
        expected = {**real, "script": real.pop("user_script"), "script_args": real.pop("user_args")}
        got = {one.name: getattr(ours, one.name) for one in fields(ours) if one.name != "given"}
        got["hostfile"] = str(hostfile.JOB_HOSTFILE) if got["hostfile"] is None else got["hostfile"]
        assert got == {name: expected[name] for name in got}
        assert ours.given.items() <= real.items()


def test_what_stands_behind_the_script_is_untouched():
    tail = ["--num_gpus", "9", "-q", "--", "--hostfile=x", "", "a b", "--unknown"]
    flags = launcher.parse_launcher_args(["--num_gpus", "2", "-H", "hosts", "finetune/finetune.py", *tail])
    assert (flags.script, flags.script_args, flags.num_gpus) == ("finetune/finetune.py", tail, 2)
    assert flags.given == {"num_gpus": 2, "hostfile": "hosts"}
    assert launcher.parse_launcher_args(["a.py"]).hostfile is None
    assert launcher.parse_launcher_args(["--hostfile=", "a.py"]).hostfile == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_gpu_s 2 a.py", "unknown flag of the launcher --num_gpu_s: did you mean --num_gpus?"),
        ("--learning_rate=1 a.py", "unknown flag of the launcher --learning_rate"),
        ("--num_gpu_s=2 --num_nodes=x a.py", "--num_nodes x: expected a whole number"),
        ("-Z a.py", "unknown flag of the launcher -Z"),
        ("--num_gpus two a.py", "--num_gpus two: expected a whole number"),
        ("--num_gpus 1_0 a.py", "--num_gpus 1_0: expected a whole number"),
        ("--num 2 a.py", "ambiguous option: --num could match --num_nodes, --num_gpus, --num_accelerators"),
        ("--num_gpus 2", "no script to launch: [FLAGS OF deepspeed] finetune/finetune.py"),
        ("", "no script to launch"),
        ("--hostfile", "-H/--hostfile: expected one argument"),
        ("--quiet=1 a.py", "-q/--quiet: ignored explicit argument '1'"),
        ("--autotuning maybe a.py", "--autotuning maybe: expected tune or run"),
        ("--master_port 70000 a.py", "--master_port 70000: expected 1 to 65535"),
        ("--ssh_port 0 a.py", "--ssh_port 0: expected 1 to 65535"),
        ("--launcher openssh a.py", "--launcher openssh: expected pdsh, openmpi"),
    ],
)
def test_wrong_flags_are_named(words, said):
    with pytest.raises(ConfigError) as caught:
        launcher.parse_launcher_args(words.split())
    assert said in str(caught.value)


def test_a_number_of_restarts_is_none_or_more():
    with pytest.raises(ConfigError, match="--max_restarts -1: expected at least 0"):
        launcher.parse_launcher_args(["--max_restarts=-1", "a.py"], supervised=True)


def test_help_prints_the_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.parse_launcher_args(["--help"])
    assert ended.value.code == 0
    assert "--include" in capsys.readouterr().out


# --- resources -------------------------------------------------------------------------------------------------------


def slots_of(*words: str) -> dict[str, list[int]] | None:
    resources = launcher.resolve_resources(launcher.parse_launcher_args([*words, "a.py"]))
    return resources and resources.slots


def asked(
    tmp_path: Path, words: str, content: str = "a slots=4\nb slots=2\nc slots=4\n"
) -> dict[str, list[int]] | None:
    path = tmp_path / "hosts"
    path.write_text(content)
    return slots_of(f"--hostfile={path}", *words.split())


def test_resources_hold_the_whole_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=4 # rack 1\nb slots=2\n")
    resources = launcher.resources_of_command([f"--hostfile={path}", "--exclude", "a:0", "a.py"])
    assert (resources.path, resources.pool) == (str(path), {"a": 4, "b": 2})
    assert (resources.first_host, resources.world_size) == ("a", 5)
    assert resources.hostfile_text() == "a slots=4\nb slots=2\n"
    assert launcher.resources_of_command([f"--hostfile={path}", "--autotuning=run", "a.py"]) is None


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("", {"a": [0, 1, 2, 3], "b": [0, 1], "c": [0, 1, 2, 3]}),
        ("--include c@a:2,0", {"a": [0, 2], "c": [0, 1, 2, 3]}),
        ("--include a:1@a:0", {"a": [0, 1]}),
        ("--exclude b@a:0", {"a": [1, 2, 3], "c": [0, 1, 2, 3]}),
        ("--exclude b:0,1", {"a": [0, 1, 2, 3], "c": [0, 1, 2, 3]}),
        ("--num_nodes 1 --num_gpus 3", {"a": [0, 1, 2]}),
        ("--num_nodes -1 --num_gpus 2", {"a": [0, 1], "b": [0, 1], "c": [0, 1]}),
        ("--no_ssh --node_rank 2", {"a": [0, 1, 2, 3], "b": [0, 1], "c": [0, 1, 2, 3]}),
    ],
)
def test_resources(tmp_path, words, kept):
    assert list(asked(tmp_path, words).items()) == list(kept.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_gpus 3", "--num_gpus 3 is more than the slots in .*hosts: b has 2"),
        ("--num_nodes 4", "--num_nodes 4: .*hosts names 3 hosts"),
        ("--num_nodes 0", "--num_nodes 0: expected at least 1"),
        ("--num_gpus -2", "--num_gpus -2: expected at least 1"),
        ("--include a --exclude b", "--include and --exclude exclude each other"),
        ("--include a --num_gpus 1", "--num_gpus and --include exclude each other"),
        ("--exclude a --num_nodes 1", "--num_nodes and --exclude exclude each other"),
        ("--include A", "--include A: no host 'A' in .*hosts: it has a, b, c"),
        ("--include a@bb", "no host 'bb' in .*hosts: did you mean b?"),
        ("--exclude b:2", "--exclude b:2: b has no slot 2: its slots are 0 to 1"),
        ("--include b:-1", "'b:-1': expected HOST or HOST:SLOT,SLOT"),
        ("--include b:0-1", "'b:0-1': expected HOST"),
        ("--include b:", "'b:': expected HOST"),
        ("--include b@", "'': expected HOST"),
        ("--include b:0:1", "'b:0:1': expected HOST"),
        ("--include a@a:1", "a is named whole and by slots"),
        ("--exclude a@b@c:0,1,2,3", "leaves no slot of"),
        ("--no_ssh --node_rank 3", "--no_ssh with --node_rank 3: expected this host's number, 0 to 2"),
        ("--no_ssh", "--no_ssh with no --node_rank"),
    ],
)
def test_more_than_there_is_is_refused(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        asked(tmp_path, words)


def test_a_host_that_include_cannot_name(tmp_path):
    for host in ("me@n0", "::1"):
        with pytest.raises(ConfigError, match="give it a plain name"):
            asked(tmp_path, f"--include {host.split(':')[0] or 'n0'}", f"{host} slots=1\n")


def test_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(hostfile, "JOB_HOSTFILE", tmp_path / "job")

    def alone(words: str) -> dict[str, list[int]] | None:
        return slots_of(*words.split())

    for words in ("", "--hostfile=", "--num_gpus 2", "--include localhost:0,1", "--no_ssh --node_rank 0"):
        assert alone(words) is None
    for words, said in {
        "--num_nodes 2": "--num_nodes 2 without a hostfile",
        "--include n0": "without a hostfile there is localhost only, not 'n0'",
        f"--hostfile {tmp_path}/jo": "there is no such file",
    }.items():
        with pytest.raises(ConfigError, match=said):
            alone(words)
    (tmp_path / "job").write_text("n0 slots=1\nn1 slots=1\n")
    assert alone("") == {"n0": [0], "n1": [0]}
    assert alone("--hostfile=") is None


@st.composite
def requests(draw) -> tuple[dict[str, int], dict[str, str | int]]:
    """Hosts with slots, and one way to choose among them."""
    pool = draw(st.dictionaries(st.sampled_from(["a", "b", "node-1", "10.0.0.5"]), st.integers(1, 5), min_size=1))
    way = draw(st.sampled_from(["include", "exclude", "num"]))
    if way == "num":
        counts = {"num_nodes": (1, len(pool) + 1), "num_gpus": (1, 6)}
        return pool, {name: draw(st.integers(*span) | st.just(-1)) for name, span in counts.items()}
    parts = []
    for host in draw(st.lists(st.sampled_from([*pool, "other"]), min_size=1, max_size=4)):
        numbers = draw(st.lists(st.integers(0, 5), max_size=4))
        parts.append(host + (":" + ",".join(map(str, numbers)) if numbers else ""))
    return pool, {way: "@".join(parts)}


def resources_by_the_launcher(runner, pool: dict[str, int], request: dict) -> dict[str, list[int]] | None:
    """As main() calls its functions; None for what it refuses."""
    try:
        filters = (request.get("include", ""), request.get("exclude", ""))
        active = runner.parse_inclusion_exclusion(pool, *filters)
    except ValueError:
        return REFUSED
    return dict(runner.apply_num_nodes_and_gpus(active, request.get("num_nodes", -1), request.get("num_gpus", -1)))


@property_test
@given(request_of_pool=requests())
def test_resources_are_those_of_the_launcher(runner, tmp_path_factory, request_of_pool):
    pool, request = request_of_pool
    path = tmp_path_factory.getbasetemp() / "pool"
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in pool.items()))
    flags = launcher.parse_launcher_args(
        [f"--hostfile={path}", *(f"--{name}={value}" for name, value in request.items()), "a"]
    )
    real = resources_by_the_launcher(runner, pool, request)
    try:
        ours = launcher.resolve_resources(flags)
    except ConfigError as error:
        refused_by_both = real is REFUSED
        nothing_left = real == {}
        too_many = request.get("num_nodes", 0) > len(pool) or request.get("num_gpus", 0) > min(pool.values())
        whole_and_slots = "named whole and by slots" in str(error)
        assert refused_by_both or nothing_left or too_many or whole_and_slots
    else:
        assert list(ours.slots.items()) == list(real.items())


@property_test
@given(request_of_pool=requests())
def test_of_valid_requests_many_are_kept(runner, tmp_path_factory, request_of_pool):
    """The property above would hold, too, if we refused everything: what both can read, we read."""
    pool, request = request_of_pool
    real = resources_by_the_launcher(runner, pool, request)
    parts = "@".join(str(request.get(name, "")) for name in ("include", "exclude")).strip("@").split("@")
    by_host = {part.partition(":")[0]: ":" in part for part in parts}
    assume(real and all(by_host[part.partition(":")[0]] == (":" in part) for part in parts))
    assume(request.get("num_nodes", 0) <= len(pool) and request.get("num_gpus", 0) <= min(pool.values()))
    path = tmp_path_factory.getbasetemp() / "pool"
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in pool.items()))
    assert slots_of(f"--hostfile={path}", *(f"--{name}={value}" for name, value in request.items())) == real
