"""Launcher flags, hostfiles and .deepspeed_env: what is accepted and refused, and what the real launcher makes of each.

Both matrices have a column for the launcher, and it is asked: where we are stricter, the table shows what for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune import hosts
from finetune.arguments import known_flags
from finetune.arguments.flags import SECRETS
from finetune.errors import ConfigError
from finetune.hosts import flags as launcher_flags
from finetune.hosts import selection

REFUSED = None
SECRET = "correct-horse"
property_test = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def runner():
    """The real launcher, imported once; it logs what it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.launcher import runner
    level = runner.logger.level
    runner.logger.setLevel(logging.CRITICAL)
    yield runner
    runner.logger.setLevel(level)


@pytest.fixture(autouse=True)
def private_files():
    """Files of these tests are not writable by a group, whatever the umask of who runs them."""
    before = os.umask(0o022)
    yield
    os.umask(before)


# --- flags -----------------------------------------------------------------------------------------------------------


def described(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    """What each flag of a parser is."""
    whole = launcher_flags._whole_number
    return {
        action.dest: (
            sorted(action.option_strings),
            type(action).__name__,
            action.nargs,
            # A switch has no type, and argparse's own default is text.
            None if action.nargs == 0 else {whole: int, None: str}.get(action.type, action.type),
            tuple(action.choices or ()),
        )
        for action in parser._actions
    }


@pytest.fixture(scope="module")
def real_parser(runner) -> argparse.ArgumentParser:
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, args=None: kept.append(parser))
        runner.parse_args([])
    return kept[0]


def test_the_flags_are_those_of_the_launcher(real_parser):
    real, ours = described(real_parser), described(launcher_flags.build_parser())
    assert len(real) > 25
    assert ours == real
    defaults = {one.name: one.default for one in fields(hosts.LauncherFlags)}
    for action in real_parser._actions:
        if action.dest not in ("help", "hostfile", "user_script", "user_args"):
            assert defaults[action.dest] == action.default, action.dest
    assert (defaults["hostfile"], real_parser.get_default("hostfile")) == (None, str(selection.JOB_HOSTFILE))


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
        ours = hosts.parse_launcher(words)
    except ConfigError:
        ours = None
    assert (ours is None) == (real is None), words
    if real:
        expected = {**real, "script": real.pop("user_script"), "script_args": real.pop("user_args")}
        got = {one.name: getattr(ours, one.name) for one in fields(ours) if one.name != "given"}
        got["hostfile"] = str(selection.JOB_HOSTFILE) if got["hostfile"] is None else got["hostfile"]
        assert got == {name: expected[name] for name in got}
        assert all(getattr(ours, name) == value for name, value in ours.given.items())


def test_what_stands_behind_the_script_is_untouched():
    tail = ["--num_gpus", "9", "-q", "--", "--hostfile=x", "", "a b", "--unknown"]
    flags = hosts.parse_launcher(["--num_gpus", "2", "-H", "hosts", "finetune/finetune.py", *tail])
    assert (flags.script, flags.script_args, flags.num_gpus) == ("finetune/finetune.py", tail, 2)
    assert flags.given == {"num_gpus": 2, "hostfile": "hosts"}
    assert hosts.parse_launcher(["a.py"]).hostfile is None
    assert hosts.parse_launcher(["--hostfile=", "a.py"]).hostfile == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_gpu_s 2 a.py", "unknown flag of the launcher --num_gpu_s: did you mean --num_gpus?"),
        (
            "--learning_rate=1 a.py",
            "unknown flag of the launcher --learning_rate: (flags of the launcher stand in front",
        ),
        ("-Z a.py", "unknown flag of the launcher -Z"),
        ("--num_gpus two a.py", "--num_gpus/--num_accelerators: expected a whole number, found 'two'"),
        ("--num_gpus 1_0 a.py", "expected a whole number, found '1_0'"),
        ("--num 2 a.py", "ambiguous option: --num could match --num_nodes, --num_gpus, --num_accelerators"),
        ("--num_gpus 2", "no script to launch: [FLAGS OF deepspeed] finetune/finetune.py"),
        ("", "no script to launch"),
        ("--hostfile", "-H/--hostfile: expected one argument"),
        ("--quiet=1 a.py", "-q/--quiet: ignored explicit argument '1'"),
        ("--autotuning maybe a.py", "--autotuning: invalid choice: 'maybe'"),
        ("--master_port 70000 a.py", "--master_port 70000: expected 1 to 65535"),
        ("--ssh_port 0 a.py", "--ssh_port 0: expected 1 to 65535"),
        ("--launcher openssh a.py", "--launcher openssh: expected pdsh, openmpi"),
    ],
)
def test_wrong_flags_are_named(words, said):
    with pytest.raises(ConfigError) as caught:
        hosts.parse_launcher(words.split())
    assert said in str(caught.value)


