"""What the installed DeepSpeed reads of a config: unknown keys, wrong types, and what this toolkit does not serve.

DeepSpeed ignores keys that it does not know outside its pydantic models, and reports the others once the model is
loaded. Here its own `DeepSpeedConfig` is built from a mapping that records what is read: what it never asks for does
not exist, and the defaults that it asks with show the types.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from finetune.utils.errors import shorten
from finetune.utils.options import declaration, source_folder

Key = tuple[str, ...]
# Refused unless absent or one of these values: key -> (values, why).
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bfloat16": ((), 'the old name of "bf16": write that'),
    "tensor_parallel.autotp_size": ((0, 1), "tensor parallelism is not served: it counts the ranks in another way"),
    "tensor_parallel.tp.tp_size": ((1,), "tensor parallelism is not served: it counts the ranks in another way"),
    "use_data_before_expert_parallelism": ((False,), "expert parallelism is not served"),
    "expert_parallel": (({},), "expert parallelism is not served"),
    "pipeline": (({},), "pipeline parallelism is not served"),
    "data_efficiency.enabled": ((False,), "the sampler of this toolkit draws the batches"),
    "hybrid_engine.enabled": ((False,), "it is for reinforcement learning"),
    "autotuning.enabled": ((False,), "the step must keep its size"),
    "weight_quantization": ((), "it is for inference"),
    "torch_autocast.enabled": ((False,), "--bf16 and --fp16 decide the precision"),
    "gradient_allreduce_op": (("mean",), "the loss is a mean over the ranks"),
    "managed_gradient_accumulation": ((True,), "--gradient_accumulation_steps needs it"),
    "dataloader_drop_last": ((False,), "--dataloader_drop_last decides"),
    "datastates_ckpt": ((False,), "a checkpoint is complete when its manifest is written"),
    "checkpoint.writer": ((None,), "a checkpoint is complete when its manifest is written"),
    "checkpoint.checkpoint_serialization": ((True,), "no checkpoint can be read without"),
    "checkpoint.load_universal": ((False,), "--resume_world_size any sets it where it is needed"),
    "checkpoint.use_node_local_storage": ((False,), "it follows from whether the hosts share --output_dir"),
    "checkpoint.parallel_write.pipeline_stage": ((False,), "pipeline parallelism is not served"),
    "zero_optimization.elastic_checkpoint": ((False,), "give --resume_world_size any to resume on other ranks"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "DeepSpeed quantizes before weights are there"),
    "zero_optimization.zenflow": ((None,), "it updates parameters with old gradients"),
}
# Compared with the flags elsewhere.
DECIDED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 1,
    "gradient_clipping": 1.0,
}
# Sections that are read before DeepSpeed sees the config.
SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "bf16", "fp16",
    "optimizer", "optimizer.params", "scheduler", "scheduler.params", "activation_checkpointing", "data_types",
)  # fmt: skip
# Those that DeepSpeed declares as a pydantic model: its file and name; and types of fields as they are written there.
MODELS: dict[Key, tuple[str, str]] = {
    ("zero_optimization",): ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    ("zero_optimization", "offload_param"): ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    ("zero_optimization", "offload_optimizer"): (
        "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    ("bf16",): ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    ("fp16",): ("runtime/precision_config.py", "DeepSpeedFP16Config"),
}  # fmt: skip
TYPES: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "Optional[bool]": bool,
    "OffloadDeviceEnum": Literal["none", "cpu", "nvme"],
}  # fmt: skip
FREE_FORM = (("optimizer", "params"), ("scheduler", "params"))
NAME_OF_READERS = re.compile("config|constants")  # modules of DeepSpeed that read or declare keys
COMMENT_MARKS = ("_", "//", "#")


class ReadRecorder(dict):
    """A config that records the keys that are asked for, and faults of the types of their values."""

    def __init__(self, values: Mapping[str, Any], path: Key = (), root: ReadRecorder | None = None) -> None:
        self.root = self if root is None else root
        self.path, self.keys_read = path, set[str]()
        if root is None:
            self.last: Key = ()
            self.type_faults: dict[Key, str] = {}
        super().__init__(
            {
                key: ReadRecorder(value, (*path, key), self.root) if isinstance(value, dict) else value
                for key, value in values.items()
            }
        )

    def _note(self, key: str) -> None:
        self.keys_read.add(key)
        if super().__contains__(key):
            self.root.last = (*self.path, key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        value = super().get(key, default)
        if super().__contains__(key) and (expected := _expected(value, default)):
            self.root.type_faults[(*self.path, key)] = f"expected {expected}"
        return value

    def keys(self) -> Any:
        """Return self: DeepSpeed writes `key in config.keys()`."""
        return self

    def __iter__(self) -> Iterator[str]:
        """Iterate; with a method of its own, `Model(**section)` reads each key through `__getitem__`."""
        return iter(list(super().keys()))

    def unread(self) -> Iterator[tuple[Key, set[str]]]:
        """Yield the path of each key that was never asked for, and the keys of its section that were."""
        if self.path in FREE_FORM:
            return
        for key, value in self.items():
            if self.keys_read and key not in self.keys_read:
                yield (*self.path, key), self.keys_read
            elif isinstance(value, ReadRecorder):
                yield from value.unread()


def _expected(value: Any, default: Any) -> str | None:
    """Return what a value that is read with this default should be; None if it is."""
    for kinds, noun in ((bool, "true or false"), (int | float, "a number"), (dict, "an object")):
        if isinstance(default, kinds):
            return None if isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool) else noun
    return None


def without_comments(config: Any) -> Any:
    """Return the config without keys that start with `_`, `//` or `#`: people write comments so."""
    if not isinstance(config, dict):
        return config
    return {key: without_comments(value) for key, value in config.items() if not key.startswith(COMMENT_MARKS)}


def schema_faults(config: Mapping[str, Any], *, imports_deepspeed: bool = True) -> list[tuple[Key, str]]:
    """Return what DeepSpeed would ignore or refuse, and what this toolkit does not serve: keys, and what is wrong.

    Batch sizes and clipping are not looked at: the flags decide them. Without the import, which takes seconds, only
    what DeepSpeed's sources show is found.
    """
    rest: dict[str, Any] = json.loads(json.dumps({**config, **DECIDED}))
    optimizer = rest.get("optimizer") or {}
    if not isinstance(optimizer.get("type", ""), str):
        optimizer["type"] = "AdamW"  # `optimizer_options` says what is wrong
    faults = []
    for dotted, (allowed, why) in UNSERVED.items():
        key = tuple(dotted.split("."))
        section = section_of(rest, key)
        if section is None or key[-1] not in section:
            continue
        value = section[key[-1]]
        if not any(type(value) is type(other) and value == other for other in allowed):
            faults.append((key, f"{dotted} is {_text(value)}: {why}: leave it out"))
            remove_key(rest, key)
    of_sources = [*_faults_of_sources(rest)]
    for key, _ in of_sources:
        remove_key(rest, key)
    return [*faults, *of_sources, *(_faults_of_deepspeed(rest) if imports_deepspeed else [])]


def section_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections that are read here and are no objects."""
    for dotted in SECTIONS:
        key = tuple(dotted.split("."))
        value = (section_of(config, key) or {}).get(key[-1], {})
        if not isinstance(value, dict) and (value is not None or dotted == "zero_optimization"):
            yield f"{dotted} is {_text(value)}: expected an object"


