"""Our own flags and their defaults; and those of `transformers.TrainingArguments`, read without importing it.

This is the only home of a default of ours.
"""

import ast
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from finetune.config.adapter_arguments import AdapterArguments
from finetune.conversation import ChatSettings
from finetune.utils.options import OptionType, declaration, default_of_field, fill, option
from finetune.utils.user_files import parse_object

# The one repository whose code is trusted without the flag: it cannot load otherwise, and this project grew out of it.
# Only at the newest commit of its main branch, which is named: a revision may be a pull request by anyone.
TRUSTED_WITHOUT_FLAG = ("deeplang-ai/LingoWhale-8B",)


def needs_no_trust(name: str, revision: str | None = None) -> bool:
    """Whether a model's Python files run without the flag; never those of a folder called like it, or of a revision."""
    return name in TRUSTED_WITHOUT_FLAG and revision is None and not Path(name).exists()


VERIFY_KEY_HELP = "name of an environment variable with a key: a checkpoint needs a manifest signed with it (HMAC)"


@dataclass(frozen=True)
class Translated:
    """A flag that transformers had once: its new name, and the new value where it is not the old one."""

    type: type
    to: str
    values: Callable[[Any], Any] = lambda value: value


TRANSLATED = {
    "warmup_ratio": Translated(float, "warmup_steps"),  # a share of all steps when below 1
    "gradient_checkpointing": Translated(bool, "activation_checkpointing"),
    "gradient_checkpointing_kwargs": Translated(str, "activation_checkpointing_kwargs"),
    "group_by_length": Translated(bool, "train_sampling_strategy", lambda on: "group_by_length" if on else "random"),
    "evaluation_strategy": Translated(str, "eval_strategy"),
    "no_cuda": Translated(bool, "use_cpu"),
    "per_gpu_train_batch_size": Translated(int, "per_device_train_batch_size"),
}


@dataclass(frozen=True)
class TrainingFlag:
    """A field of `TrainingArguments` as its source declares it; `default` is None where it is computed there."""

    name: str
    shape: OptionType
    default: Any
    help: str


LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")


@cache
def training_flags() -> dict[str, TrainingFlag]:
    """The fields of the installed `transformers.TrainingArguments`, read from its source with `ast`."""
    body = declaration("transformers", "training_args.py", "TrainingArguments").body
    declared = [node for node in body if isinstance(node, ast.AnnAssign)]
    flags = [_training_flag(node, node.value) for node in declared if isinstance(node.value, ast.Call)]
    return {flag.name: flag for flag in flags}


def _training_flag(node: ast.AnnAssign, field_call: ast.Call) -> TrainingFlag:
    kinds = {part.strip() for part in ast.unparse(node.annotation).split("|")}
    kind: type = next((kind for kind in (bool, int, float) if kind.__name__ in kinds), str)
    keywords = {keyword.arg: keyword.value for keyword in field_call.keywords}
    metadata = _literal(keywords.get("metadata")) or {}
    if "str" in kinds and kind is bool:
        kind = str
    name, default = ast.unparse(node.target), _literal(keywords.get("default"))
    choices = LOG_LEVELS if name.startswith("log_level") else tuple(metadata.get("choices", ()))
    return TrainingFlag(name, OptionType(kind, "list[str]" in kinds, choices), default, metadata.get("help", ""))


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


