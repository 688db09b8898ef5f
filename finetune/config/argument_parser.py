"""The training command line and its `--config` files -> `Arguments`, checked."""

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from finetune.config.adapter_arguments import UNSERVED, AdapterArguments
from finetune.config.arguments import (
    GROUPS,
    TRAINING_DEFAULTS,
    TRAINING_HELP,
    TRANSLATED,
    Arguments,
    DataArguments,
    default_of,
    training_flags,
)
from finetune.config.command_line import as_flags
from finetune.config.flag_support import flags_without_effect, refused_flags
from finetune.config.foreign_names import FOREIGN_NAMES
from finetune.config.recipes import read_mapping, shipped_recipes, with_shipped_data
from finetune.config.saved_adapter import continue_adapter
from finetune.dataset.row_checks import REPAIRS
from finetune.dataset.row_formats import COLUMN_KEYS
from finetune.dataset.turn_reading import NOT_VARIABLES
from finetune.launcher import launcher_options
from finetune.utils.errors import ConfigError, raise_faults
from finetune.utils.hub import MODELSCOPE, modelscope_folder
from finetune.utils.options import CommandParser, OptionType, declaration, describe, fill, one_of
from finetune.utils.user_files import has_type, parse_object, read_json

REQUIRED = ("model_name_or_path", "data_path", "output_dir")
# Flags whose values are names, and where transformers lists these.
NAMED = {
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
    "eval_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "optim": ("training_args.py", "OptimizerNames"),
    "attn_implementation": ("modeling_utils.py", "AttentionInterface"),
}
EXCLUSIVE = (
    ("load_in_4bit", "load_in_8bit"), ("bf16", "fp16"), ("freeze", "train_only"),
    ("tokens_per_device_batch", "per_device_train_batch_size"),
)  # fmt: skip
OBJECTS = ("lr_scheduler_kwargs", "liger_kernel_config")  # flags of JSON objects
OF_ALL_KINDS = ("use_lora", "adapter", "adapter_config", "embedding_learning_rate")
UNSET: tuple[Any, ...] = (None, "", [], [""])
# The lowest value of each number that makes sense.
LOWEST = {
    **dict.fromkeys(
        "model_max_length preprocessing_num_workers sequence_parallel_size tokens_per_device_batch lora_r "
        "num_virtual_tokens early_stopping_patience per_device_train_batch_size per_device_eval_batch_size "
        "gradient_accumulation_steps eval_accumulation_steps dataloader_prefetch_factor torch_empty_cache_steps "
        "ddp_timeout".split(),
        1,
    ),
    **dict.fromkeys(
        "report_answers report_seconds report_samples meeting_timeout start_timeout step_timeout save_timeout "
        "early_stopping_threshold save_total_limit dataloader_num_workers eval_delay warmup_steps weight_decay "
        "max_grad_norm seed data_seed".split(),
        0,
    ),
}
OF_THE_LAUNCHER = "a flag of the launcher: type it in front of the script, or anywhere in `finetune train`"
ABOVE_0 = (
    "logging_steps", "save_steps", "eval_steps", "adam_epsilon", "loraplus_lr_ratio", "embedding_learning_rate",
    "lora_alpha",
)  # fmt: skip
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout", "validation_share")
# Of numpy; and what is a typing error on any host.
HIGHEST = {**dict.fromkeys(("seed", "data_seed"), 2**32 - 1),
           **dict.fromkeys(("dataloader_num_workers", "preprocessing_num_workers"), 1024)}  # fmt: skip


def parse(argv: Sequence[str], other_flags: Collection[str] = ()) -> Arguments:
    """Parse the training command line, without the program's name, to checked plain values.

    Args:
        other_flags: names that an unknown flag may be a misspelling of, too.
    """
    parser = build_parser()
    parser.neighbours = [*parser.neighbours, *other_flags]
    given, on_command_line, faults = read_flags(argv, parser, parser)
    given.pop("local_rank", None)  # the launcher passes it; RANK and LOCAL_RANK in the environment say the same
    raise_faults([*faults, *missing(given, REQUIRED)])
    located = locate_model(given)
    groups: list[Any] = [fill(group, given) for group in GROUPS]
    ours = {declared.name for group in GROUPS for declared in fields(group)}
    training = {name: value for name, value in given.items() if name not in ours and name not in TRANSLATED}
    notes = [*located, *_translate(given, training)]
    flags = [word.partition("=")[0] for word in as_flags(argv, parser.types)]
    twice = [name for name, shape in parser.types.items() if shape.is_list and flags.count(f"--{name}") > 1]
    notes += [f"--{name} is given twice: the last one counts; one flag takes several values" for name in twice]
    model, data, batch, adapter, run = groups
    adapter = _with_config_read(adapter)
    arguments = Arguments(model, data, batch, adapter, run, {**TRAINING_DEFAULTS, **training}, notes)
    raise_faults(_faults(arguments, on_command_line, adapter_refused=given.get("use_lora") is False))
    arguments.notes.extend(flags_without_effect(arguments))
    return arguments


