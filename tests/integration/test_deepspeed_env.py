"""The matrix of environments of `finetune launch`, against what the launcher runs."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import launcher
from finetune.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("private_files")


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
    "no =": (b"K\n", BROKEN, "line 1: no \"=\" after 'K': write NAME=value"),
    "space in front of =": (b"K =1\n", "1", 'line 1: a space before "=": write K=value'),
    "space behind =": (b"K= 1\n", "1", 'line 1: a space after "=": write K=value'),
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
        assert launcher.read_environment_file(path) == ours
    else:
        with pytest.raises(ConfigError) as caught:
            launcher.read_environment_file(path)
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
