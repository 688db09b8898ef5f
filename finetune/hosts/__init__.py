"""What the `deepspeed` command is told: its flags, the hostfile, `.deepspeed_env`, read strictly.

The launcher takes half a line for a whole one, a missing file for an order to train alone, and hands the rest to a
shell. Here each of these is an error that says what to write instead, found before anything starts. What the launcher
reads rightly means the same here: the tests ask both.
"""

from finetune.hosts.environment import (
    FILE_NAME,
    environment_files,
    environment_of_ranks,
    read_environment_file,
    travelling_environment,
    write_environment_file,
)
from finetune.hosts.flags import LauncherFlags, launcher_options, parse_launcher
from finetune.hosts.hostfile import read_hostfile
from finetune.hosts.selection import JOB_HOSTFILE, resources, slots_here
from finetune.hosts.variables import is_secret, redacted, travels

__all__ = [
    "FILE_NAME",
    "JOB_HOSTFILE",
    "LauncherFlags",
    "environment_files",
    "environment_of_ranks",
    "is_secret",
    "launcher_options",
    "parse_launcher",
    "read_environment_file",
    "read_hostfile",
    "redacted",
    "resources",
    "slots_here",
    "travelling_environment",
    "travels",
    "write_environment_file",
]