def test_help_prints_the_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        hosts.parse_launcher(["--help"])
    assert ended.value.code == 0
    assert "--include" in capsys.readouterr().out


# --- hostfiles -------------------------------------------------------------------------------------------------------

# content, what the launcher makes of it (REFUSED, or hosts), what we make of it (hosts, or a part of the message)
HOSTFILES = {
    "plain": (b"n0 slots=2\nn1 slots=4\n", {"n0": 2, "n1": 4}, {"n0": 2, "n1": 4}),
    "no end of line": (b"n0 slots=2", {"n0": 2}, {"n0": 2}),
    "comments, blank lines": (b"# two\n\n  # more\n \t\nn0 slots=2\n", {"n0": 2}, {"n0": 2}),
    "spaces and tabs": (b"  n0 \t slots=2  \n", {"n0": 2}, {"n0": 2}),
    "CRLF": (b"n0 slots=2\r\nn1 slots=2\r\n", {"n0": 2, "n1": 2}, {"n0": 2, "n1": 2}),
    "CR": (b"n0 slots=2\rn1 slots=2\r", {"n0": 2, "n1": 2}, {"n0": 2, "n1": 2}),
    "byte order mark": (b"\xef\xbb\xbfn0 slots=2\n", {"\ufeffn0": 2}, {"n0": 2}),
    "mark and comment": (b"\xef\xbb\xbf# hosts\nn0 slots=2\n", REFUSED, {"n0": 2}),
    "trailing comment": (b"n0 slots=2  # rack 4\n", {"n0": 2}, {"n0": 2}),
    "leading zero": (b"n0 slots=08\n", {"n0": 8}, {"n0": 8}),
    "address": (b"10.0.0.5 slots=2\n", {"10.0.0.5": 2}, {"10.0.0.5": 2}),
    "IPv6 address": (b"fe80::1 slots=2\n", {"fe80::1": 2}, {"fe80::1": 2}),
    "user": (b"me@n0 slots=2\n", {"me@n0": 2}, {"me@n0": 2}),
    "full name": (b"Node-1_a.example.org slots=1\n", {"Node-1_a.example.org": 1}, {"Node-1_a.example.org": 1}),
    "1024 slots": (b"n0 slots=1024\n", {"n0": 1024}, {"n0": 1024}),
    "1025 slots": (b"n0 slots=1025\n", {"n0": 1025}, "slots=1025: expected 1 to 1024"),
    "many digits": (b"n0 slots=99999999999\n", {"n0": 99999999999}, "expected a whole number from 1 to 1024"),
    "no slots": (b"n0\n", REFUSED, "no slots: write HOST slots=N"),
    "number alone": (b"n0 2\n", REFUSED, "found '2' where slots=N was expected: write n0 slots=N"),
    "colon": (b"n0:2\n", REFUSED, "no slots: write HOST slots=N"),
    "spaces around =": (b"n0 slots = 2\n", REFUSED, 'spaces around "=": write n0 slots=N'),
    "space behind =": (b"n0 slots= 2\n", REFUSED, 'spaces around "=": write n0 slots=N'),
    "capital": (b"n0 Slots=2\n", REFUSED, "found 'Slots=2' where slots=N was expected"),
    "letters behind": (b"n0 slots=2abc\n", {"n0": 2}, "slots=2abc: expected a whole number"),
    "fraction": (b"n0 slots=2.5\n", {"n0": 2}, "slots=2.5: expected a whole number"),
    "underscore": (b"n0 slots=1_0\n", {"n0": 1}, "slots=1_0: expected a whole number"),
    "zero": (b"n0 slots=0\n", {"n0": 0}, "slots=0: expected 1 to 1024, one per GPU or CPU rank"),
    "negative": (b"n0 slots=-2\n", REFUSED, "slots=-2: expected a whole number"),
    "other digits": ("n0 slots=٢\n".encode(), {"n0": 2}, "slots=٢: expected a whole number"),
    "comment at once": (b"n0 slots=2#x\n", {"n0": 2}, "slots=2#x: expected a whole number"),
    "more behind": (b"n0 slots=2 max_slots=4\n", {"n0": 2}, "'max_slots=4' behind the slots"),
    "two on a line": (b"n0 slots=2 n1 slots=2\n", {"n0": 2}, "'n1 slots=2' behind the slots"),
    "hard space": ("n0\u00a0slots=2\n".encode(), {"n0": 2}, "separate host and slots by spaces or tabs"),
    "given twice": (b"n0 slots=1\nn0 slots=1\n", REFUSED, "the host of line 1 again"),
    "given in capitals": (b"n0 slots=1\nN0 slots=1\n", {"n0": 1, "N0": 1}, "the host of line 1 again"),
    "given by two users": (b"a@n0 slots=1\nn0. slots=1\n", {"a@n0": 1, "n0.": 1}, "the host of line 1 again"),
    "address in two forms": (b"::1 slots=1\n0::1 slots=1\n", {"::1": 1, "0::1": 1}, "the host of line 1 again"),
    "an option": (
        b"-oProxyCommand=x slots=2\n",
        {"-oProxyCommand=x": 2},
        "host '-oProxyCommand=x' would be read as an option",
    ),
    "an option as a user": (b"-l@n0 slots=2\n", {"-l@n0": 2}, "user '-l': expected letters, digits"),
    "semicolon": (b"a;b slots=2\n", {"a;b": 2}, "host 'a;b': expected letters, digits and . _ - only"),
    "command": (b"$(x) slots=2\n", {"$(x)": 2}, "host '$(x)': expected letters"),
    "comma": (b"n0,n1 slots=2\n", {"n0,n1": 2}, "host 'n0,n1': expected letters"),
    "range": (b"n[0-3] slots=2\n", {"n[0-3]": 2}, "host 'n[0-3]': expected letters"),
    "other letters": ("ñ0 slots=2\n".encode(), {"ñ0": 2}, "host 'ñ0': expected letters"),
    "no address": (b"10.0.0.300 slots=2\n", {"10.0.0.300": 2}, "is a number, but not an IPv4 address"),
    "number": (b"8 slots=8\n", {"8": 8}, "is a number, but not an IPv4 address"),
    "port": (b"n0:22 slots=2\n", {"n0:22": 2}, "not an IPv6 address that pdsh takes: write a name"),
    "user and IPv6": (b"a@::1 slots=2\n", {"a@::1": 2}, "not an IPv6 address that pdsh takes: write a name"),
    "NUL": (b"n0\0 slots=2\n", {"n0\0": 2}, r"host 'n0\x00': expected letters"),
    "not UTF-8": (b"n\xff slots=2\n", REFUSED, "not UTF-8 text: save the file as plain text"),
    "UTF-16": ("n0 slots=2\n".encode("utf-16"), REFUSED, "not UTF-8 text: save the file as plain text"),
    "empty": (b"", REFUSED, "names no host: write lines"),
    "comments only": (b"# none\n\n", REFUSED, "names no host: write lines"),
}


