"""Every flag and its default, parsed to plain values; this is the only home of a default of ours.

Our own flags are the dataclasses below. All flags of `transformers.TrainingArguments` are accepted beside them: their
names and types are read from the source of the installed version, without importing it, because importing it takes
seconds and building it touches the devices. Flags that transformers has renamed or removed are translated.
"""

from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.argument_parser import build_parser, parse
from finetune.config.arguments import (
    Arguments,
    DataArguments,
    DoctorArguments,
    ModelArguments,
    RunArguments,
    default_of,
)
from finetune.config.command_line import as_flags, flag_words, split_command
