"""No flag of training is dead: each is given two values, and what the code makes of them differs."""

import json
import shutil
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import peft
import pytest
import safetensors.torch
from transformers import LlamaForCausalLM

from finetune import train
from finetune.cli.preview import NOT_OF_PREVIEW, parse_options
from finetune.config import parse
from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.arguments import GROUPS
from finetune.config.deepspeed_config import DeepSpeedFlags
from finetune.config.hardware import DetectedHardware
from finetune.config.run_config import RankCounts
from finetune.distributed.watchdog.coordinator import PhaseTimeouts, RankProgress
from finetune.models.adapters import attach_adapter
from finetune.models.loader import inspect_model, load_tokenizer
from finetune.training.data_setup import load_data, prepare_run_data
from finetune.training.dataloaders import build_dataloaders
from finetune.training.fit import TrainingInputs, fit
from finetune.training.run_start import set_timeouts, skip_rows
from finetune.utils.errors import FinetuneError
from tests.helpers.logs import logged
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.tiers import mostly_slow

Words = list[str]


@pytest.fixture(scope="module")
def named(tiny_model, conversation_file, tmp_path_factory) -> Callable[..., Words]:
    """The required flags, and files that some cases name."""
    folder = tmp_path_factory.mktemp("flags")
    bad = [*ROWS, [("human", "Nobody answers")], [("human", "a"), ("human", "b"), ("model", "c")]]
    write_rows(folder / "bad.json", bad)
    write_rows(folder / "held_out.json", [[("human", "1+1?"), ("model", "2")]])
    (folder / "named.json").write_text('[{"Q": "1+1?", "A": "2"}]')
    thought = "<think>\nr\n</think>\n\n"
    write_rows(folder / "reasoned.json", [[("human", "a"), ("model", f"{thought}b"), ("human", "c"), ("model", "d")]])
    (folder / "kwargs.jinja").write_text(
        "{% for m in messages %}{{ '' if short is defined else '<|im_start|>' }}{{ m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    )
    (folder / "last.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ 'so: ' if loop.last }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    )
    (folder / "skip").write_text(f"{conversation_file}:1\n")
    shutil.copytree(tiny_model, folder / "lacking")
    weights = folder / "lacking/model.safetensors"
    safetensors.torch.save_file(
        {name: one for name, one in safetensors.torch.load_file(weights).items() if name != "model.norm.weight"},
        weights,
    )
    (folder / "flags.yaml").write_text("seed: 7\n")
    (folder / "held").mkdir()
    (folder / "held/checkpoint-1").mkdir()
    shape = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), shape).save_pretrained(folder / "adapter")
    own = load_tokenizer(str(tiny_model), trust_remote_code=False)
    own.add_tokens(["<own>"])
    own.save_pretrained(folder / "adapter")
    required = ["--model_name_or_path", str(tiny_model), "--data_path", str(conversation_file)]

    def words(text: str) -> Words:
        text = text.replace("DIR", str(folder)).replace("DATA", str(conversation_file))
        return [*required, "--output_dir", str(folder / "output"), *text.split()]

    return words


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def baselines() -> dict[Any, str]:
    """What was observed without a flag, by the observer and the other flags."""
    return {}


# ---- what the training command's flags change; each of these runs the code that a run runs


def prepared(words: Words, _: Any) -> Any:
    """The rows as they are rendered, and what is said; or the error."""
    arguments = parse(words)
    try:
        with logged() as said:
            tokenizer, _, data = prepare_run_data(arguments.model, arguments.data)
    except FinetuneError as error:
        return str(error)
    rows = [(one.status, [(part.input_ids, part.labels) for part in one.examples]) for one in data.renderings()]
    return arguments.model.model_name_or_path, len(tokenizer), rows, said, data.folder.parent, data.evaluation


def approved(words: Words, _: Any) -> Any:
    """Whether a run starts with this data, and what it holds out."""
    arguments = parse(words)
    try:
        _, _, data = load_data(arguments.model, arguments.data)
    except FinetuneError as error:
        return str(error)
    return data.held_out(42) and len(data.held_out(42).examples), skip_rows(data, arguments.run.skip_rows).skipped_rows


def processes(words: Words, monkeypatch: Any) -> Any:
    """How many processes prepare the data."""
    from finetune.dataset import prepare

    seen, real = [], prepare.stored_batches
    monkeypatch.setattr(
        prepare, "stored_batches", lambda reader, renderer, count, *_: seen.append(count) or real(reader, renderer, 1)
    )
    with TemporaryDirectory() as folder:
        prepared([*words, "--data_cache_dir", folder], None)
    return seen