def read_flags(
    argv: Sequence[str], parser: CommandParser, of_training: CommandParser
) -> tuple[dict[str, Any], set[str], list[str]]:
    """Return the flags of a command line and its recipe by name, which of them were typed, and what is wrong with them.

    Args:
        parser: of the command; it takes those flags of a recipe that are its own.
        of_training: knows all that a recipe may hold.
    """
    words = as_flags(argv, parser.types)
    given, faults = parser.read(words)
    on_command_line = {*given}
    named = [(word.partition("="), after) for word, after in pairwise([*words, ""])]
    recipes = [path or after for (flag, _, path), after in named if flag == "--config"]
    if len(recipes) > 1:
        raise ConfigError(f"--config: {' and '.join(recipes)} are given: a run has one recipe")
    if given.get("config"):
        stored, more = _from_file(Path(given["config"]), of_training)
        faults += more
        present = {old: translated.to for old, translated in TRANSLATED.items()}
        typed = {present.get(name, name) for name in given}  # under an old name or the present one
        left = {name: value for name, value in stored.items() if name in parser.types}
        given = {**{name: value for name, value in left.items() if present.get(name, name) not in typed}, **given}
    return given, on_command_line, faults


def locate_model(given: dict[str, Any]) -> list[str]:
    """Replace a model of ModelScope by its folder, and an adapter by its base and flags; return notes for the user."""
    name = given["model_name_or_path"]
    if name.startswith(MODELSCOPE):
        given["model_name_or_path"] = modelscope_folder(name, "model", ConfigError)
    return continue_adapter(given)


def build_parser() -> CommandParser:
    """Build the parser of our flags, those of the installed transformers, and the names that it has changed."""
    parser = CommandParser(
        "finetune train",
        "[RECIPE.yaml] --model_name_or_path M --data_path D --output_dir O [--flag VALUE | flag=VALUE ...]",
        *GROUPS,
        description="Fine-tune a chat model on conversations, with DeepSpeed. A recipe is a YAML file of the flags "
        "below; the command line wins. Flags of the launcher are taken too: --num_gpus N, --hostfile FILE, --include, "
        "--exclude, --max_restarts N; `finetune launch --help` lists them.",
        epilog="Flags of transformers.TrainingArguments are accepted under their own names and explained in its "
        "documentation. docs/reference/flags.md explains ours.",
    )
    parser.recipes = list(shipped_recipes())
    parser.neighbours = [name[2:] for name in launcher_options() if name.startswith("--")]
    parser.foreign = {**FOREIGN_NAMES, **dict.fromkeys(parser.neighbours, OF_THE_LAUNCHER)}
    section = parser.add_argument_group("Training (transformers.TrainingArguments)")
    for flag in training_flags().values():
        parser.add_option(section, flag.name, flag.shape, meaning(flag.name))
    section = parser.add_argument_group("Flags that transformers has renamed")
    for name, translated in TRANSLATED.items():
        if name not in training_flags():
            parser.add_option(section, name, OptionType(translated.type), f"now {translated.to}")
    return parser


def meaning(training_flag: str) -> str:
    """Return what a flag of transformers is, in our words or the first sentence of its own, with its default here."""
    own_words = training_flags()[training_flag].help.split(". ")[0].strip()
    return describe(TRAINING_HELP.get(training_flag, own_words), default_of(training_flag))


def missing(given: dict[str, Any], required: Sequence[str]) -> list[str]:
    """Return one fault that names the required flags that are not given, or are empty."""
    names = [f"--{name}" for name in required if given.get(name) in UNSET]
    return [f"missing: {', '.join(names)}"] if names else []


def _from_file(path: Path, parser: CommandParser) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of a YAML or JSON mapping, or those in the `arguments` of a run.json; and its faults."""
    values, types = read_mapping(path, f"--config {path}"), parser.types
    sections = {name: value for name, value in values.items() if isinstance(value, dict) and name not in types}
    faults = [f"{name}: a recipe has no sections: write {', '.join(map(str, value))} without it"
              for name, value in sections.items()]  # fmt: skip
    names = chain(values, *sections.values())
    faults += parser.unknown([f"--{name}" for name in names if name not in types and name not in sections])
    given = {}
    for name, value in values.items():
        if value is not None and name in types:
            try:  # YAML reads the plain words `no` and `off` as false
                given[name] = value_of(types[name], "no" if value is False and name in NAMED else value)
            except ValueError as error:
                faults.append(f"--{name} {value!r}: {error}")
    if "data_path" in given:
        given["data_path"] = with_shipped_data(path, given["data_path"])
    return given, [f"--config {path}: {fault}" for fault in faults]


def value_of(shape: OptionType, value: Any) -> Any:
    """Check a value of a file as strictly as a word on the command line; a ValueError says what was expected."""
    items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    if not shape.is_list and len(items) != 1:
        raise ValueError("takes one value")
    read = [shape.read(str(item)) for item in items]
    return read if shape.is_list else read[0]


def _translate(given: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Put translated flags under their present names; note where the name itself is gone, or both are given."""
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


