"""The `deepspeed` command on all hosts of a run: its flags, hostfile and `.deepspeed_env`, ssh, and network checks.

The files and flags are read strictly. DeepSpeed's launcher ignores the rest of a line that it half understands, trains
on this machine alone if the hostfile is missing, and passes values to a shell; here each of these is an error with a
remedy, found before anything starts. Whatever the launcher reads correctly means the same here; tests ask both.
"""

from finetune.launcher.deepspeed_args import LauncherArgs, build_parser, launcher_options, parse_launcher_args
from finetune.launcher.env_variables import (
    ENVIRONMENT_FILE,
    environment_files,
    environment_of_ranks,
    is_exported,
    is_secret,
    read_environment_file,
    redact,
    write_environment_file,
)
from finetune.launcher.hostfile import Resources, local_slots, resolve_resources, resources_of_command