def examined(words: Words, _: Any) -> Any:
    """What is decided before anything is read."""
    try:
        config, _ = train.resolve(parse(words), DetectedHardware(), RankCounts(2, 2))
    except FinetuneError as error:
        return str(error)
    return config.hardware, config.deepspeed and config.deepspeed.config, config.checkpoint.overwrite, config.notes


def settled(words: Words, monkeypatch: Any) -> Any:
    """How conversations become batches."""
    import torch
    from transformers import AutoModelForCausalLM

    arguments = parse([*words, "--use_cpu", "True"])
    tokenizer, _, data = prepare_run_data(arguments.model, arguments.data)
    base = AutoModelForCausalLM.from_pretrained(arguments.model.model_name_or_path)
    config, _ = train.resolve(arguments, DetectedHardware(), RankCounts(1, 1))
    batches = build_dataloaders(config.batch, base, tokenizer, data, torch.device("cpu"), None).train
    sampler = batches.sampler
    return sampler.batching, sampler.capacity, batches.collate.weighting, len(batches)


def attached(words: Words, _: Any) -> Any:
    """What is trained, and from which numbers it starts."""
    import torch
    from transformers import AutoModelForCausalLM

    arguments = parse(words)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(arguments.model.model_name_or_path)
    info = inspect_model(arguments.model, "sdpa")
    adapted = attach_adapter(base, arguments.adapter, info, load_tokenizer(info.name, trust_remote_code=False))
    weights = [
        (name, one.shape, one.requires_grad, float(one.detach().double().sum()))
        for name, one in adapted.named_parameters()
    ]
    return weights, str(getattr(adapted, "peft_config", None)), str(adapted)