@dataclass(frozen=True)
class ModelArguments:
    """The model."""

    model_name_or_path: str = option(
        "", "folder or hub name (`modelscope:` before one there) of a causal language model, or an adapter (required)"
    )
    adapter_name_or_path: str | None = option(
        None, "adapter to continue from, on this model; as `--model_name_or_path` an adapter brings its own base"
    )
    model_revision: str | None = option(
        None,
        "commit, tag or branch of a model on the hub: its config, tokenizer, weights and code; default: the newest of "
        "`main`",
    )
    trust_remote_code: bool = option(
        False,
        "run the Python files that come with the model; without it such a model is refused, and nothing of it runs "
        f"(`{TRUSTED_WITHOUT_FLAG[0]}` needs no flag, except with `--model_revision`)",
    )
    allow_missing_weights: bool = option(
        False,
        "weights that the files lack, such as those of a new head, start at random instead of being an error; with an "
        "adapter only those of layers in `--modules_to_save`: others would not be saved",
    )
    attn_implementation: str | None = option(
        None,
        "attention backend of transformers; default: flash attention where it runs, else `sdpa`, else `eager`; a "
        "fallback is logged",
    )
    load_in_4bit: bool = option(
        False, "quantize the frozen base to 4 bits while it loads (QLoRA: NF4, double quantization); with LoRA"
    )
    load_in_8bit: bool = option(False, "quantize the frozen base to 8 bits while it loads (LLM.int8); with LoRA")
    new_tokens: list[str] = option([], "tokens to add to the vocabulary; their embeddings are trained, with LoRA too")

    def __post_init__(self) -> None:
        # A shell does not expand `--flag=~/model`.
        object.__setattr__(self, "model_name_or_path", os.path.expanduser(self.model_name_or_path))

    def trusts_code(self) -> bool:
        """Whether the model's own Python files may run."""
        return self.trust_remote_code or needs_no_trust(self.model_name_or_path, self.model_revision)

    def tokenizer_source(self) -> tuple[str, str | None, bool]:
        """Where the tokenizer is (with the adapter, if that has one), its revision, and whether its code may run."""
        own, trusts_code = self.adapter_name_or_path, self.trusts_code()
        # the one repository that is trusted without the flag is not the adapter's
        if own and (Path(own) / "tokenizer_config.json").is_file() and trusts_code == self.trust_remote_code:
            return own, None, trusts_code
        return self.model_name_or_path, self.model_revision, trusts_code

    def quantized_bits(self) -> int | None:
        """4, 8, or None for weights as they are stored."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def is_lingowhale(self) -> bool:
        """Whether the name says that this is LingoWhale, or a copy of it."""
        return "lingowhale" in self.model_name_or_path.lower()


@dataclass(frozen=True)
class DataArguments:
    """The data."""

    data_path: list[str] = option(
        [], "conversations: files, folders, globs, data set names; `FILE:0.5` takes half of its rows (required)"
    )
    eval_data_path: list[str] = option([], "held-out conversations to evaluate on while training, as `--data_path`")
    validation_share: float = option(0.0, "hold out this share of the conversations of `--data_path` instead, 0 to 1")
    model_max_length: int = option(2048, "tokens of the longest example; see `--too_long`")
    too_long: Literal["turns", "windows", "drop", "error"] = option(
        "turns", "a longer conversation keeps its first turns, is split into windows, is dropped, or stops the run"
    )
    train_on: Literal["model_turns", "last_model_turn"] = option("model_turns", "which turns are supervised")
    bad_rows: Literal["error", "drop"] = option("error", "rows with a fault stop the run, or are dropped")
    max_dropped_rows: float = option(0.01, "share of the rows that `--bad_rows drop` may drop, 0 to 1")
    allow_seen_held_out: bool = option(
        False, "held-out examples that equal a training example are a note instead of an error"
    )
    repairs: list[str] = option(
        [],
        "rules for rows: `merge_turns`, `drop_last_human`, `drop_duplicates`, `undeclared_tools`, `ignore_verdicts` "
        "(labels, scores)",
    )
    columns: list[str] = option(
        [], "columns with other names than those that are read, e.g. `question=Q answer=A system=S`"
    )
    data_cache_dir: str | None = option(None, "where prepared data is kept; default: `~/.cache/finetune/data`")
    preprocessing_num_workers: int | None = option(
        None, "processes that prepare data; default: 1 for small data, else one per core, at most 16"
    )
    chat_template: str | None = option(
        None, "`lingowhale`, `chatml`, `hermes` (ChatML with tools) or a Jinja file; default: the tokenizer's own"
    )
    chat_template_kwargs: str | None = option(
        None, """variables for the chat template as JSON, e.g. '{"enable_thinking": false}'; a row's own come first"""
    )
    reasoning: Literal["learn", "context", "drop"] = option(
        "learn", "reasoning of model turns is supervised, is read but not supervised, or is left out"
    )
    history: Literal["as_served", "as_is"] = option(
        "as_served",
        "where a template writes an answer otherwise once other turns follow, it becomes an example of its own behind "
        "the prompt of serving, or is supervised as it is written",
    )
    content_tokens: list[str] = option(
        [],
        "added tokens that human turns may use as tokens, too, e.g. `'<think>'`; in model turns all that are not "
        "special are tokens, all others are plain text",
    )
    human_token_ids: list[int] = option(
        [*ChatSettings.human_token_ids], "LingoWhale format: the marker before a human turn"
    )
    model_token_ids: list[int] = option(
        [*ChatSettings.model_token_ids], "LingoWhale format: the marker before a model turn"
    )

    def template_kwargs(self) -> dict[str, Any] | None:
        """Return the variables for the chat template; None if they are not a JSON object."""
        return parse_object(self.chat_template_kwargs or "{}")

    def chat_settings(self) -> ChatSettings:
        """Return how conversations are rendered."""
        return fill(ChatSettings, {**vars(self), "template_kwargs": self.template_kwargs()})


