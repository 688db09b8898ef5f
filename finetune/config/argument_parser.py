"""Words on a command line and values in a file -> the dataclasses of `flags`."""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from finetune.config.arguments import (
    GROUPS,
    TRAINING_DEFAULTS,
    TRAINING_HELP,
    AdapterArguments,
    Arguments,
    DataArguments,
    default_of,
)
from finetune.config.training_flags import TRANSLATED, training_flags
from finetune.dataset.row_checks import REPAIRS
from finetune.utils.errors import ConfigError

REQUIRED = ("model_name_or_path", "data_path", "output_dir")
UNSET = (None, "", [], [""])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message[0].lower() + message[1:])


def parse(argv: Sequence[str]) -> Arguments:
    """A command line (without the program's name) -> checked plain values.

    Raises:
        ConfigError: an unknown flag (with the closest known one), a value of the wrong type, a missing flag, a
            `--config` that cannot be read.
    """
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(unknown_flag(unknown, known_flags()))
    given = vars(parsed)
    if given.get("config"):
        stored = _from_file(Path(given["config"]))
        given = {**{name: value for name, value in stored.items() if not _same_flag(name, given)}, **given}
    given.pop("local_rank", None)  # the launcher passes it; RANK and LOCAL_RANK in the environment say the same
    missing = [name for name in REQUIRED if given.get(name) in UNSET]
    if missing:
        raise ConfigError("missing: " + ", ".join(f"--{name}" for name in missing))
    groups = [filled(group, given) for group in GROUPS]
    ours = {one.name for group in GROUPS for one in fields(group)}
    training = {name: value for name, value in given.items() if name not in ours and name not in TRANSLATED}
    notes = _translate(given, training)
    arguments = Arguments(*groups, training={**TRAINING_DEFAULTS, **training}, notes=notes)
    _check_pairs(arguments)
    if given.get("use_lora") is not False:  # who says so knows that the settings of a file do not count
        _check_that_the_adapter_is_asked_for(arguments.adapter)
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser; a flag that is not given leaves no trace in its result."""
    parser = Parser(
        usage="deepspeed [--hostfile=FILE] finetune/finetune.py --model_name_or_path M --data_path D --output_dir O",
        description="Fine-tune a chat model on conversations, with DeepSpeed.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="Flags of transformers.TrainingArguments are accepted under their own names and explained in its "
        "documentation. README.md explains ours.",
    )
    add_groups(parser, GROUPS)
    section = parser.add_argument_group("Training (transformers.TrainingArguments)")
    for flag in training_flags().values():
        _add(section, flag.name, flag.kind, flag.is_list, None, meaning(flag.name))
    section = parser.add_argument_group("Flags that transformers has renamed")
    for name, translated in TRANSLATED.items():
        if name not in training_flags():
            _add(section, name, translated.type, False, None, f"now {translated.to}")
    return parser


def known_flags() -> list[str]:
    """Every accepted flag name, without dashes."""
    return sorted(_shapes())


def add_groups(
    parser: argparse.ArgumentParser, groups: Sequence[type], only: Sequence[str] = (), *, requires: bool = True
) -> None:
    for group in groups:
        section = parser.add_argument_group(group.__doc__.rstrip("."))
        hints = typing.get_type_hints(group)
        for one in fields(group):
            if only and one.name not in only:
                continue
            kind, is_list, choices = _shape(hints[one.name])
            text = meaning_of(one) if requires else meaning_of(one).removesuffix(" (required)")
            _add(section, one.name, kind, is_list, choices, text)


def meaning(training_flag: str) -> str:
    """What a flag of transformers is, in our words or the first sentence of its own, with its default here."""
    own_words = training_flags()[training_flag].help.split(". ")[0].strip()
    return _with_default(TRAINING_HELP.get(training_flag, own_words), default_of(training_flag))


def meaning_of(flag: Field[Any]) -> str:
    """What a flag of ours is, with its default."""
    return _with_default(flag.metadata["help"], default_of(flag.name))


def _with_default(text: str, default: Any) -> str:
    typed = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return text if default in (None, "", []) or "default:" in text else f"{text} [{typed}]"


def filled(group: type, given: dict[str, Any]) -> Any:
    return group(**{one.name: given[one.name] for one in fields(group) if one.name in given})


def _add(section: Any, name: str, kind: type, is_list: bool, choices: Any, text: str) -> None:
    plain = text.replace("`", "").replace("%", "%%")
    options: dict[str, Any] = {"help": plain, "choices": choices, "type": _converter(kind)}
    if is_list:
        options.update(nargs="*", metavar=kind.__name__)
    elif kind is bool:
        options.update(nargs="?", const=True, metavar="True|False")
    elif not choices:
        options.update(metavar=kind.__name__)
    section.add_argument(f"--{name}", **options)


def _shape(hint: Any) -> tuple[type, bool, list[str] | None]:
    """(type, takes several values, choices).

    `str | None` -> (str, False, None); `list[int]` -> (int, True, None); `Literal["a"] | None` -> (str, False, ["a"])
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, None
    if typing.get_origin(hint) is Literal:
        return str, False, list(typing.get_args(hint))
    return hint, False, None