def limited(words: Words, monkeypatch: Any) -> Any:
    """How long the watchdog of rank 0 lets a rank stay in each phase."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("finetune.distributed.watchdog.watchdog_client._send", told.append)
    set_timeouts(parse(words).run)
    timeouts = PhaseTimeouts(**next(message["timeouts"] for message in told if "timeouts" in message))
    return timeouts.rendezvous, [timeouts.of(RankProgress(phase)) for phase in ("model", "step", "save")]


def stopped(words: Words, monkeypatch: Any) -> Any:
    """Whether a run ends at these held-out losses."""
    control = SimpleNamespace(should_training_stop=False)
    callbacks: list[Any] = []
    trainer = SimpleNamespace(
        add_callback=callbacks.append, train_from_checkpoint=lambda: None, keep_base_tensors=lambda _: None
    )
    monkeypatch.setattr("finetune.training.trainer.SupervisedTrainer", lambda **_: trainer)
    monkeypatch.setattr("finetune.training.fit._peak_flops", lambda _: None)
    held_out = parse([*words, "--validation_share", "0.5"])
    config, _ = train.resolve(held_out, DetectedHardware(), RankCounts(1, 1))
    inputs = TrainingInputs(*[None] * 6, SimpleNamespace(kinds=None))  # type: ignore[arg-type]
    fit(inputs, SimpleNamespace(folder=None), config)
    history = [{"eval_loss": loss} for loss in (2.0, 1.9, 1.8, 1.79)]
    for one in callbacks:
        if hasattr(one, "patience"):
            one.on_evaluate(None, SimpleNamespace(log_history=history), control)
    return control.should_training_stop


def reported(words: Words, monkeypatch: Any) -> Any:
    """What is asked of the page about the run."""
    asked: list[Any] = []
    monkeypatch.setattr("finetune.report.write_at_the_end", lambda folder, **how: asked.append(how) or "")
    train.write_report(parse(words).run, Path("output"), was_stopped=False)
    return asked


def parsed(words: Words, _: Any) -> Any:
    return parse(words).flat()


REASONED = "--data_path DIR/reasoned.json"
# flag -> (what shows its effect, other flags, the flag with a value that makes a difference; "" is without it)
SHOWN: dict[str, tuple[Callable[[Words, Any], Any], str, str]] = {
    "model_name_or_path": (prepared, "", "--model_name_or_path DIR/nowhere"),
    "adapter_name_or_path": (prepared, "", "--adapter_name_or_path DIR/adapter"),
    "new_tokens": (prepared, "", "--new_tokens <new>"),
    "allow_missing_weights": (examined, "--model_name_or_path DIR/lacking", "--allow_missing_weights True"),
    "attn_implementation": (examined, "", "--attn_implementation eager"),
    "data_path": (prepared, "", "--data_path DIR/held_out.json"),
    "eval_data_path": (prepared, "", "--eval_data_path DIR/held_out.json"),
    "validation_share": (approved, "", "--validation_share 0.5"),
    "model_max_length": (prepared, "", "--model_max_length 30"),
    "too_long": (prepared, "--model_max_length 50", "--too_long windows"),
    "train_on": (prepared, "", "--train_on last_model_turn"),
    "bad_rows": (prepared, "--data_path DIR/bad.json", "--bad_rows drop"),
    "max_dropped_rows": (approved, "--data_path DIR/bad.json --bad_rows drop", "--max_dropped_rows 0.9"),
    "allow_seen_held_out": (approved, "--eval_data_path DATA", "--allow_seen_held_out True"),
    "repairs": (prepared, "--data_path DIR/bad.json", "--repairs merge_turns"),
    "columns": (prepared, "--data_path DIR/named.json", "--columns question=Q answer=A"),
    "data_cache_dir": (prepared, "", "--data_cache_dir DIR/cache"),
    "preprocessing_num_workers": (processes, "", "--preprocessing_num_workers 3"),
    "chat_template": (prepared, "", "--chat_template lingowhale"),
    "chat_template_kwargs": (prepared, "--chat_template DIR/kwargs.jinja", '--chat_template_kwargs {"short":true}'),
    "reasoning": (prepared, f"{REASONED} --chat_template DIR/kwargs.jinja", "--reasoning context"),
    "history": (prepared, f"{REASONED} --reasoning drop --chat_template DIR/last.jinja", "--history as_is"),
    "content_tokens": (prepared, "", "--content_tokens <|im_end|>"),
    "human_token_ids": (prepared, "--chat_template lingowhale", "--human_token_ids 5"),
    "model_token_ids": (prepared, "--chat_template lingowhale", "--model_token_ids 6"),
    "batching": (settled, "", "--batching packed"),
    "tokens_per_device_batch": (settled, "", "--tokens_per_device_batch 100"),
    "loss_weighting": (settled, "", "--loss_weighting conversation"),
    "sequence_parallel_size": (examined, "--deepspeed zero2", "--sequence_parallel_size 2"),
    "use_lora": (attached, "", "--use_lora True"),
    "adapter": (attached, "", "--adapter prompt"),
    "lora_r": (attached, "--use_lora True", "--lora_r 4"),
    "lora_alpha": (attached, "--use_lora True", "--lora_alpha 4"),
    "lora_dropout": (attached, "--use_lora True", "--lora_dropout 0.5"),
    "lora_target_modules": (attached, "--use_lora True", "--lora_target_modules q_proj"),
    "use_dora": (attached, "--use_lora True", "--use_dora True"),
    "use_rslora": (attached, "--use_lora True", "--use_rslora True"),
    "init_lora_weights": (attached, "--use_lora True", "--init_lora_weights gaussian"),
    "modules_to_save": (attached, "--use_lora True", "--modules_to_save lm_head"),
    "num_virtual_tokens": (attached, "--adapter prompt", "--num_virtual_tokens 3"),
    "adapter_config": (attached, "", '--adapter_config {"peft_type":"IA3"}'),
    "freeze": (attached, "", "--freeze embed_tokens"),
    "train_only": (attached, "", "--train_only layers.1-"),
    "config": (parsed, "", "--config DIR/flags.yaml"),
    "overwrite_output_dir": (examined, "--output_dir DIR/held", "--overwrite_output_dir True"),
    "skip_rows": (approved, "", "--skip_rows DIR/skip"),
    "meeting_timeout": (limited, "", "--meeting_timeout 4"),
    "start_timeout": (limited, "", "--start_timeout 4"),
    "step_timeout": (limited, "", "--step_timeout 4"),
    "save_timeout": (limited, "", "--save_timeout 4"),
    "early_stopping_patience": (stopped, "--early_stopping_threshold 0.5", "--early_stopping_patience 3"),
    "early_stopping_threshold": (stopped, "--early_stopping_patience 3", "--early_stopping_threshold 0.5"),
    "write_report": (reported, "", "--write_report False"),
    "report_seconds": (reported, "", "--report_seconds 5"),
}
# Those whose effect needs real ranks, a launcher, other hosts or a trained model have tests of their own.
ELSEWHERE = {
    "model_revision", "trust_remote_code", "verify_key", "allow_inexact_resume", "resume_world_size", "report_answers",
    "report_samples", "load_in_4bit", "load_in_8bit", "embedding_learning_rate", "loraplus_lr_ratio",
}  # fmt: skip

# What they do to rows has tests of its own; here each prepares data twice.
IN_SLOW_TIER = {
    "validation_share", "too_long", "bad_rows", "max_dropped_rows", "allow_seen_held_out", "columns",
    "preprocessing_num_workers", "human_token_ids", "history",
}  # fmt: skip


@pytest.mark.parametrize("flag", mostly_slow(SHOWN, SHOWN.keys() - IN_SLOW_TIER))
def test_a_flag_has_an_effect(flag, named, baselines, monkeypatch):
    observe, others, given = SHOWN[flag]
    assert f"--{flag} " in given
    if (observe, others) not in baselines:
        baselines[observe, others] = str(observe(named(others), monkeypatch))
    assert str(observe(named(f"{others} {given}"), monkeypatch)) != baselines[observe, others]


@pytest.mark.parametrize(
    "observe",
    [
        one
        for one in dict.fromkeys(one[0] for one in SHOWN.values())
        if one not in (parsed, limited, reported, processes)
    ],
)
def test_nothing_differs_without_a_flag(observe, named, baselines, monkeypatch):
    others = next(others for shown_by, others, _ in SHOWN.values() if shown_by is observe)
    again = str(observe(named(others), monkeypatch))
    assert baselines.setdefault((observe, others), again) == again


def test_every_flag_of_training_has_an_entry():
    names = [one.name for group in GROUPS for one in fields(group)]
    assert len(names) > 45
    assert sorted([*SHOWN, *ELSEWHERE]) == sorted(names)


# ---- keys of a --config file


def test_every_flag_is_a_key_of_a_config_file(tmp_path):
    required = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    seen = 0
    for group in GROUPS:
        for one in fields(group):
            if one.name in ("config", "adapter_name_or_path"):  # the value of either is read
                continue
            value = another_value(one, typing.get_type_hints(group)[one.name])
            path = tmp_path / f"{one.name}.json"
            path.write_text(json.dumps({one.name: value}))
            # Alone, what shapes an adapter is refused.
            shapes = group is AdapterArguments and one.name not in ("use_lora", "adapter")
            beside = ["--output_dir", "o", *(("--use_lora", "False") if shapes else ())]
            found = parse(["--config", str(path), *beside, *absent(required[:4], one.name)])
            assert any(asdict(part).get(one.name) == value for part in (
                found.model, found.data, found.batch, found.adapter, found.run)), one.name  # fmt: skip
            seen += 1
    assert seen > 45


def absent(words: Words, flag: str) -> Words:
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if name != f"--{flag}" for word in (name, value)]


def another_value(one: Any, hint: Any) -> Any:
    """A value of the flag's type that is not its default."""
    parts = (hint, *typing.get_args(hint))
    choices = [choice for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]
    default = one.default_factory() if one.default is MISSING else one.default
    if choices:
        return next(choice for choice in choices if choice != default)
    special = {
        "repairs": ["merge_turns"], "columns": ["question=Q"], "init_lora_weights": "pissa",
        "adapter_config": '{"peft_type": "IA3"}', "attn_implementation": "eager",
        "chat_template_kwargs": '{"enable_thinking": false}',
    }  # fmt: skip
    if one.name in special:
        return special[one.name]
    kind = next(kind for kind in ("bool", "int", "float", "str") if kind in str(hint))
    value = {"bool": default is not True, "int": 5, "float": 0.25, "str": "other"}[kind]
    return [value] if "list" in str(hint) else value


