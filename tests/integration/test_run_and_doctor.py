"""What ends a run before the data are read ends the doctor with the same status and the same first line.

Both resolve the command line in this process; some are also run on a rank of its own. A line of the tables has the
fault and how the message begins, or the key of the DeepSpeed JSON that it names.
"""

import contextlib
import copy
import io
import json
from pathlib import Path

import pytest

from finetune.cli import doctor
from finetune.config import parse
from finetune.config.deepspeed_config import find_config, load_config
from finetune.config.hardware import DetectedHardware
from finetune.config.run_config import RankCounts
from finetune.train import resolve
from finetune.utils.errors import FinetuneError
from tests.helpers import ranks

HELD_OUT = "--validation_share 0.5"
BY_STEPS = f"--save_strategy steps --eval_strategy steps {HELD_OUT}"
FLAG_FAULTS = {
    "--lr_scheduler_type cosin": "",
    "--lr_scheduler_type cosine --lr_scheduler_kwargs cycles=2": "--lr_scheduler_kwargs cycles=2: expected a JSON",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}': "",
    '--lr_scheduler_type linear --lr_scheduler_kwargs {"num_cycles":2}': '--lr_scheduler_kwargs {"num_cycles":2}: ',
    '--lr_scheduler_type constant --lr_scheduler_kwargs {"num_cycles":2}': "",
    "--lr_scheduler_type cosine_with_min_lr": "",
    "--lr_scheduler_type warmup_stable_decay": "",
    '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":1}': "",
    "--lr_scheduler_type reduce_lr_on_plateau": "",
    "--optim adamw": "",
    "--optim galore_adamw": "--optim galore_adamw",
    "--optim lomo": "",
    "--optim galore_adamw --optim_target_modules all-linear": "--optim galore_adamw",
    "--optim sgd --optim_args momentum": "--optim_args momentum: ",
    "--adam_beta1 1.5": "",
    "--adam_epsilon 0": "",
    "--weight_decay -0.1": "",
    "--max_grad_norm -1": "",
    "--label_smoothing_factor -1": "",
    "--warmup_steps -1": "",
    f"--eval_strategy epochs {HELD_OUT}": "--eval_strategy epochs",
    "--save_strategy sometimes": "",
    f"--load_best_model_at_end True --save_strategy epoch --eval_strategy steps --eval_steps 2 {HELD_OUT}":
        "--load_best_model_at_end True --save_strategy epoch --eval_strategy steps: ",
    f"--load_best_model_at_end True --save_steps 3 --eval_steps 2 {BY_STEPS}": "--load_best_model_at_end True",
    "--load_best_model_at_end True": "--load_best_model_at_end",
    "--push_to_hub True": "",
    "--debug all": "",
    "--dataloader_prefetch_factor 2": "",
    "--logging_steps 1.5": "",
    "--logging_steps 0": "",
    "--save_steps 0": "",
    "--save_steps -1": "",
    f"--eval_strategy steps --eval_steps 0 {HELD_OUT}": "--eval_steps 0: ",
    "--per_device_train_batch_size 0": "",
    "--per_device_train_batch_size -2": "",
    f"--per_device_eval_batch_size 0 {HELD_OUT}": "--per_device_eval_batch_size 0",
    "--gradient_accumulation_steps 0": "",
    "--dataloader_num_workers -1": "",
    "--torch_empty_cache_steps 0": "",
    "--save_total_limit -1": "",
    "--max_steps 0": "",
    "--max_steps -5": "",
    "--seed -1": "",
    "--seed 4294967296": "",
    "--fsdp full_shard --deepspeed zero2": "--fsdp full_shard",
    "--deepspeed zero9": "",
    "--use_lora True --lora_r 0": "--lora_r 0",
    "--model_name_or_path no/such/folder": "",
}  # fmt: skip
# Changes of zero2.json, the flags beside it, and what the message names.
JSON_FAULTS = [
    ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type cosine", ("WarmupLR", "--lr_scheduler_type is cosine")),
    ({"scheduler": {"type": "OneCycle"}}, "", ("scheduler.type", "OneCycle")),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.1}}}, "--learning_rate 1e-4",
     ("scheduler.params.warmup_max_lr is 0.1", "--learning_rate is 0.0001")),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}}, "--warmup_steps 9",
     ("warmup_num_steps is 5", "--warmup_steps is 9")),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_step": 5}}}, "", ("total_num_steps",)),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.3}}}, "", ("weight_decay is 0.3", "--weight_decay")),
    ({"optimizer": {"type": "AdamW"}}, "--optim adafactor", ('optimizer.type is "AdamW"', "--optim is adafactor")),
    ({"optimizer": {"type": "OneBitAdam"}}, "", ("OneBitAdam",)),
    ({"optimizer": {"type": "Lion"}}, "", ("Lion", "GPU")),
    ({"optimizer": {"type": "SGD"}}, "", ("zero_allow_untested_optimizer",)),
    ({"optimizer": {"type": "AdamW", "params": {"epsilon": 1}}}, "", ("optimizer.params.epsilon",)),
    ({"gradient_cliping": 1.0, "zero_optimization.reduce_bucket_sise": 1}, "", ("2 faults",)),
    ({"zero_optimization.offload_optimizer": {"devce": "cpu"}}, "", ("offload_optimizer.devce", '"device"')),
    ({"zero_optimization.reduce_bucket_size": "much"}, "", ("zero_optimization.reduce_bucket_size",)),
    ({"zero_optimization.cpu_offload": True}, "", ("cpu_offload is deprecated", "offload_optimizer")),
    ({"zero_optimization.elastic_checkpoint": True}, "", ("elastic_checkpoint",)),
    ({"fp16.loss_scale": "big"}, "", ("fp16.loss_scale",)),
    ({"bfloat16": {"enabled": True}}, "", ("bfloat16", "bf16")),
    ({"amp": {"enabled": True}}, "", ("amp",)),
    ({"elasticity": {"enabled": True}}, "", ("elasticity",)),
    ({"curriculum_learning": {"enabled": True}}, "", ("curriculum_learning",)),
    ({"data_efficiency": {"enabled": True}}, "", ("data_efficiency.enabled",)),
    ({"sparse_attention": {"mode": "fixed"}}, "", ("sparse_attention",)),
    ({"compression_training": {}}, "", ("compression_training",)),
    ({"nebula": {"enabled": False}}, "", ("nebula",)),
    ({"autotuning": {"enabled": True}}, "", ("autotuning.enabled",)),
    ({"pipeline": {"stages": 2}}, "", ("pipeline",)),
    ({"hybrid_engine": {"enabled": True}}, "", ("hybrid_engine.enabled",)),
    ({"tensor_parallel": {"autotp_size": 2}}, "", ("tensor_parallel.autotp_size",)),
    ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "", ("tensor_parallel.tp.tp_size",)),
    ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "", ("expert_parallel",)),
    ({"use_data_before_expert_parallelism": True}, "", ("use_data_before_expert_parallelism",)),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, "", ("checkpoint.writer",)),
    ({"wall_clock_breakdown": "yes"}, "", ("wall_clock_breakdown", "true or false")),
    ({"communication_data_type": "fp64"}, "", ("communication_data_type",)),
    ({"gradient_allreduce_op": "sum"}, "", ("gradient_allreduce_op",)),
    ({"sequence_parallel_size": 2}, "", ("sequence_parallel_size is 2", "--sequence_parallel_size is 1")),
    ({"optimizer": 5}, "", ("optimizer is 5",)),
]  # fmt: skip
# The kinds that used to differ, on a rank of its own.
ON_A_RANK = [
    "--lr_scheduler_type cosin", "--optim galore_adamw", "--per_device_train_batch_size 0", "--max_steps 0",
]  # fmt: skip
HARMLESS = {
    "_comment": "mine",
    "zero_optimization.//": "bucket sizes are those of the documentation",
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
    "steps_per_print": 5,
    "wall_clock_breakdown": False,
    "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False},
    "tensor_parallel": {"autotp_size": 1},
}


