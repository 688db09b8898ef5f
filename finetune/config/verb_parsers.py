"""The command lines of the verbs that take flags of the training command and some of their own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from finetune.config.argument_parser import (
    UNSET,
    Parser,
    add_groups,
    check_at_least_one,
    check_data,
    filled,
    known_flags,
    unknown_flag,
)
from finetune.config.arguments import (
    DataArguments,
    DoctorArguments,
    EvaluateArguments,
    ModelArguments,
    PreviewArguments,
)
from finetune.launcher import LauncherArgs, launcher_options, parse_launcher_args
from finetune.utils.errors import ConfigError

OUR_SCRIPT, OUR_MODULE = "finetune/finetune.py", "finetune.train"
_BOOLEANS = (["True"], ["False"], ["true"], ["false"])


# What decides how the model computes, or which rows it is evaluated on, changes nothing of what is shown.
NOT_OF_PREVIEW = ("attn_implementation", "validation_share")


def parse_for_preview(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PreviewArguments]:
    """The model and data flags, and those that say which rows are shown and how.

    Raises:
        ConfigError: as `parse`; or flags that exclude each other.
    """
    groups = (ModelArguments, DataArguments, PreviewArguments)
    parser = Parser(
        prog="finetune preview",
        usage="finetune preview --model_name_or_path M --data_path D [--rows N ...|--sample N] [--html FILE|--json]",
        description="What the rows of data files render to, through the pipeline that trains. Context is dim, what is "
        "learned is bold green, control tokens are in reverse; without colour (NO_COLOR, or not a terminal) what is "
        "learned stands between ⟦ and ⟧ and control tokens between « and ». An arrow marks an end that is learned "
        "where another token is read.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    names = [one.name for group in groups for one in fields(group) if one.name not in NOT_OF_PREVIEW]
    add_groups(parser, groups, only=names)
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(unknown_flag(unknown, names))
    given = vars(parsed)
    missing = [name for name in ("model_name_or_path", "data_path") if given.get(name) in UNSET]
    if missing:
        raise ConfigError("missing: " + ", ".join(f"--{name}" for name in missing))
    model, data, preview = (filled(group, given) for group in groups)
    check_data(data)
    if preview.rows is not None:
        check_at_least_one("rows", len(preview.rows))
    if preview.sample is not None:
        check_at_least_one("sample", preview.sample)
    chosen = [f"--{name}" for name in ("rows", "sample") if getattr(preview, name) is not None]
    if len(chosen) == 2:
        raise ConfigError("--rows and --sample exclude each other: keep one of them")
    if preview.json and (chosen or preview.html):
        raise ConfigError(f"--json prints all rows: it excludes {(chosen or ['--html'])[0]}")
    return model, data, preview


def parse_for_convert(argv: Sequence[str]) -> tuple[DataArguments, str]:
    """What to read, and the file to write: the last word that belongs to no flag.

    Raises:
        ConfigError: an unknown flag or rule, or fewer than two names.
    """
    parser = Parser(
        prog="finetune convert",
        usage="finetune convert IN [IN ...] OUT [--repairs RULE ...] [--bad_rows error|drop]",
        description="Conversations in any layout that training reads -> a JSON array in the project's own, or JSON "
        "lines where OUT ends in .jsonl. An existing file is never replaced.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths", nargs="*", metavar="IN ... OUT", help="files, folders, globs, data sets; the file to write"
    )
    add_groups(parser, (DataArguments,), only=("bad_rows", "repairs"))
    parsed, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise ConfigError(unknown_flag(unknown, ["bad_rows", "repairs"]))
    given = vars(parsed)
    paths = given.get("paths") or []
    if len(paths) < 2:
        raise ConfigError("expected what to read and the file to write, in front of --repairs: convert IN OUT")
    data = filled(DataArguments, {**given, "data_path": paths[:-1]})
    check_data(data)
    return data, paths[-1]


DATA_OF_EVALUATE = (
    "data_path", "model_max_length", "too_long", "train_on", "bad_rows", "max_dropped_rows", "repairs",
    "data_cache_dir", "preprocessing_num_workers",
)  # fmt: skip


def parse_for_evaluate(argv: Sequence[str]) -> tuple[str, EvaluateArguments, dict[str, Any]]:
    """The folder of the result, what to find out, and the data flags that were given; others are the training's.

    Raises:
        ConfigError: an unknown flag, nothing to evaluate, or flags that do not go together.
    """
    parser = Parser(
        prog="finetune evaluate",
        usage="finetune evaluate OUTPUT [--data_path D [D ...]] [--tasks T [T ...]] [--forgetting]",
        description="Is it better? The result in OUTPUT beside the model it was trained from: on held-out "
        "conversations, on tasks of lm-evaluation-harness, and on what the base could do before. Under torchrun or "
        "`deepspeed --module finetune evaluate ...` the ranks divide the work.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("output", metavar="OUTPUT", help="the output_dir of a run, or a checkpoint in it")
    add_groups(parser, (EvaluateArguments,))
    add_groups(parser, (DataArguments,), only=DATA_OF_EVALUATE, requires=False)
    words = [word for word in argv if not word.startswith("--local_rank=")]  # the launcher's; RANK says the same
    parsed, unknown = parser.parse_known_args(words)
    known = [*(one.name for one in fields(EvaluateArguments)), *DATA_OF_EVALUATE]
    if unknown:
        raise ConfigError(unknown_flag(unknown, known))
    given = vars(parsed)
    chosen = filled(EvaluateArguments, given)
    data = {name: given[name] for name in DATA_OF_EVALUATE if name in given}
    check_data(filled(DataArguments, data))
    if not data.get("data_path") and not chosen.tasks and not chosen.forgetting:
        raise ConfigError("nothing to evaluate: give --data_path, --tasks or --forgetting")
    for name in ("tokens_per_batch", "limit"):
        if getattr(chosen, name) is not None:
            check_at_least_one(name, getattr(chosen, name))
    for name in ("worst", "num_fewshot", "fail_below"):
        if (getattr(chosen, name) or 0) < 0:
            raise ConfigError(f"--{name} {getattr(chosen, name)}: expected 0 or more")
    if chosen.batch_size != "auto" and (not chosen.batch_size.isdigit() or int(chosen.batch_size) < 1):
        raise ConfigError(f"--batch_size {chosen.batch_size}: expected a number or auto")
    if chosen.forgetting and chosen.no_base:
        raise ConfigError("--forgetting compares with the base: leave --no_base out")
    if chosen.fail_below is not None and not chosen.forgetting:
        raise ConfigError("--fail_below is about --forgetting: give it too")
    return given["output"], chosen, data


def parse_for_doctor(argv: Sequence[str]) -> tuple[DoctorArguments, LauncherArgs, list[str]]:
    """What to examine how, the flags of the launcher, and the words of the training command.

    The script may stand between the last two, as it does for `deepspeed`, or be left out: a launcher's flag is then
    told from one of the training by its name, and a name that both know is the training's.

    Raises:
        ConfigError: a flag of the launcher without its value, or with a wrong one. The training's are not looked at.
    """
    own = Parser(
        prog="finetune doctor",
        usage="finetune doctor [FLAGS OF deepspeed] FLAGS OF THE TRAINING [--json] [--full] [--write_env] [--stage] "
        "[--rehearse]",
        description="Will this run, will it fit, and what would go wrong? Takes the command line of the training, with "
        "`finetune doctor` in place of `deepspeed finetune/finetune.py`. Ends with the status the run would end with.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_groups(own, (DoctorArguments,))
    own_names = {one.name for one in fields(DoctorArguments)}
    options, training_names = launcher_options(), set(known_flags())
    words = list(argv)
    script = next((place for place, word in enumerate(words) if _is_script(word)), None)
    ours: list[str] = []
    launcher: list[str] = []
    rest: list[str] = []
    place = 0
    while place < len(words):
        name, equals, _ = words[place].partition("=")
        is_own = name in ("-h", "--help") or name.removeprefix("--") in own_names
        is_launcher = name in options and (name.removeprefix("--") not in training_names if script is None else True)
        if is_own:
            target, takes_value = ours, not equals and words[place + 1 : place + 2] in _BOOLEANS
        elif script is not None:
            target, takes_value = (launcher if place <= script else rest), False
        else:
            target, takes_value = (launcher if is_launcher else rest), is_launcher and options[name] and not equals
        target += words[place : place + 1 + takes_value]
        place += 1 + takes_value
    chosen = filled(DoctorArguments, vars(own.parse_args(ours)))
    return chosen, parse_launcher_args(launcher if script is not None else [*launcher, OUR_SCRIPT]), rest


def _is_script(word: str) -> bool:
    return word in (OUR_MODULE, "finetune.py") or word.endswith("/finetune.py")