@pytest.mark.parametrize("name", HOSTFILES)
def test_hostfile_matrix(runner, tmp_path, name):
    content, of_the_launcher, ours = HOSTFILES[name]
    path = tmp_path / "hosts"
    path.write_bytes(content)
    try:
        with open(path, encoding="utf-8") as file:  # as the launcher opens it
            made = dict(runner._parse_hostfile(file.readlines()))
    except ValueError:
        made = REFUSED
    assert made == of_the_launcher
    if isinstance(ours, dict):
        assert list(hosts.read_hostfile(path).items()) == list(ours.items())
        return
    with pytest.raises(ConfigError) as caught:
        hosts.read_hostfile(path)
    assert ours in str(caught.value) and str(path) in str(caught.value)


def test_the_matrix_shows_where_we_are_stricter():
    assert len(HOSTFILES) >= 25
    stricter = [name for name, (_, made, ours) in HOSTFILES.items() if made is not REFUSED and isinstance(ours, str)]
    assert len(stricter) > 20
    same = [name for name, (_, made, ours) in HOSTFILES.items() if made == ours]
    assert len(same) > 10


def test_all_faults_of_a_hostfile_are_listed(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n0 slots=2\nn1\n# fine\nn2 slots=2.5\nN0 slots=2\n" + "x" * 500 + " slots=two\n")
    with pytest.raises(ConfigError) as caught:
        hosts.read_hostfile(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 bad hostfile lines:"
    assert [line.split(", ")[1].split(":")[0] for line in lines[1:]] == ["line 2", "line 4", "line 5", "line 6"]
    assert "'n2 slots=2.5': slots=2.5" in lines[2]
    assert all(len(line) < len(str(path)) + 250 for line in lines)


def test_the_shipped_hostfiles_are_good():
    read = {path.name: hosts.read_hostfile(path) for path in (ROOT / "hostfiles").iterdir() if not path.suffix}
    assert len(read) == 3 and all(read.values())


def test_a_file_that_is_not_there_is_named_with_its_like(tmp_path):
    (tmp_path / "two_hosts").write_text("n0 slots=1\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights").write_bytes(b"\n" * (1 << 20) + b"n0 slots=1")
    for name, said in {
        "two_host": f"two_host: there is no such file in {tmp_path}: did you mean two_hosts?",
        "other": f"there is no such file in {tmp_path} (--hostfile",
        "no/hosts": f"there is no folder {tmp_path / 'no'}",
        "two_hosts/x": f"there is no folder {tmp_path / 'two_hosts'}",
        "folder": "is a folder: expected a file",
        "pipe": "is a pipe or a device: expected a file",
        "weights": "is larger than 1,048,576 bytes",
        "a\0b": "cannot be read: embedded null byte",
        "x" * 300: "cannot be read: file name too long",
    }.items():
        with pytest.raises(ConfigError) as caught:
            hosts.read_hostfile(tmp_path / name)
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="/proc/self/mem cannot be read: input/output error"):
        hosts.read_hostfile("/proc/self/mem")


# --- resources -------------------------------------------------------------------------------------------------------


def asked(
    tmp_path: Path, words: str, content: str = "a slots=4\nb slots=2\nc slots=4\n"
) -> dict[str, list[int]] | None:
    path = tmp_path / "hosts"
    path.write_text(content)
    return hosts.resources(hosts.parse_launcher([f"--hostfile={path}", *words.split(), "a.py"]))


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
    monkeypatch.setattr(selection, "JOB_HOSTFILE", tmp_path / "job")

    def alone(words: str) -> dict[str, list[int]] | None:
        return hosts.resources(hosts.parse_launcher([*words.split(), "a.py"]))

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
    flags = hosts.parse_launcher([f"--hostfile={path}", *(f"--{name}={value}" for name, value in request.items()), "a"])
    real = resources_by_the_launcher(runner, pool, request)
    try:
        ours = hosts.resources(flags)
    except ConfigError as error:
        refused_by_both = real is REFUSED
        nothing_left = real == {}
        too_many = request.get("num_nodes", 0) > len(pool) or request.get("num_gpus", 0) > min(pool.values())
        whole_and_slots = "named whole and by slots" in str(error)
        assert refused_by_both or nothing_left or too_many or whole_and_slots
    else:
        assert list(ours.items()) == list(real.items())


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
    words = [f"--hostfile={path}", *(f"--{name}={value}" for name, value in request.items()), "a.py"]
    assert hosts.resources(hosts.parse_launcher(words)) == real


# --- .deepspeed_env --------------------------------------------------------------------------------------------------

BROKEN, NO_RANK, UNSET = "the launcher dies", "the remote shell starts no rank", "K is not set"
# content, what a rank behind the launcher sees of K (or one of these), our variables (or a part of our message)
ENVIRONMENTS = {
    "plain": (b"K=eth0\n", "eth0", {"K": "eth0"}),
    "no end of line": (b"K=1", "1", {"K": "1"}),
    "two": (b"K=1\nL=2\n", "1", {"K": "1", "L": "2"}),
    "twice": (b"K=1\nK=2\n", "2", {"K": "2"}),
    "empty file": (b"", UNSET, {}),
    "empty value": (b"K=\n", "", {"K": ""}),
    "= in the value": (b"K=a=b\n", "a=b", {"K": "a=b"}),
    "lower case": (b"K=1\nhttp_proxy=p:1\n", "1", {"K": "1", "http_proxy": "p:1"}),
    "CRLF": (b"K=1\r\nL=2\r\n", "1", {"K": "1", "L": "2"}),
    "spaces in the value": (b"K=a b\n", "a b", {"K": "a b"}),
    "space at the end": (b"K=1 \n", "1", {"K": "1"}),
    "blank line": (b"K=1\n\nL=2\n", BROKEN, {"K": "1", "L": "2"}),
    "comment": (b"# network\nK=1\n", BROKEN, {"K": "1"}),
    "comment with =": (b"# was L=2\nK=1\n", NO_RANK, {"K": "1"}),
    "byte order mark": (b"\xef\xbb\xbfK=1\n", UNSET, {"K": "1"}),
    "export": (b"export K=1\n", "1", {"K": "1"}),
    "double quotes": (b'K="a b"\n', "a", {"K": "a b"}),
    "single quotes": (b"K='a b'\n", "'a b'", {"K": "a b"}),
    "space kept by quotes": (b'K=" a "\n', "", {"K": " a "}),
    "open quote": (b'K="a\n', NO_RANK, {"K": '"a'}),
    "several quoted": (b"K='a' 'b'\n", "'a' 'b'", {"K": "'a' 'b'"}),
    "JSON": (b'K={"a": 1}\n', "{a: 1}", {"K": '{"a": 1}'}),
    "command": (b"K=$(touch ran)\n", "", {"K": "$(touch ran)"}),
    "backquotes": (b"K=`touch ran`\n", "", {"K": "`touch ran`"}),
    "variable": (b"K=$HOME/x\n", str(Path.home() / "x"), {"K": "$HOME/x"}),
    "command in the value": (b'K=1"; touch ran; "\n', "1", {"K": '1"; touch ran; "'}),
    "# in the value": (b"K=a # b\n", "a # b", {"K": "a # b"}),
    "command in the name": (b"K;touch ran;Z=1\n", UNSET, "line 1: 'K;touch ...' is not a name"),
    "no =": (b"K\n", BROKEN, "line 1: no \"=\" behind 'K': write NAME=value"),
    "space in front of =": (b"K =1\n", "1", 'line 1: a space in front of "=": write K=value'),
    "space behind =": (b"K= 1\n", "1", 'line 1: a space behind "=": write K=value'),
    "digit in front": (b"K=1\n2K=3\n", "1", "line 2: '2K' is not a name"),
    "dash": (b"K-L=1\n", UNSET, "line 1: 'K-L' is not a name"),
    "no name": (b"=1\n", UNSET, "line 1: '' is not a name"),
    "NUL": (b"K=a\0b\n", BROKEN, "line 1: K has a NUL character in its value"),
    "not UTF-8": (b"K=\xff\n", BROKEN, "line 1: not UTF-8 text"),
}


def seen_behind_the_launcher(runner, path: Path, folder: Path) -> str:
    """K as a rank sees it: the file as main() reads it, `add_export`, `get_cmd`, and a shell in place of ssh."""
    arguments = SimpleNamespace(user_args=[], user_script="", ssh_port=None, launcher_args="", venv_script=None)
    arguments.no_python = arguments.module = arguments.no_local_rank = arguments.save_pid = False
    arguments.enable_each_rank_log, arguments.master_addr, arguments.master_port = "", "a", 1
    pdsh = runner.PDSHRunner(arguments, "")
    try:
        with open(path, encoding="utf-8") as file:
            for line in file.readlines():
                pdsh.add_export(*line.split("=", maxsplit=1))
    except (ValueError, TypeError):
        return BROKEN
    command, _, _ = pdsh.get_cmd({}, {"n0": [0]})
    exports = command[command.index("n0") + 1]
    show = f"import os; print('K is', os.environ.get('K', {UNSET!r}), end='')"
    remote = f"{exports} {shlex.quote(sys.executable)} -c {shlex.quote(show)}"
    if "\0" in remote:
        return BROKEN  # no argument of a process may hold one
    clean = {name: value for name, value in os.environ.items() if name not in ("K", "L")}
    done = subprocess.run(["bash", "-c", remote], cwd=folder, env=clean, capture_output=True, text=True, timeout=60)
    return done.stdout.removeprefix("K is ") if done.stdout.startswith("K is ") else NO_RANK


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_matrix(runner, tmp_path, name):
    content, of_the_launcher, ours = ENVIRONMENTS[name]
    path = tmp_path / ".deepspeed_env"
    path.write_bytes(content)
    path.chmod(0o600)
    assert seen_behind_the_launcher(runner, path, tmp_path) == of_the_launcher
    (tmp_path / "ran").unlink(missing_ok=True)
    if isinstance(ours, dict):
        assert hosts.read_environment_file(path) == ours
    else:
        with pytest.raises(ConfigError) as caught:
            hosts.read_environment_file(path)
        assert ours in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_the_environment_matrix_shows_what_the_launcher_runs(runner, tmp_path):
    """Its rows with a command in them really run it; ours are characters."""
    ran = []
    for name, (content, _, _) in ENVIRONMENTS.items():
        (tmp_path / "env").write_bytes(content)
        seen_behind_the_launcher(runner, tmp_path / "env", tmp_path)
        if (tmp_path / "ran").exists():
            ran.append(name)
            (tmp_path / "ran").unlink()
    assert ran == ["command", "backquotes", "command in the value", "command in the name"]


@pytest.mark.parametrize(
    "line",
    [
        f"HF_TOKEN {SECRET}",
        f"HF_TOKEN: {SECRET}",
        SECRET,
        f"{SECRET}==",
        f"HF TOKEN={SECRET}",
        f"HF_TOKEN ={SECRET}",
        f"HF_TOKEN= {SECRET}",
        f"HF-TOKEN={SECRET}",
        f"HF_TOKEN={SECRET}\0",
    ],
)
def test_no_value_is_shown(tmp_path, line):
    path = tmp_path / "env"
    path.write_text(f"{line}\n" * 2)
    with pytest.raises(ConfigError) as caught:
        hosts.read_environment_file(path)
    assert str(caught.value).startswith("2 bad environment lines:\n")
    assert SECRET not in str(caught.value)
    assert SECRET[:9] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o622, 0o777])
