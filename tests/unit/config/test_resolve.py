"""What flags come to before any library is loaded: the batch, its division after a resume, and what cannot be meant."""

import json
import os

import pytest

from finetune.config.hardware import DetectedHardware, Gpu
from finetune.config.resolve import (
    activation_checkpointing,
    check_flags,
    evaluation_options,
    resolve_batch,
    resolve_config,
)
from finetune.config.run_config import RankCounts, SavedStep
from finetune.utils.errors import ConfigError
from tests.helpers.flag_parsing import parsed

EVALUATES = ("--eval_data_path", "held_out.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval_strategy", "steps"], "--eval_strategy: needs held-out conversations: give --eval_data_path"),
        (["--save_strategy", "best"], "--save_strategy best: needs held-out conversations"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience: needs held-out conversations"),
        ([*EVALUATES, "--metric_for_best_model", "f1"], "--metric_for_best_model f1: expected eval_loss, the only one"),
        (["--auto_find_batch_size", "True"], "--auto_find_batch_size True: a step must keep its size"),
        (["--sequence_parallel_size", "2"], "--sequence_parallel_size 2: it needs DeepSpeed: give --deepspeed zero3; "),
        (["--deepspeed", "zero3", "--sequence_parallel_size", "2"], "--sequence_parallel_size 2: it does not divide"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_model_is_loaded(words, said):
    with pytest.raises(ConfigError) as raised:
        check_flags(parsed(*words), world_size=3)
    assert said in str(raised.value)


def test_held_out_conversations_are_evaluated_once_an_epoch_by_their_loss():
    options = evaluation_options(parsed(*EVALUATES, "--metric_for_best_model", "loss"))
    assert (options["eval_strategy"], options["metric_for_best_model"]) == ("epoch", "eval_loss")
    assert evaluation_options(parsed()) == {}


@pytest.mark.parametrize(
    ("flags", "world_size", "per_device", "accumulation"),
    [([], 4, 2, 4), ([], 8, 2, 2), ([], 32, 1, 1), (["--sequence_parallel_size", "2"], 8, 2, 4)],
)
def test_a_resumed_step_keeps_its_rows_on_other_ranks(flags, world_size, per_device, accumulation):
    arguments = parsed("--per_device_train_batch_size", "3", *flags)
    arguments.training["per_device_train_batch_size"] = 2

    batch, notes = resolve_batch(arguments, world_size, SavedStep(world_size=16, step_rows=32))

    assert (batch.per_device_batch, batch.accumulation) == (per_device, accumulation)
    assert batch.step_rows == 32 and f"--gradient_accumulation_steps {accumulation}" in notes[0]


def test_a_step_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="a step of 32 rows cannot be divided among 5 ranks: start as many as divide"):
        resolve_batch(parsed(), 5, SavedStep(world_size=4, step_rows=32))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--neftune_noise_alpha", "5"], "NEFTune scales its noise"),
        (["--attn_implementation", "eager"], "--attn_implementation eager supports no boundaries inside a row"),
        (["--adapter", "prompt"], "prompt tuning puts virtual tokens before each conversation"),
        (["--attn_implementation", "sdpa"], None),
    ],
)
def test_why_rows_are_padded(words, reason):
    said = resolve_batch(parsed(*words), 1)[0].padding_reason
    assert said is reason is None or said.startswith(reason)


@pytest.mark.parametrize("given", ["{", "[]", '{"every_n_layers": 0}', '{"every_n_layers": "2"}', '{"offload": 1}'])
def test_options_of_checkpointing_are_checked(given):
    with pytest.raises(ConfigError) as raised:
        activation_checkpointing(parsed("--activation_checkpointing_kwargs", given))
    assert f"--activation_checkpointing_kwargs {given}: expected a JSON object" in str(raised.value)


def test_options_of_checkpointing_say_when_they_pay():
    options = json.dumps({"every_n_layers": 2, "offload": True})
    words = ("--activation_checkpointing_kwargs", options, "--activation_checkpointing")

    layers, host = activation_checkpointing(parsed(*words, "True")).notes()

    assert "one layer in 2" in layers and "offloaded to host memory" in host
    assert activation_checkpointing(parsed(*words, "False")).notes() == []


@pytest.mark.parametrize(("gpus", "words", "accelerator"), [
    ((), "--use_cpu True --deepspeed zero2", "cpu"), ((), "--use_cpu True", None),
    ((Gpu("NVIDIA H100", (9, 0)),), "--deepspeed zero2", None),
])  # fmt: skip
def test_deepspeed_leaves_the_gpus_alone_where_the_run_does(gpus, words, accelerator, monkeypatch, tmp_path):
    monkeypatch.delenv("DS_ACCELERATOR")
    arguments = parsed(*words.split(), "--output_dir", str(tmp_path / "output"))

    resolve_config(arguments, DetectedHardware(gpus), RankCounts(1, 1))

    assert os.environ.get("DS_ACCELERATOR") == accelerator
