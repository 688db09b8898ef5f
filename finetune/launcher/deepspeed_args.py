"""The flags of the `deepspeed` command, as its own parser takes them.

They are those of `parse_args` in deepspeed/launcher/runner.py (0.19.8), whose import costs five seconds; a test
compares the two. argparse reads both, so short forms, `--flag=value` and prefixes mean the same.
"""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Container, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any

from finetune.utils.errors import ConfigError

LAUNCHERS = ("pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi")
PLACE = "flags of the launcher stand in front of the script, those of the training behind it"
MAX_PORT = 65535


def _flag(default: Any, help: str, *others: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "others": others, "choices": choices})


@dataclass(frozen=True)
class LauncherArgs:
    """What stands in front of the script, the script, and what stands behind it.

    `given` has the flags that were really typed, by their field's name; all others have the launcher's default.
    Only `hostfile` differs: None where it was not given, where the launcher looks for /job/hostfile.
    """

    script: str
    script_args: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    hostfile: str | None = _flag(None, "hosts and their slots [/job/hostfile]", "-H")
    include: str = _flag("", "hosts and slots to use: HOST[:SLOT,SLOT...]@HOST...", "-i")
    exclude: str = _flag("", "hosts and slots not to use", "-e")
    num_nodes: int = _flag(-1, "use the first hosts only")
    num_gpus: int = _flag(-1, "use slots 0 to N-1 of each host", "--num_accelerators")
    master_port: int = _flag(29500, "where ranks meet")
    master_addr: str = _flag("", "where ranks meet")
    node_rank: int = _flag(-1, "this host's number, with --no_ssh")
    launcher: str = _flag("pdsh", "what starts ranks on other hosts")
    launcher_args: str = _flag("", "arguments for that")
    module: bool = _flag(False, "the script is the name of a module")
    no_python: bool = _flag(False, "the script is a program")
    no_local_rank: bool = _flag(False, "do not pass --local_rank to the script")
    no_ssh: bool = _flag(False, "the same command is given on every host")
    no_ssh_check: bool = _flag(False, "do not probe the first host")
    force_multi: bool = _flag(False, "go over ssh even to a single host")
    save_pid: bool = _flag(False, "write the process id to /tmp")
    enable_each_rank_log: str = _flag("None", "a folder for a log of each rank")
    autotuning: str = _flag("", "DeepSpeed's autotuner", choices=("tune", "run"))
    bind_cores_to_rank: bool = _flag(False, "each rank gets its own cores")
    bind_core_list: str | None = _flag(None, "the cores that are dealt out, as in 1,3-5")
    ssh_port: int | None = _flag(None, "another ssh port")
    venv_script: str | None = _flag(None, "what activates the environment on other hosts")
    log_level: str = _flag("info", "how much it says", choices=("debug", "info", "warning", "error", "critical"))
    quiet: bool = _flag(False, "the same as --log_level error", "-q")

    def typed(self, *, without: Container[str] = ()) -> list[str]:
        """Those that were given, as words of a command line; `without` names those to leave out."""
        kept = {name: value for name, value in self.given.items() if name not in without}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("the following arguments are required"):
            raise ConfigError(f"no script to launch: [FLAGS OF deepspeed] finetune/finetune.py ...; {PLACE}")
        raise ConfigError(f"{message.removeprefix('argument ')} ({PLACE})")


def parse_launcher_args(argv: Sequence[str]) -> LauncherArgs:
    """The words behind `deepspeed` -> its flags, the script, the script's own words, untouched.

    With -h or --help in front of the script, prints the flags and exits with status 0, as argparse does.

    Raises:
        ConfigError: an unknown flag (with the closest known one), a value of the wrong type, no script.
    """
    argv = list(argv)
    parsed, unknown = build_parser().parse_known_args(argv)
    given = vars(parsed)
    if unknown:
        raise ConfigError(_unknown(unknown[0]))
    script, script_args = given.pop("user_script"), given.pop("user_args")
    flags = LauncherArgs(script=script, script_args=script_args, given=dict(given), **given)
    for name in ("master_port", "ssh_port"):
        port = given.get(name)
        if port is not None and not 1 <= port <= MAX_PORT:
            raise ConfigError(f"--{name} {port}: expected 1 to {MAX_PORT}")
    if flags.launcher.lower() not in LAUNCHERS:
        raise ConfigError(f"--launcher {flags.launcher}: expected {', '.join(LAUNCHERS[:-1])} or {LAUNCHERS[-1]}")
    return flags


def build_parser() -> argparse.ArgumentParser:
    """The launcher's parser; a flag that is not given leaves no trace in its result."""
    parser = _Parser(
        usage="finetune launch [FLAGS OF deepspeed] finetune/finetune.py FLAGS OF THE TRAINING",
        description="The flags of the deepspeed launcher.",
        argument_default=argparse.SUPPRESS,
    )
    hints = typing.get_type_hints(LauncherArgs)
    for one in fields(LauncherArgs):
        if one.default is MISSING:
            continue
        names = (f"--{one.name}", *one.metadata["others"])
        names = tuple(sorted(names, key=lambda name: name.startswith("--")))  # -H, then --hostfile
        kind = _kind(hints[one.name])
        if kind is bool:
            parser.add_argument(*names, action="store_true", help=one.metadata["help"])
            continue
        shape = {"type": _whole_number if kind is int else kind, "choices": one.metadata["choices"]}
        parser.add_argument(*names, dest=one.name, help=one.metadata["help"], **shape)
    parser.add_argument("user_script", help="what each rank runs")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its own words")
    return parser


def launcher_options() -> dict[str, bool]:
    """Every name as it is typed (`--hostfile`, `-H`), and whether a value follows it."""
    return {
        name: action.nargs != 0
        for action in build_parser()._actions
        for name in action.option_strings
        if name not in ("-h", "--help")
    }


def known_flags() -> list[str]:
    """Every long name, without dashes."""
    return sorted(
        {name[2:] for action in build_parser()._actions for name in action.option_strings if name[:2] == "--"}
    )


def _kind(hint: Any) -> type:
    """`int | None` -> int."""
    return next((part for part in typing.get_args(hint) if part is not NoneType), hint)


def _whole_number(text: str) -> int:
    # int() alone also takes 1_0 and digits of other scripts.
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def _unknown(word: str) -> str:
    name = word.partition("=")[0]
    close = get_close_matches(name.lstrip("-").replace("-", "_"), known_flags(), n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}? " if close else ""
    return f"unknown flag of the launcher {name}: {hint}({PLACE})"