# ---- "auto" in a DeepSpeed JSON


def test_every_flag_that_fills_an_auto_does_so(named, tmp_path):
    """A key that is "auto" gets the flag's value; those of transformers alone stay until the model is known."""
    config = {
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto"}},
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"},
    }  # fmt: skip
    (tmp_path / "all.json").write_text(json.dumps(config))
    words = named(f"--deepspeed {tmp_path / 'all.json'}")
    before = examined(words, None)[1]
    assert "auto" not in json.dumps(before)
    changes = {"per_device_train_batch_size": "3", "gradient_accumulation_steps": "5", "max_grad_norm": "0.5",
               "learning_rate": "0.25", "adam_beta1": "0.5", "adam_beta2": "0.5", "adam_epsilon": "0.5",
               "weight_decay": "0.75"}  # fmt: skip
    compared = {"precision", "precision_was_replaced", "lr_scheduler_type", "warmup_steps", "max_steps", "given"}
    assert {*changes, *compared} == set(DeepSpeedFlags.__dataclass_fields__)
    for flag, value in changes.items():
        assert examined([*words, f"--{flag}", value], None)[1] != before, flag


# ---- the flags that preview shares


def test_preview_takes_those_flags_of_training_that_change_what_is_shown():
    taken = {one.name for group in GROUPS[:2] for one in fields(group)} - set(NOT_OF_PREVIEW)
    assert len(taken) > 15
    for name in taken & SHOWN.keys() - {"max_dropped_rows", "allow_seen_held_out"}:  # which test_preview.py covers
        assert SHOWN[name][0] in (prepared, processes), name
    for name in NOT_OF_PREVIEW:
        with pytest.raises(FinetuneError, match=f"unknown flag --{name}"):
            parse_options(["--model_name_or_path", "m", "--data_path", "d", f"--{name}", "0.5"])