def _faults(arguments: Arguments, on_command_line: Collection[str], *, adapter_refused: bool) -> Iterator[str]:
    """Yield what is wrong with values that have the right types."""
    yield from data_faults(arguments.data)
    yield from _number_faults(vars(arguments.batch) | vars(arguments.adapter) | vars(arguments.run))
    yield from _number_faults(arguments.training)
    yield from _batch_faults(arguments)
    rate, epochs, steps = (arguments.given(name) for name in ("learning_rate", "num_train_epochs", "max_steps"))
    if not rate > 0:
        yield f"--learning_rate {rate:g}: no weight would change: give one above 0, such as 2e-5"
    if not epochs > 0 and steps <= 0:
        yield f"--num_train_epochs {epochs:g}: no step would be made: give more than 0, or --max_steps"
    if steps < -1 or steps == 0:
        yield f"--max_steps {steps}: no step would be made: expected at least 1, or -1 to train by epochs"
    yield from refused_flags(arguments)
    yield from _name_faults(arguments)
    for name in OBJECTS:
        if (value := arguments.training.get(name)) and parse_object(value) is None:
            yield f'--{name} {value}: expected a JSON object such as {{"name": 1}}'
    yield from _adapter_faults(arguments.adapter)
    given = arguments.flat()
    for first, second in EXCLUSIVE:
        if given.get(first) and given.get(second):
            yield f"--{first} and --{second} exclude each other: keep one of them"
    if not adapter_refused:  # --use_lora False: the settings of a file do not count
        yield from _unused_adapter_flags(arguments.adapter, on_command_line)