def _shapes() -> dict[str, tuple[type, bool, list[str] | None]]:
    """(type, takes several values, choices) of every accepted flag."""
    hints = {name: hint for group in GROUPS for name, hint in typing.get_type_hints(group).items()}
    return {
        **{name: (translated.type, False, None) for name, translated in TRANSLATED.items()},
        **{name: (flag.kind, flag.is_list, None) for name, flag in training_flags().items()},
        **{name: _shape(hint) for name, hint in hints.items()},
    }


def _converter(kind: type) -> typing.Callable[[str], Any]:
    return _boolean if kind is bool else kind


def _boolean(text: str) -> bool:
    spelled = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in spelled:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return spelled[text.lower()]


def _same_flag(name: str, given: dict[str, Any]) -> bool:
    """Whether the command line gives this flag, under its present or an old name."""
    present = {old: translated.to for old, translated in TRANSLATED.items()}
    return present.get(name, name) in {present.get(one, one) for one in given}


def unknown_flag(words: Sequence[str], known: Sequence[str]) -> str:
    flag = next((word for word in words if word.startswith("--")), None)
    if flag is None:
        return f"unexpected argument {words[0]!r}: every value belongs to a flag"
    name = flag[2:].partition("=")[0]
    close = get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    hint = f": did you mean --{close[0]}?" if close else ": see --help"
    return f"unknown flag --{name}{hint}"


def _from_file(path: Path) -> dict[str, Any]:
    """Flags from a YAML or JSON mapping, or from the `arguments` of a run.json."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    import yaml

    try:
        values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if isinstance(values, dict) and isinstance(values.get("arguments"), dict):
        values = values["arguments"]
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of flags to values")
    shapes = _shapes()
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in shapes:
            raise ConfigError(f"--config {path}: " + unknown_flag([f"--{name}"], list(shapes)))
        given[name] = _from_value(path, name, value, *shapes[name])
    return given


def _from_value(path: Path, name: str, value: Any, kind: type, is_list: bool, choices: list[str] | None) -> Any:
    """One value of a file, checked as strictly as a word on the command line."""
    items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    if not is_list and len(items) != 1:
        raise ConfigError(f"--config {path}: --{name} takes one value, found {value!r}")
    try:
        read = [_converter(kind)(str(item)) for item in items]
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"--config {path}: --{name}: expected {kind.__name__}, found {value!r}") from None
    if choices and read[0] not in choices:
        raise ConfigError(f"--config {path}: --{name}: expected {', '.join(choices)}, found {value!r}")
    return read if is_list else read[0]


def _translate(given: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Put translated flags under their present names; say so where the name itself is gone, or both are given."""
    notes = []
    for old, translated in TRANSLATED.items():
        if old not in given:
            continue
        value = translated.values(given[old])
        if training.setdefault(translated.to, value) != value:
            notes.append(f"--{old} {given[old]} is not used: --{translated.to} {training[translated.to]} is given too")
            continue
        if old not in training_flags() and old != "warmup_ratio":
            notes.append(f"--{old} is now --{translated.to} {training[translated.to]}")
    ratio = given.get("warmup_ratio")
    if ratio is not None and not 0 <= ratio < 1:
        raise ConfigError(f"--warmup_ratio {ratio}: expected a share from 0 up to 1; --warmup_steps takes a number")
    return notes