def test_a_file_that_others_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "env"
    path.write_text("K=1\n")
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        hosts.read_environment_file(path)
    assert str(caught.value) == f"{path} can be written by others (mode {mode:o}): chmod go-w {path}"
    path.chmod(mode & ~0o022)
    assert hosts.read_environment_file(path) == {"K": "1"}


def test_a_file_of_somebody_else_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "env"
    path.write_text("K=1\n")
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        owner, me = 12345, 0
    else:
        owner, me = os.geteuid(), os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: me)
    with pytest.raises(ConfigError, match=f"env belongs to user {owner}, not to you \\({me}\\)"):
        hosts.read_environment_file(path)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert hosts.read_environment_file(path) == {"K": "1"}


def test_a_file_of_root_is_good_for_all(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can write a file of root")
    path = tmp_path / "env"
    path.write_text("K=1\n")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert hosts.read_environment_file(path) == {"K": "1"}


@pytest.fixture
def places(tmp_path, monkeypatch) -> SimpleNamespace:
    """A home and a working directory."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(work)
    return SimpleNamespace(home=home, work=work)


def test_the_working_directory_wins(places):
    assert hosts.environment_files() == [] and hosts.travelling_environment() == {}
    (places.work / ".deepspeed_env").write_text("A=work\nB=work\n")
    (places.home / ".deepspeed_env").write_text("B=home\nC=home\n")
    assert [path.absolute() for path in hosts.environment_files()] == [
        places.home / ".deepspeed_env",
        places.work / ".deepspeed_env",
    ]
    assert hosts.travelling_environment() == {"A": "work", "B": "work", "C": "home"}


def test_another_name_for_the_file(places, monkeypatch, tmp_path):
    (places.work / ".deepspeed_env").write_text("A=1\n")
    (places.work / "other").write_text("A=2\n")
    (places.home / "other").write_text("B=2\n")
    monkeypatch.setenv("DS_ENV_FILE", "other")
    assert hosts.travelling_environment() == {"A": "2", "B": "2"}
    monkeypatch.setenv("DS_ENV_FILE", str(places.home / "other"))
    assert hosts.environment_files() == [places.home / "other"]  # one file, though DeepSpeed opens it twice
    monkeypatch.setenv("DS_ENV_FILE", "")
    assert hosts.environment_files() == []
    monkeypatch.setenv("DS_ENV_FILE", "missing")
    assert hosts.environment_files() == []
    with pytest.raises(ConfigError, match="DS_ENV_FILE=missing: there is no such file in .*work or .*home"):
        hosts.travelling_environment()
    monkeypatch.delenv("DS_ENV_FILE")
    monkeypatch.chdir(places.home)
    (places.home / ".deepspeed_env").write_text("A=3\n")
    assert len(hosts.environment_files()) == 1


def test_the_places_are_those_of_the_launcher(runner):
    assert runner.DEEPSPEED_ENVIRONMENT_PATHS == [os.path.expanduser("~"), "."]
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"


# --- names -----------------------------------------------------------------------------------------------------------


def test_of_all_flags_the_known_secrets_are_secret():
    assert {name for name in known_flags() if hosts.is_secret(name)} == set(SECRETS)
    assert not [name for name in launcher_flags.known_flags() if hosts.is_secret(name)]


@pytest.mark.parametrize(
    "name",
    "HF_TOKEN HUGGING_FACE_HUB_TOKEN hub_token hub-token token HF_OIDC_ID_TOKEN HFTOKEN accessToken AUTH_TOKENS "
    "WANDB_API_KEY WANDB_API_KEY2 AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN api_key apiKey APIKEY "
    "OPENAI_API_KEYS SSH_KEY key MLFLOW_TRACKING_PASSWORD PGPASSWORD passwd DB_PASS MYSQL_PWD SSHPASS "
    "GOOGLE_APPLICATION_CREDENTIALS WEBHOOK_SECRET client-secret PASSPHRASE".split(),
)
def test_secret_names(name):
    assert hosts.is_secret(name)


@pytest.mark.parametrize(
    "name",
    "human_token_ids model_token_ids new_tokens max_new_tokens content_tokens tokens_per_device_batch tokens "
    "TOKENIZERS_PARALLELISM tokenizer eos_token pad_token_id include_num_input_tokens_seen keys num_key_value_heads "
    "primary_key PWD OLDPWD PATH HF_HOME KEYBOARD MONKEY secretary passes output_dir".split(),
)
def test_names_that_are_not_secret(name):
    assert not hosts.is_secret(name)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", SECRET, "--lr", "1"], ["--hub_token", "***", "--lr", "1"]),
        (["--hub-token=" + SECRET, "x"], ["--hub-token=***", "x"]),
        (["--password", "-" + SECRET, "more", "--lr", "1"], ["--password", "***", "***", "--lr", "1"]),
        (["--password", "--lr", "1"], ["--password", "--lr", "1"]),
        (["env", "HF_TOKEN=" + SECRET, "HF_HOME=/x"], ["env", "HF_TOKEN=***", "HF_HOME=/x"]),
        (["--human_token_ids", "3", "--max_new_tokens=5"], ["--human_token_ids", "3", "--max_new_tokens=5"]),
        ([f"export HF_TOKEN={SECRET}; export A=1; cd /x;"], ["export HF_TOKEN=***; export A=1; cd /x;"]),
        ([f"export A=1; export HF_TOKEN='a b{SECRET}'; c"], ["export A=1; export HF_TOKEN=***; c"]),
        ([f"train --hub_token {SECRET} --lr 1"], ["train --hub_token *** --lr 1"]),
        ([f'say HF_TOKEN="a {SECRET}'], ["say HF_TOKEN=***"]),
        ([f"bash -c 'HF_TOKEN={SECRET}'"], ["bash -c 'HF_TOKEN=***"]),
        ([f"https://me:{SECRET}@example.org/a"], ["https://***@example.org/a"]),
        ([f'{{"api_key": "{SECRET}", "lr": "1"}}'], ['{"api_key": "***", "lr": "1"}']),
        (["--lr=1", "a@b:0", "", "K=1"], ["--lr=1", "a@b:0", "", "K=1"]),
    ],
)
def test_redacted(words, shown):
    assert hosts.redacted(words) == shown
    assert SECRET not in " ".join(hosts.redacted(words))


@property_test
@given(
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=4).map(lambda text: f"s3cr{text}3t"),
    name=st.sampled_from(["hub_token", "HF_TOKEN", "apiKey"]),
    form=st.sampled_from(["--{0} {1}", "--{0}={1}", "{0}={1}", "x 'cd /; export {0}={1}; y'", "x 'y --{0} {1}'"]),
)
def test_no_spelling_of_a_secret_is_shown(value, name, form):
    """Quoted as a shell wants it, and once more where it stands in a command for another shell."""
    quoted = shlex.quote(value)
    command = form.format(name, quoted) if "'" not in form else form[:2] + shlex.quote(form[3:-1].format(name, quoted))
    words = ["ssh", "n0", *shlex.split(command), "--lr", "1"]
    said = " ".join(hosts.redacted(words))
    assert "s3cr" not in said and "3t" not in said
    assert said.startswith("ssh n0") and said.endswith("--lr 1")


def test_what_travels():
    for name in "HF_HOME HF_TOKEN PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR WANDB_API_KEY".split():
        assert hosts.travels(name)
    for name in "NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME UCX_TLS TORCH_NCCL_BLOCKING_WAIT".split():
        assert hosts.travels(name)
    alone = "CUDA_VISIBLE_DEVICES MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE CROSS_RANK"
    for name in [*alone.split(), *"PATH HOME USER TMPDIR SSH_AUTH_SOCK HTTPS_PROXY NCCL_HOSTID NCCL hf_home".split()]:
        assert not hosts.travels(name)