def _name_faults(arguments: Arguments) -> Iterator[str]:
    """Yield values that are none of the names which transformers knows, read from its source."""
    given = {**arguments.training, "attn_implementation": arguments.model.attn_implementation}
    for name, (file, names) in NAMED.items():
        value = given.get(name)
        if value is None:
            continue
        if name == "attn_implementation" and "/" in value:  # a kernel on the hub
            if find_spec("kernels") is None:
                yield f"--{name} {value}: kernels is not installed: pip install kernels"
            continue
        nodes = [node.value for node in declaration("transformers", file, names).body if isinstance(node, ast.Assign)]
        words = [str(part.value) for node in nodes for part in ast.walk(node) if isinstance(part, ast.Constant)]
        known = [word.removeprefix("paged|") for word in words]  # "paged|eager" is that of serving
        if value not in known:
            close = [word for word in known if word.startswith(str(value))] or get_close_matches(str(value), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield f"--{name} {value}: {hint}expected {one_of(known)}"


def _number_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield numbers outside of what makes sense."""
    for name, value in values.items():
        if name in LOWEST:
            yield from below(LOWEST[name], name, value)
        if name in ABOVE_0 and value is not None and value <= 0:
            yield f"--{name} {value:g}: expected more than 0"
        if name in SHARES and value is not None and not 0 <= value < 1:
            yield f"--{name} {value}: expected a share from 0 up to 1"
        if name in HIGHEST and value is not None and value > HIGHEST[name]:
            yield f"--{name} {value}: expected at most {HIGHEST[name]}"


def data_faults(data: DataArguments) -> Iterator[str]:
    """Yield what is wrong with the flags of the data."""
    yield from _number_faults(vars(data))
    if not 0 <= data.max_dropped_rows <= 1:
        yield f"--max_dropped_rows {data.max_dropped_rows}: expected a share from 0 to 1"
    if data.validation_share and data.eval_data_path:
        yield "--validation_share and --eval_data_path exclude each other: keep one of them"
    if data.template_kwargs() is None:
        yield f'--chat_template_kwargs {data.chat_template_kwargs}: expected a JSON object such as {{"name": 1}}'
    for name in sorted(NOT_VARIABLES.intersection(data.template_kwargs() or ())):
        yield f"--chat_template_kwargs: {name} is no variable of chat templates: leave it out"
    for rule in data.repairs:
        if rule not in REPAIRS:
            yield f"--repairs {rule}: expected {one_of(tuple(REPAIRS))}"
    keys = [pair.partition("=")[0] for pair in data.columns]
    for pair, key in zip(data.columns, keys, strict=True):
        if key not in COLUMN_KEYS or not pair.partition("=")[2]:
            yield f"--columns {pair}: expected KEY=COLUMN with a key that is read, such as question, answer, system"
        elif keys.count(key) > 1:
            yield f"--columns {pair}: {key} is named twice: keep one of them"


def below(least: int, name: str, value: float | None) -> Iterator[str]:
    """Yield a fault where a number that was given is below the least that makes sense."""
    if value is not None and value < least:
        yield f"--{name} {value}: expected {'at least 1' if least else '0 or more'}"


def _adapter_faults(adapter: AdapterArguments) -> Iterator[str]:
    for name in ("modules_to_save", "freeze", "train_only"):
        for word in getattr(adapter, name):
            names = re.split("[,\uff0c\u3001]", word)
            if len(names) > 1 and all(re.fullmatch(r"[\w.-]+", part) for part in names):
                yield f"--{name} {word}: write names with spaces between them: {' '.join(names)}"
    if adapter.use_lora and adapter.adapter not in (None, "lora"):
        yield f"--use_lora True and --adapter {adapter.adapter} exclude each other: keep one of them"
    options = adapter.peft_options()
    start = options.get("init_lora_weights", True)
    if not isinstance(start, bool) and not re.fullmatch(r"gaussian|pissa(_niter_[1-9]\d*)?|olora", start):
        yield f"--init_lora_weights {start}: expected default, gaussian, pissa, pissa_niter_16 (any number) or olora"
    elif options.get("use_dora") and adapter.starts_from_weights():
        yield f"--use_dora True and --init_lora_weights {start} exclude each other: keep one of them"
    if adapter.adapter_config and (adapter.use_lora or adapter.adapter):
        yield "--adapter_config and --use_lora or --adapter exclude each other: the file says what is trained"
    elif method := UNSERVED.get(options["peft_type"]):
        yield f"--adapter_config: {method}"
    yield from adapter.unserved_options()


def _with_config_read(adapter: AdapterArguments) -> AdapterArguments:
    """Replace the file of `--adapter_config` by what it holds, which run.json keeps."""
    given = adapter.adapter_config
    if not given:
        return replace(adapter, adapter_config=None)
    try:
        options = (
            json.loads(given)
            if given.lstrip().startswith("{")
            else read_json(Path(given).expanduser(), f"--adapter_config {given}")
        )
    except ValueError as error:
        raise ConfigError(f"--adapter_config {given}: not JSON: {error}") from None
    if not isinstance(options, dict) or not isinstance(options.get("peft_type"), str):
        raise ConfigError(f'--adapter_config {given}: expected a JSON object with a method, such as "peft_type": "IA3"')
    if not has_type(options.get("modules_to_save"), list[str] | None):
        raise ConfigError(f"--adapter_config {given}: modules_to_save {options['modules_to_save']}: expected a list")
    return replace(adapter, adapter_config=json.dumps(options, sort_keys=True))


def _unused_adapter_flags(adapter: AdapterArguments, on_command_line: Collection[str]) -> Iterator[str]:
    """Yield flags that shape an adapter while all parameters, or another adapter, would be trained."""
    kind = adapter.kind()
    trained = f"a {kind} adapter" if kind else "all parameters"
    for declared in fields(adapter):
        name = declared.name
        is_typed = name in on_command_line and getattr(adapter, name) is not False  # a file also holds defaults
        if name in OF_ALL_KINDS or getattr(adapter, name) in (*UNSET, *(() if is_typed else (default_of(name),))):
            continue
        if name in ("freeze", "train_only"):
            if kind:
                yield f"--{name}: {trained} is trained, and all of the base is frozen: leave one of them out"
        elif adapter.adapter_config and name != "loraplus_lr_ratio":
            yield f"--adapter_config and --{name} exclude each other: the file says it"
        elif name == "num_virtual_tokens":
            if kind not in ("prefix", "prompt"):
                yield _unused(name, trained, "--adapter prefix or prompt")
        elif kind != "lora":
            yield _unused(name, trained, "--use_lora True")


def _unused(name: str, trained: str, remedy: str) -> str:
    return f"--{name} is given, but {trained} would be trained: add {remedy}, or leave it out"


def _batch_faults(arguments: Arguments) -> Iterator[str]:
    batch, budget = arguments.batch, arguments.batch.tokens_per_device_batch
    if budget is not None and batch.batching == "packed":
        yield (
            "--tokens_per_device_batch and --batching packed exclude each other: packed rows hold "
            "--model_max_length tokens; for another number use --batching flat"
        )
