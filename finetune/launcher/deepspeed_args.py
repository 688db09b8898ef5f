"""The flags of the `deepspeed` command, read with its own declarations.

They are those of `parse_args` in deepspeed/launcher/runner.py. Importing that file takes seconds and touches the
devices, so its `add_argument` calls are read from the source. argparse reads the words here too, so short forms,
`--flag=value` and prefixes mean the same.
"""

import argparse
import ast
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NoReturn

from finetune.utils.errors import ConfigError, raise_faults
from finetune.utils.options import CommandParser, OptionType, declaration, one_of

LAUNCHERS = ("pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi")
PLACE = "flags of the launcher stand in front of the script, its own behind it"
MAX_PORT = 65535
MAX_RESTARTS_HELP = (
    "start again from the newest checkpoint, up to so often: after a lost host, a killed or stuck rank, a preemption, "
    "or a fault of a device or the network"
)
MAX_RESTARTS = (["--max_restarts"], {"type": int, "help": MAX_RESTARTS_HELP})


@dataclass(frozen=True)
class LauncherArgs:
    """The launcher's flags, the script, and the words behind the script.

    `given` has all flags that were typed, by name. The fields below it are the flags that are read here, with the
    launcher's defaults. Only `hostfile` differs: None where it was not given, where the launcher reads /job/hostfile.
    """

    script: str
    script_args: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    hostfile: str | None = None
    include: str = ""
    exclude: str = ""
    num_nodes: int = -1
    num_gpus: int = -1
    master_port: int = 29500
    master_addr: str = ""
    node_rank: int = -1
    launcher: str = "pdsh"
    launcher_args: str = ""
    module: bool = False
    no_ssh: bool = False
    no_ssh_check: bool = False
    autotuning: str = ""
    ssh_port: int | None = None
    venv_script: str | None = None

    def typed(self, *, without: Container[str] = ()) -> list[str]:
        """Return the flags that were given, as words of a command line; `without` names those to leave out."""
        kept = {name: value for name, value in self.given.items() if name not in without}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()]


def parse_launcher_args(argv: Sequence[str], *, supervised: bool = False) -> LauncherArgs:
    """Parse the words behind `deepspeed`, or `finetune launch`, to flags, script, and the script's words, untouched."""
    try:
        given = build_parser(supervised=supervised).parse(argv)
    except ConfigError as error:
        raise ConfigError(f"{error} ({PLACE})" if "unknown flag" in str(error) else str(error)) from None
    script, script_args = given.pop("user_script"), given.pop("user_args", [])
    known = {declared.name for declared in fields(LauncherArgs)}
    read_here = {name: value for name, value in given.items() if name in known}
    flags = LauncherArgs(script=script, script_args=script_args, given=given, **read_here)
    raise_faults(_faults(flags))
    return flags


def _faults(flags: LauncherArgs) -> Iterator[str]:
    for name in ("master_port", "ssh_port"):
        port = flags.given.get(name)
        if port is not None and not 1 <= port <= MAX_PORT:
            yield f"--{name} {port}: expected 1 to {MAX_PORT}"
    if flags.given.get("max_restarts", 0) < 0:
        yield f"--max_restarts {flags.given['max_restarts']}: expected at least 0"
    if flags.launcher.lower() not in LAUNCHERS:
        yield f"--launcher {flags.launcher}: expected {one_of(LAUNCHERS)}"


class _LauncherParser(CommandParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message = "no script to launch: [FLAGS OF deepspeed] finetune/finetune.py ..."
        super().error(message)


def build_parser(*, supervised: bool = False) -> CommandParser:
    """Build the launcher's parser, with the flags of `finetune launch`, too; what is not given leaves no trace."""
    parser = _LauncherParser(
        "finetune launch",
        "[FLAGS OF deepspeed] SCRIPT FLAGS OF THE SCRIPT",
        description=f"The flags of the deepspeed launcher; {PLACE}.",
        kind="flag of the launcher",
        allow_abbrev=True,
    )
    for names, keywords in [*_declared_flags(), *([MAX_RESTARTS] if supervised else [])]:
        if not names[0].startswith("-"):
            continue
        shape = OptionType(keywords.get("type", bool), choices=tuple(keywords.get("choices", ())))
        parser.types.update({name[2:]: shape for name in names if name.startswith("--")})
        if shape.kind is bool:
            parser.add_argument(*names, action="store_true", help=keywords["help"])
        else:
            flag = next(name for name in names if name.startswith("--"))
            metavar = "|".join(shape.choices) or shape.kind.__name__
            parser.add_argument(*names, help=keywords["help"], metavar=metavar, type=parser.reader(flag, shape))
    parser.add_argument("user_script", help="what each rank runs")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its own words")
    return parser


@cache
def _declared_flags() -> list[tuple[list[str], dict[str, Any]]]:
    """Return names and keywords of each `parser.add_argument(...)` of the installed DeepSpeed."""
    declared = []
    for call in ast.walk(declaration("deepspeed", "launcher/runner.py", "parse_args")):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument":
            keywords = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
            keywords["help"] = " ".join(str(keywords.get("help", "")).split()).replace("%", "%%")
            declared.append(([_value(name) for name in call.args], keywords))
    return declared


def _value(node: ast.expr) -> Any:
    """Return a literal, or a type; names of constants, which only defaults have, stay names."""
    if isinstance(node, ast.Name):
        return {"int": int, "str": str}.get(node.id, node.id)
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ast.literal_eval(node)


def launcher_options() -> dict[str, bool]:
    """Return every name as it is typed (`--hostfile`, `-H`), ours too, and whether a value follows it."""
    return {
        name: keywords.get("action") != "store_true"
        for names, keywords in [*_declared_flags(), MAX_RESTARTS]
        for name in names
        if name.startswith("-")
    }
