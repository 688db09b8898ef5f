"""What the `deepspeed` command is told: its flags, the hostfile, `.deepspeed_env`, read strictly.

The launcher takes half a line for a whole one, a missing file for an order to train alone, and hands the rest to a
shell. Here each of these is an error that says what to write instead, found before anything starts. What the launcher
reads rightly means the same here: the tests ask both.
"""

from finetune.launcher.deepspeed_args import LauncherArgs, build_parser, launcher_options, parse_launcher_args
from finetune.launcher.deepspeed_env import (
    FILE_NAME,
    environment_files,
    environment_of_ranks,
    read_environment_file,
    travelling_environment,
    write_environment_file,
)
from finetune.launcher.env_variables import is_exported, is_secret, redact
from finetune.launcher.hostfile import read_hostfile
from finetune.launcher.resource_filter import JOB_HOSTFILE, local_slots, resolve_resources

__all__ = [
    "FILE_NAME",
    "JOB_HOSTFILE",
    "LauncherArgs",
    "build_parser",
    "environment_files",
    "environment_of_ranks",
    "is_secret",
    "launcher_options",
    "parse_launcher_args",
    "read_environment_file",
    "read_hostfile",
    "redact",
    "resolve_resources",
    "local_slots",
    "travelling_environment",
    "is_exported",
    "write_environment_file",
]
