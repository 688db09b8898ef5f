"""What the installed DeepSpeed reads of a config: unknown keys, wrong types, and what this toolkit does not serve.

DeepSpeed ignores keys that it does not know outside its pydantic models, and reports the others once the model is
loaded. Here its own `DeepSpeedConfig` is built from a mapping that records what is read: what it never asks for does
not exist, and the defaults that it asks with show the types.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

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
# The optimizers that DeepSpeed builds by type: module and class below `deepspeed/ops`, on the GPU and offloaded.
DEEPSPEED_CLASSES = {
    "adam": ("adam/fused_adam.FusedAdam", "adam/cpu_adam.DeepSpeedCPUAdam"),
    "adamw": ("adam/fused_adam.FusedAdam", "adam/cpu_adam.DeepSpeedCPUAdam"),
    "lion": ("lion/fused_lion.FusedLion", "lion/cpu_lion.DeepSpeedCPULion"),
    "lamb": ("lamb/fused_lamb.FusedLamb", "lamb/fused_lamb.FusedLamb"),
    "adagrad": ("", "adagrad/cpu_adagrad.DeepSpeedCPUAdagrad"),
}
NEEDS_GPU = ("lion/fused_lion.FusedLion", "lamb/fused_lamb.FusedLamb")
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
SHOWN_CHARACTERS = 60


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
        expected = _type_fault(value, default) if super().__contains__(key) else None
        if expected:
            self.root.type_faults[(*self.path, key)] = expected
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
    for key, text in list(_faults_of_sources(rest)):
        faults.append((key, text))
        remove_key(rest, key)
    return faults + (_faults_of_deepspeed(rest) if imports_deepspeed else [])


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
    misplaced = {name for section in MODELS for name in _fields_of(section)} - constants if not path else set()
    for name, value in config.items():
        key = (*path, name)
        if name not in words or name in misplaced or (own and name not in own):
            yield key, unknown_key(key, {*own} or fields | constants, lambda: fields)
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
    fields, constants = (re.findall(sign, text, re.MULTILINE) for sign in (r"^    (\w+): ", r"= ['\"](\w+)['\"]$"))
    return set(re.findall(r"\w+", text)), set(fields), set(constants)


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
    faults += [(key, unknown_key(key, names, _model_names)) for key, names in recorder.unread()]
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
        return key, unknown_key(key, set(), _model_names)
    return key, f"{'.'.join(key)} is {_text(detail['input'])}: {detail['msg']}"


def unknown_key(path: Key, siblings: set[str], others: Callable[[], set[str]] = set) -> str:
    """Say that there is no such key, with the nearest one of its section, or of the others."""
    for names in (lambda: siblings, others):
        for close in get_close_matches(path[-1], names(), n=1, cutoff=0.6):
            home = next((".".join(section) for section in MODELS if close in _fields_of(section)), "another section")
            remedy = f"it belongs to {home}" if close == path[-1] else f'did you mean "{close}"?'
            return f'"{".".join(path)}" is not a DeepSpeed key: {remedy}'
    return f'"{".".join(path)}" is not a DeepSpeed key: leave it out'


def _model_names() -> set[str]:
    """The keys of all sections that DeepSpeed declares as pydantic models."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    names: set[str] = set()
    models = [*DeepSpeedConfigModel.__subclasses__()]
    for model in models:
        models += model.__subclasses__()
        for name, declared in model.model_fields.items():
            names.add(declared.alias or name)
    return names


def optimizer_options(kind: Any, params: Mapping[str, Any], *, offloads: bool, use_cpu: bool) -> set[str]:
    """Return the names that `optimizer.params` may hold, as the sources of DeepSpeed and torch declare them.

    Raises:
        ValueError: DeepSpeed cannot build this optimizer here.
    """
    if not isinstance(kind, str):
        raise ValueError("expected a name, such as AdamW")
    name = kind.lower()
    if name == "muon":
        return {"lr", "muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps", "weight_decay", "adam_w_mode"}
    is_adam = name in ("adam", "adamw")
    path = DEEPSPEED_CLASSES.get(name, ("", ""))[offloads]
    if is_adam and params.get("torch_adam"):
        path, kind = "", "AdamW"
    if use_cpu and path in NEEDS_GPU:
        raise ValueError("its kernels need a GPU")
    library, folder = ("deepspeed", "ops") if path else ("torch", "optim")
    module, _, cls_name = (path or _torch_optimizer("Adagrad" if name == "adagrad" else kind)).partition(".")
    cls = declaration(library, f"{folder}/{module}.py", cls_name)
    [init] = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    options = {argument.arg for argument in [*init.args.args[2:], *init.args.kwonlyargs]}
    return options | ({"adam_w_mode", "torch_adam", "fp32_optimizer_states"} if is_adam else set())


def _torch_optimizer(kind: str) -> str:
    """Return the module and class of an optimizer below `torch/optim`, or raise ValueError with the nearest name."""
    text = source_folder("torch").joinpath("optim/__init__.py").read_text(encoding="utf-8")
    modules = {
        cls_name: module for module, cls_name in re.findall(r"^from torch\.optim\.(\w+) import ([A-Z]\w+)", text, re.M)
    }
    del modules["Optimizer"]
    if kind in modules:
        return f"{modules[kind]}.{kind}"
    known = {name.lower(): name for name in ("AdamW", "Adam", "Lion", "Lamb", "Muon", *modules)}
    close = get_close_matches(kind.lower(), known, n=1, cutoff=0.7)
    remedy = f'did you mean "{known[close[0]]}"?' if close else f"expected one of {', '.join(known.values())}"
    raise ValueError(f"neither DeepSpeed nor torch.optim can build it: {remedy}")


def is_tested_with_zero(kind: str) -> bool:
    """Whether DeepSpeed partitions this optimizer without `zero_allow_untested_optimizer`."""
    return kind.lower() in ("adam", "adamw", "adagrad", "lion", "muon")


def _type_fault(value: Any, default: Any) -> str | None:
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "expected true or false"
    if isinstance(default, int | float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number else "expected a number"
    if isinstance(default, dict):
        return None if isinstance(value, dict) else "expected an object"
    return None


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
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
