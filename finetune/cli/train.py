"""`finetune train`: train as a recipe and flags say, on this machine or on all hosts of a hostfile.

    finetune train recipe.yaml --output_dir output learning_rate=1e-4
    finetune train --hostfile=hostfiles/two_hosts --model_name_or_path M --data_path D --output_dir output

It is `finetune launch` with the script of this package: flags of the launcher and of the training in any order.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from finetune.cli.launch import OUR_SCRIPT, supervise
from finetune.config import build_parser, split_command
from finetune.launcher import LauncherArgs, parse_launcher_args


def main(argv: Sequence[str]) -> None:
    """Check the command and the hosts, train, exit with the status of the run."""
    supervise(parse_options(argv))


def parse_options(argv: Sequence[str]) -> LauncherArgs:
    """Return the launcher's flags, with the words of the training as those of the script."""
    _, launcher, words = split_command(argv, build_parser().types)
    script = os.path.relpath(OUR_SCRIPT) if OUR_SCRIPT.is_relative_to(Path.cwd()) else str(OUR_SCRIPT)
    return parse_launcher_args([*launcher, script, *words], supervised=True)