@dataclass(frozen=True)
class BatchArguments:
    """The batches."""

    batching: Literal["flat", "padded", "packed"] = option(
        "flat", "padding-free rows of whole conversations, padded rows, or rows packed up to `--model_max_length`"
    )
    tokens_per_device_batch: int | None = option(
        None, "a micro-batch holds up to this many tokens, instead of `--per_device_train_batch_size` rows"
    )
    loss_weighting: Literal["token", "conversation"] = option(
        "token", "the loss is a mean over the supervised tokens of a step, or over its conversations"
    )
    sequence_parallel_size: int = option(1, "ranks that share each conversation (DeepSpeed Ulysses)")


@dataclass(frozen=True)
class RunArguments:
    """The run."""

    config: str | None = option(
        None, "YAML or JSON file with flags (a `run.json` repeats its run); the command line wins"
    )
    overwrite_output_dir: bool = option(False, "move an earlier run in `--output_dir` aside; nothing is deleted")
    allow_inexact_resume: bool = option(False, "resume from a checkpoint although the numbers will differ; recorded")
    skip_rows: list[str] = option(
        [], "files that name rows to skip from now on: `non_finite_rows.jsonl`, or lines like `data.json:17`"
    )
    resume_world_size: Literal["same", "any"] = option(
        "same", "ranks that resume from a checkpoint: the `same` number, or `any`, with the same global batch"
    )
    verify_key: str | None = option(None, VERIFY_KEY_HELP)
    meeting_timeout: int = option(60, "seconds until all ranks must have reached the rendezvous; 0: no limit")
    start_timeout: int = option(1800, "seconds that loading may take without progress, and the first step; 0: no limit")
    step_timeout: int | None = option(
        None, "seconds that a step may take; default: ten times the usual, at least 300; 0: no limit"
    )
    save_timeout: int = option(1800, "seconds that a save may take; 0: no limit")
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations in a row without a lower held-out loss"
    )
    early_stopping_threshold: float = option(0.0, "by how much it has to be lower to count")
    write_report: bool = option(True, "write `report.html` at the end; `finetune report OUTPUT` writes it at any time")
    report_answers: int = option(3, "prompts of the data that base and result answer for the report; 0: none")
    report_seconds: int = option(30, "seconds that these answers may take, loading included")
    report_samples: int = option(
        8, "rows of the data that `output_dir` keeps, with their text, for the report; 0: none"
    )


@dataclass(frozen=True)
class DoctorArguments:
    """How a run is examined."""

    json: bool = option(False, "print the findings as one JSON object")
    full: bool = option(False, "compare every byte of data and model between the hosts, not samples of large files")
    write_env: bool = option(False, "write a `.deepspeed_env` that names the network interface which joins the hosts")
    stage: bool = option(False, "copy code, data and model to the hosts that lack them, with rsync")
    rehearse: bool = option(
        False, "run all of it with a small random model: two steps, save, verify, resume, load; about a minute"
    )