def _faults_of_sources(config: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield keys that are no word of DeepSpeed's or belong to another section, and values of another type."""
    from pydantic import TypeAdapter, ValidationError

    words, fields, constants = _words_of_deepspeed()
    own = _fields_of(path)
    misplaced = set() if path else {name for section in MODELS for name in _fields_of(section)} - constants
    for name, value in config.items():
        key = (*path, name)
        if name not in words or name in misplaced or (own and name not in own):
            yield key, unknown_key(key, own or fields | constants)
        elif isinstance(value, dict) and key not in FREE_FORM:
            yield from _faults_of_sources(value, key)
        elif value != "auto" and own.get(name) in TYPES:
            try:
                TypeAdapter(TYPES[own[name]]).validate_python(value)
            except ValidationError as error:
                yield key, f"{'.'.join(key)} is {_text(value)}: {error.errors()[0]['msg']}"


@cache
def _words_of_deepspeed() -> tuple[set[str], set[str], set[str]]:
    """Return all words of the modules that read a config, and those that are declared as a field, and as a constant."""
    modules = [path for path in source_folder("deepspeed").rglob("*.py") if NAME_OF_READERS.search(path.stem)]
    text = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    signs = (r"\w+", r"(?:^    |alias=['\"])(\w+)(?:: |['\"])", r"= ['\"](\w+)['\"]$")
    words, fields, constants = (set(re.findall(sign, text, re.MULTILINE)) for sign in signs)
    return words, fields, constants


@cache
def _fields_of(section: Key) -> dict[str, str]:
    """Return the fields of DeepSpeed's model of a section, by name and alias, with their types as they are written."""
    fields: dict[str, str] = {}
    for node in declaration("deepspeed", *MODELS[section]).body if section in MODELS else ():
        if isinstance(node, ast.AnnAssign):
            options = node.value.keywords if isinstance(node.value, ast.Call) else []
            names = [ast.unparse(node.target), *(ast.literal_eval(o.value) for o in options if o.arg == "alias")]
            fields |= dict.fromkeys(names, ast.unparse(node.annotation))
    return fields


def unknown_key(path: Key, siblings: Collection[str]) -> str:
    """Say that there is no such key, with the nearest one of its section, or of any."""
    _, fields, _ = _words_of_deepspeed()
    for names in (siblings, () if path[:-1] in FREE_FORM else fields):
        for close in get_close_matches(path[-1], names, n=1, cutoff=0.6):
            home = next((".".join(section) for section in MODELS if close in _fields_of(section)), None)
            if close != path[-1] or home:
                remedy = f"it belongs to {home}" if close == path[-1] else f'did you mean "{close}"?'
                return f'"{".".join(path)}" is not a DeepSpeed key: {remedy}'
    return f'"{".".join(path)}" is not a DeepSpeed key: leave it out'


def _faults_of_deepspeed(config: dict[str, Any]) -> list[tuple[Key, str]]:
    """Build DeepSpeed's config until it is accepted, each time without what it refused."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    faults: list[tuple[Key, str]] = []
    recorder, error = _build(config)
    while error is not None:
        new = _refusals(config, recorder, error)
        faults += new
        if not [key for key, _ in new if remove_key(config, key)]:
            return faults
        recorder, error = _build(config)
    faults += [(key, f"{_shown(config, key)}: {text}") for key, text in recorder.type_faults.items()]
    faults += [(key, unknown_key(key, names)) for key, names in recorder.unread()]
    for name in config.get("zero_optimization", {}):
        field = DeepSpeedZeroConfig.model_fields.get(name)
        extra = field.json_schema_extra if field else None
        if isinstance(extra, dict) and extra.get("deprecated"):
            key = ("zero_optimization", name)
            faults.append((key, f"zero_optimization.{name} is deprecated: write {extra['new_param']} instead"))
    return faults


def _build(config: dict[str, Any]) -> tuple[ReadRecorder, Exception | None]:
    """Build DeepSpeed's config; return what it read, and why it was refused."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    recorder = ReadRecorder(config)
    try:
        DeepSpeedConfig(recorder)
    except (DeepSpeedConfigError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        return recorder, error
    return recorder, None


def _refusals(config: dict[str, Any], recorder: ReadRecorder, error: Exception) -> list[tuple[Key, str]]:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return [_model_fault(config, recorder.last[:1], detail) for detail in error.errors()]
    for key in (recorder.last, *((name,) for name in config)):  # some checks come after all keys are read
        trial = json.loads(json.dumps(config))
        remove_key(trial, key)
        if repr(_build(trial)[1]) != repr(error):
            is_type = isinstance(error, AttributeError | TypeError)
            text = "DeepSpeed cannot read a value of this type" if is_type else f"DeepSpeed refuses it: {error}"
            return [(key, f"{_shown(config, key)}: {recorder.type_faults.get(key, text)}")]
    return [((), f"DeepSpeed refuses it: {error}")]


def _model_fault(config: dict[str, Any], section: Key, detail: Mapping[str, Any]) -> tuple[Key, str]:
    inner = tuple(map(str, detail["loc"]))
    key = (*section, *inner)
    if section_of(config, key) is None:  # a model of several sections
        key = inner
    if detail["type"] == "extra_forbidden":
        return key, unknown_key(key, ())
    return key, f"{'.'.join(key)} is {_text(detail['input'])}: {detail['msg']}"


def section_of(config: Any, key: Key) -> dict[str, Any] | None:
    """Return the section that holds a key, or None."""
    for part in key[:-1]:
        config = config.get(part) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else None


def remove_key(config: dict[str, Any], key: Key) -> bool:
    """Remove a value, or what of its sections there is; return whether anything was removed."""
    for length in range(len(key), 0, -1):
        section = section_of(config, key[:length])
        if section is not None and key[length - 1] in section:
            del section[key[length - 1]]
            return True
    return False


def _shown(config: dict[str, Any], key: Key) -> str:
    return f"{'.'.join(key)} is {_text((section_of(config, key) or {}).get(key[-1] if key else ''))}"


def _text(value: Any) -> str:
    return shorten(json.dumps(value, default=str))
