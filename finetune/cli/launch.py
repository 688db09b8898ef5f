"""`finetune launch`: the `deepspeed` command, supervised, for any script; `finetune train` is the same for ours.

    finetune launch --hostfile=hostfiles/two_hosts my_script.py ...

The arguments are those of `deepspeed`. Flags, hostfile and hosts are checked before anything starts.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

from finetune.config import as_flags, build_parser, parse
from finetune.launcher import LauncherArgs, parse_launcher_args, restarts, ssh
from finetune.launcher.supervisor import SupervisedRun
from finetune.training.start_checks import PlannedRanks, check_start
from finetune.utils.errors import ConfigError, missing_reason
from finetune.utils.options import source_folder

OUR_SCRIPT = Path(__file__).resolve().parent.parent / "finetune.py"
HOST_FILTERS = {"include", "exclude"}


def main(argv: Sequence[str]) -> None:
    """Check the command and the hosts, run the script, exit with its status."""
    supervise(parse_launcher_args(argv, supervised=True))


def supervise(flags: LauncherArgs) -> NoReturn:
    """Check the command and the hosts, run the script, exit with its status."""
    resources = restarts.resources_of_first_start(flags)
    if resources is not None and resources.spares:  # its hosts are what the filters have left
        flags = replace(flags, given={name: flags.given[name] for name in flags.given.keys() - HOST_FILTERS})
    arguments = parse(flags.script_args) if is_ours(flags) else None
    starts_here = resources is None or ssh.is_here(resources.first_host)
    if starts_here and not flags.module and not Path(flags.script).is_file():
        raise ConfigError(f"SCRIPT {flags.script}: {missing_reason(Path(flags.script))}")
    if starts_here and flags.module and not PathFinder.find_spec(flags.script.partition(".")[0], ["", *sys.path]):
        raise ConfigError(f"--module {flags.script}: there is no such module here, nor in {sys.prefix}")
    for library in ("torch", *(("accelerate", "datasets", "peft") if arguments else ())):
        source_folder(library)  # an error if it is not installed: not by every rank
    if arguments and starts_here:
        planned = PlannedRanks.of_launch(flags, resources, use_cpu=bool(arguments.given("use_cpu")))
        check_start(arguments, planned, is_launch=True)
    words = as_flags(flags.script_args, build_parser().types) if arguments else flags.script_args
    run = SupervisedRun(flags, resources, *without_secrets(words))
    if arguments:
        run.output_dir, run.may_shrink = arguments.output_dir, arguments.run.resume_world_size == "any"
    sys.exit(run.run())


def is_ours(flags: LauncherArgs) -> bool:
    """Return whether the script is the one of this package, which reports that it is complete."""
    return flags.script == "finetune.train" if flags.module else Path(flags.script).resolve() == OUR_SCRIPT


def without_secrets(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a token from the script's arguments, which every user of a host can read in `ps`, into a variable."""
    kept, environment = [], {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if name != "--hub_token":
            kept.append(word)
        else:
            environment["HF_TOKEN"] = value if given else next(rest, "")
    return kept, environment