@dataclass(frozen=True)
class Arguments:
    """All of a command line. `training` holds only the `TrainingArguments` that were given, by their present names."""

    model: ModelArguments
    data: DataArguments
    batch: BatchArguments
    adapter: AdapterArguments
    run: RunArguments
    training: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def flat(self) -> dict[str, Any]:
        """Every flag by name, as `--config` reads it back."""
        ours = {**asdict(self.model), **asdict(self.data), **asdict(self.batch), **asdict(self.adapter)}
        return {**ours, **{name: value for name, value in self.training.items() if name not in SECRETS}}

    @property
    def output_dir(self) -> Path:
        """Where the result goes."""
        return Path(self.training["output_dir"]).expanduser()

    def given(self, name: str) -> Any:
        """A training flag as given, else transformers' default."""
        return self.training.get(name, training_flags()[name].default)

    def was_given(self, name: str) -> bool:
        """Whether the user gave this training flag, or it has another value than ours."""
        return name in self.training and self.training[name] != TRAINING_DEFAULTS.get(name)

    def given_flags(self) -> dict[str, Any]:
        """Return the training flags that the user gave, without secrets."""
        return {name: value for name, value in self.training.items() if self.was_given(name) and name not in SECRETS}

    def resumes_from(self) -> str | None:
        """`auto`, the folder of a checkpoint, or None."""
        value = self.given("resume_from_checkpoint")
        if value is None or str(value).lower() in ("", "false", "no", "none"):
            return None
        return "auto" if str(value).lower() in ("auto", "true", "yes") else str(value)

    def evaluates(self) -> bool:
        """Whether conversations are held out."""
        return bool(self.data.eval_data_path) or self.data.validation_share > 0


SECRETS = ("hub_token",)  # never written to run.json
GROUPS = (ModelArguments, DataArguments, BatchArguments, AdapterArguments, RunArguments)
# The collator makes exactly the columns that are needed; what libraries warn about is said by rank 0 alone; a loss that
# is not finite is shown as that, and not as the mean of those before it. Two checkpoints: of an 8B model each takes
# about 100 GB.
TRAINING_DEFAULTS = {
    "remove_unused_columns": False,
    "log_level_replica": "error",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "save_total_limit": 2,
}
# What --help and README.md say of those flags of transformers that mean more here, or that this project names itself.
TRAINING_HELP = {
    "output_dir": "where the result goes; one that holds a run is refused, see `--overwrite_output_dir` (required)",
    "per_device_train_batch_size": "conversations of a micro-batch, on each rank",
    "gradient_accumulation_steps": "micro-batches of a step, on each rank; the plan writes out how many conversations "
    "that is",
    "deepspeed": "a DeepSpeed JSON, or the name of a shipped one: `zero1` `zero2` `zero3` `zero2_offload` "
    "`zero3_offload` `zero3_nvme` `zeropp` `zero2_muon` `zero3_muon`",
    "bf16": "compute in bfloat16 (default on a GPU that has it); False: float32",
    "fp16": "compute in float16, with a loss scale",
    "tf32": "multiply float32 matrices in TF32; off, with a note, where the hardware cannot",
    "logging_steps": "steps from one line of `metrics.jsonl` to the next; the first and the last are always logged",
    "resume_from_checkpoint": "resume: `auto` from the newest complete checkpoint, if any, or from this folder",
    "save_total_limit": "checkpoints that are kept, and the best one; 0: all",
    "eval_strategy": "when held-out conversations are evaluated: `no`, `steps` or `epoch`; default: `epoch`",
    "per_device_eval_batch_size": "conversations of a micro-batch that is evaluated, on each rank; default: as "
    "`--per_device_train_batch_size`",
    "report_to": "trackers, e.g. `tensorboard`, `wandb`, `mlflow`; one that is not installed is an error",
}


def default_of(name: str) -> Any:
    """What a flag is when it is not given, by its name without dashes; None for an unknown one."""
    for group in GROUPS:
        for flag_field in fields(group):
            if flag_field.name == name:
                return default_of_field(flag_field)
    flag = training_flags().get(name)
    return TRAINING_DEFAULTS.get(name, flag.default if flag else None)
