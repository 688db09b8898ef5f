"""Hostfiles: what is accepted and refused, and what the real launcher makes of each.

The matrix has a column for the launcher, and it is asked: where we are stricter, the table shows what for."""

import os

import pytest

from finetune import launcher
from finetune.launcher import local_slots, parse_launcher_args
from finetune.utils.errors import ConfigError
from tests.helpers.launcher_tests import REFUSED
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("private_files")


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
    "1025 slots": (b"n0 slots=1025\n", {"n0": 1025}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "many digits": (b"n0 slots=99999999999\n", {"n0": 99999999999}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "no slots": (b"n0\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "number alone": (b"n0 2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "colon": (b"n0:2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "spaces around =": (b"n0 slots = 2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "space behind =": (b"n0 slots= 2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "capital": (b"n0 Slots=2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "letters behind": (b"n0 slots=2abc\n", {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "fraction": (b"n0 slots=2.5\n", {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "underscore": (b"n0 slots=1_0\n", {"n0": 1}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "zero": (b"n0 slots=0\n", {"n0": 0}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "negative": (b"n0 slots=-2\n", REFUSED, "expected HOST slots=N (1 to 1024, one per GPU"),
    "other digits": ("n0 slots=٢\n".encode(), {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "comment at once": (b"n0 slots=2#x\n", {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "more behind": (b"n0 slots=2 max_slots=4\n", {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "two on a line": (b"n0 slots=2 n1 slots=2\n", {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
    "hard space": ("n0\u00a0slots=2\n".encode(), {"n0": 2}, "expected HOST slots=N (1 to 1024, one per GPU"),
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


def hosts_of(path: object) -> dict[str, int]:
    """Host -> slots of all lines of a hostfile."""
    return launcher.resolve_resources(parse_launcher_args([f"--hostfile={path}", "finetune.py"])).pool


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
        assert list(hosts_of(path).items()) == list(ours.items())
        return
    with pytest.raises(ConfigError) as caught:
        hosts_of(path)
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
        hosts_of(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 bad hostfile lines:"
    assert [line.split(", ")[1].split(":")[0] for line in lines[1:]] == ["line 2", "line 4", "line 5", "line 6"]
    assert "'n2 slots=2.5': expected" in lines[2]
    assert all(len(line) < len(str(path)) + 250 for line in lines)


def test_the_shipped_hostfiles_are_good():
    read = {path.name: hosts_of(path) for path in (ROOT / "hostfiles").iterdir() if not path.suffix}
    assert len(read) == 3 and all(read.values())


def test_a_file_that_is_not_there_is_named_with_its_like(tmp_path):
    (tmp_path / "two_hosts").write_text("n0 slots=1\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights").write_bytes(b"\n" * (1 << 20) + b"n0 slots=1")
    for name, said in {
        "two_host": f"two_host: there is no such file in {tmp_path}: did you mean {tmp_path / 'two_hosts'}?",
        "other": f"there is no such file in {tmp_path} (--hostfile",
        "no/hosts": f"there is no folder {tmp_path / 'no'}",
        "two_hosts/x": f"there is no folder {tmp_path / 'two_hosts'}",
        "folder": "is a directory",
        "pipe": "is a pipe or a device: expected a file",
        "weights": "is larger than 1,048,576 bytes",
        "a\0b": "embedded null",
        "x" * 300: "cannot be read: file name too long",
    }.items():
        with pytest.raises(ConfigError) as caught:
            hosts_of(tmp_path / name)
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="/proc/self/mem cannot be read: input/output error"):
        hosts_of("/proc/self/mem")


@pytest.mark.parametrize("words", ["--exclude localhost", "--exclude localhost:0"])
def test_a_machine_without_a_slot_left_is_an_error(words):
    flags = parse_launcher_args([*words.split(), "a.py"])
    assert local_slots(parse_launcher_args(["--exclude", "localhost:0", "a.py"]), 3) == [1, 2]
    with pytest.raises(ConfigError, match=f"{words}: no slot of this machine is left"):
        local_slots(flags, 1)


@pytest.mark.parametrize(
    ("visible", "words", "expected"),
    [
        ("2,3", "", [2, 3]),
        ("-1", "", [0, 1, 2, 3]),
        ("0,1,2,3", "--num_gpus 2", [0, 1]),
        ("2,3", "--num_gpus 2", "CUDA_VISIBLE_DEVICES=2,3: the launcher ignores it beside .* take GPU 0"),
        ("2,3", "--exclude localhost:2", "take GPU 0"),
        ("2,3", "--include localhost:3,1", "take GPU 1"),
        ("GPU-8932f937", "", "CUDA_VISIBLE_DEVICES=GPU-8932f937: the launcher takes numbers only"),
        ("0,MIG-1", "--num_gpus 1", "the launcher takes numbers only"),
    ],
)
def test_the_gpus_that_are_visible_are_those_of_the_launcher(visible, words, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    flags = parse_launcher_args([*words.split(), "a.py"])
    if isinstance(expected, list):
        assert local_slots(flags, 4) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            local_slots(flags, 4)
        assert local_slots(flags, 0)  # without a GPU the variable says nothing