def _check_pairs(arguments: Arguments) -> None:
    adapter, data = arguments.adapter, arguments.data
    if adapter.use_lora and adapter.adapter not in (None, "lora"):
        raise ConfigError(f"--use_lora True and --adapter {adapter.adapter} exclude each other: keep one of them")
    start = adapter.init_lora_weights
    if not re.fullmatch(r"default|gaussian|pissa(_niter_[1-9]\d*)?|olora", start):
        raise ConfigError(
            f"--init_lora_weights {start}: expected default, gaussian, pissa, pissa_niter_16 (any number) or olora"
        )
    if adapter.use_dora and start not in ("default", "gaussian"):
        raise ConfigError(f"--use_dora True and --init_lora_weights {start} exclude each other: keep one of them")
    check_data(data)
    _check_batches(arguments)
    _check_that_something_is_learned(arguments)
    check_at_least_one("lora_r", adapter.lora_r)
    check_at_least_one("num_virtual_tokens", adapter.num_virtual_tokens)
    for name in ("report_answers", "report_seconds", "report_samples"):
        if getattr(arguments.run, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments.run, name)}: expected 0 or more")
    if not 0 <= adapter.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout {adapter.lora_dropout}: expected a share from 0 up to 1")


def _check_that_the_adapter_is_asked_for(adapter: AdapterArguments) -> None:
    """What shapes an adapter must not be passed over while all parameters, or another adapter, are trained."""
    kind = adapter.kind()
    for one in fields(adapter):
        if one.name in ("use_lora", "adapter") or getattr(adapter, one.name) in (default_of(one.name), *UNSET):
            continue
        kinds = ("prefix", "prompt") if one.name == "num_virtual_tokens" else ("lora",)
        if kind not in kinds:
            wanted = "--use_lora True" if kinds == ("lora",) else "--adapter prefix or prompt"
            trained = f"a {kind} adapter" if kind else "all parameters"
            raise ConfigError(f"--{one.name} is given, but {trained} would be trained: add {wanted}, or leave it out")


def _check_that_something_is_learned(arguments: Arguments) -> None:
    rate, epochs, steps = (arguments.given(name) for name in ("learning_rate", "num_train_epochs", "max_steps"))
    if not rate > 0:
        raise ConfigError(f"--learning_rate {rate:g}: nothing would be learned: give one above 0, such as 2e-5")
    if not epochs > 0 and steps <= 0:
        raise ConfigError(f"--num_train_epochs {epochs:g}: no step would be made: give more than 0, or --max_steps")


def _check_batches(arguments: Arguments) -> None:
    batch, budget = arguments.batch, arguments.batch.tokens_per_device_batch
    check_at_least_one("sequence_parallel_size", batch.sequence_parallel_size)
    if budget is not None:
        check_at_least_one("tokens_per_device_batch", budget)
        if "per_device_train_batch_size" in arguments.training:
            raise ConfigError(
                "--tokens_per_device_batch and --per_device_train_batch_size exclude each other: keep one of them"
            )
        if batch.batching == "packed":
            raise ConfigError(
                "--tokens_per_device_batch and --batching packed exclude each other: packed rows hold "
                "--model_max_length tokens; for another number use --batching flat"
            )


def check_data(data: DataArguments) -> None:
    check_at_least_one("model_max_length", data.model_max_length)
    if data.preprocessing_num_workers is not None:
        check_at_least_one("preprocessing_num_workers", data.preprocessing_num_workers)
    if not 0 <= data.max_dropped_rows <= 1:
        raise ConfigError(f"--max_dropped_rows {data.max_dropped_rows}: expected a share from 0 to 1")
    if not 0 <= data.validation_share < 1:
        raise ConfigError(f"--validation_share {data.validation_share:g}: expected a share from 0 to 1")
    if data.validation_share and data.eval_data_path:
        raise ConfigError("--validation_share and --eval_data_path exclude each other: keep one of them")
    unknown = [rule for rule in data.repairs if rule not in REPAIRS]
    if unknown:
        raise ConfigError(f"--repairs {unknown[0]}: expected {' or '.join(REPAIRS)}")


def check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name} {value}: expected at least 1")