@pytest.fixture
def base(tiny_model, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    data = tmp_path / "data.json"
    data.write_text('[{"id": 0}]')  # what is wrong with the flags comes first
    named = ["--model_name_or_path", str(tiny_model), "--data_path", str(data), "--bad_rows", "drop"]
    return [*named, "--output_dir", str(tmp_path / "out")]


def changed_config(changes: dict, folder: Path) -> Path:
    """zero2.json with these values, by dotted keys, in a file."""
    config = copy.deepcopy(load_config(find_config("zero2")))
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[last] = value
    path = folder / "mine.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def run_ends(words: list[str]) -> tuple[int, str]:
    """Status and message of the run, up to the data."""
    try:
        resolve(parse(words), DetectedHardware(), RankCounts(1, 1))
    except FinetuneError as error:
        return error.status, str(error)
    return 0, ""


def doctor_ends(words: list[str]) -> tuple[int, str]:
    """Status and first message of `finetune doctor`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        doctor.main([*words, "--json", "--num_accelerators", "1"])
    found = json.loads(output.getvalue())
    return found["status"], next(finding["text"] for finding in found["findings"] if finding["status"])


def faults_in(message: str) -> set[str]:
    return {line.strip() for line in message.splitlines() if not line.endswith(" faults:")}


def assert_both_end_alike(words: list[str]) -> str:
    """The doctor stops at what is seen before torch is imported."""
    status, message = run_ends(words)
    status_of_doctor, first = doctor_ends(words)
    assert (status, status_of_doctor) == (2, 2)
    assert faults_in(first) <= faults_in(message)
    return message


@pytest.mark.parametrize(("flags", "begins"), FLAG_FAULTS.items(), ids=list(FLAG_FAULTS))
def test_a_fault_of_the_flags(flags, begins, base):
    message = assert_both_end_alike([*base, *flags.split()])
    assert message.startswith(begins or flags)


@pytest.mark.parametrize(("changes", "flags", "named"), JSON_FAULTS, ids=[str(list(one[0])) for one in JSON_FAULTS])
def test_a_fault_of_the_deepspeed_json(changes, flags, named, base, tmp_path):
    path = changed_config(changes, tmp_path)
    message = assert_both_end_alike([*base, "--deepspeed", str(path), *flags.split()])
    assert [part for part in (*named, str(path)) if part not in message] == []


def test_what_is_harmless_ends_no_run(base, tmp_path):
    path = changed_config(HARMLESS, tmp_path)
    assert run_ends([*base, "--deepspeed", str(path), "--lr_scheduler_type", "linear"]) == (0, "")


def test_a_run_on_a_rank_ends_so_too(base, tmp_path):
    path = changed_config({"zero_optimisation": {}}, tmp_path)
    for number, flags in enumerate([*ON_A_RANK, f"--deepspeed {path}"]):
        words = [*base, *flags.split()]
        outcome = ranks.train(tmp_path / str(number), words, world_size=1)
        status, message = doctor_ends(words)
        assert (outcome.statuses, status) == ([2], 2), outcome.outputs
        assert all(fault in outcome.outputs[0] for fault in faults_in(message))
