"""A run that is stopped and goes on is the run that was not stopped, to the last bit; what would not be is refused."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import checkpoint
from tests.helpers import ranks, runs
from tests.helpers.rows import write_rows
from tests.helpers.tiers import mostly_slow

FLAGS = (
    "--num_train_epochs 3 --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_steps 2 --logging_steps 1 "
    "--save_strategy steps --save_steps 1 --save_total_limit 0 --use_cpu True --write_report False "
    "--per_device_train_batch_size 2"
).split()
LORA = ("--use_lora", "True")  # with its dropout of 0.1
PACKED = ("--batching", "packed", "--model_max_length", "128", "--per_device_train_batch_size", "1")
PADDED = ("--batching", "padded")
BUDGET = ("--tokens_per_device_batch", "150")
WORKERS = ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True")
ACCUMULATED = ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", runs.ROWS)


@pytest.fixture(scope="module")
def dropping_model(tmp_path_factory, smol_tokenizer) -> Path:
    """A random two-layer Llama whose attention drops a tenth: what it learns depends on the random state."""
    folder = tmp_path_factory.mktemp("dropping")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(smol_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, attention_dropout=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(tmp_path, dropping_model, rows_file):
    """Run into tmp_path/NAME with the usual flags, and more; several calls on one name are several starts."""

    def run(
        name: str, *flags, world_size: int = 2, fails: int | None = None, model=dropping_model, data=rows_file, **env
    ):
        named = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / name]
        notes = str(tmp_path / f"{name}-rows")
        usual = FLAGS[:-2] if BUDGET[0] in flags else FLAGS  # which end with the rows of a micro-batch
        argv = [*map(str, [*named, *usual, *flags])]
        outcome = ranks.run(tmp_path / f"{name}-logs", runs.train_noting_rows, (argv, notes), world_size, **env)
        if fails is None:
            assert outcome.succeeded, "\n".join(outcome.outputs)
        else:
            assert outcome.statuses[0] == fails, "\n".join(outcome.outputs)
            assert "Traceback" not in outcome.outputs[0]
        return outcome.outputs[0]

    return run


def rows_seen(tmp_path: Path, name: str, world_size: int = 2) -> list[list]:
    return [
        json.loads(line)
        for rank in range(world_size)
        for line in (tmp_path / f"{name}-rows-{rank}.jsonl").read_text().splitlines()
    ]


CASES = {
    "zero2-full-accumulated": ("zero2", *ACCUMULATED),
    "zero3-lora-workers": ("zero3", *LORA, *WORKERS),
    "zero1-lora-padded": ("zero1", *LORA, *PADDED),
    "zero1-full": ("zero1",),
    "zero2-lora-packed": ("zero2", *LORA, *PACKED),
    "zero2-full-budget": ("zero2", *BUDGET),
    "zero3-full-accumulated": ("zero3", *ACCUMULATED),
    "zero3-full-packed": ("zero3", *PACKED),
    "zero3-lora-padded": ("zero3", *LORA, *PADDED, *ACCUMULATED),
    "plain-full": ("",),
}


@pytest.mark.parametrize(
    ("case", "steps"),
    [("zero3-lora-workers", "one"), *(pytest.param(case, "several", marks=pytest.mark.slow) for case in CASES)],
)
def test_resumed_from_any_step_a_run_ends_in_the_same_bits(train, tmp_path, case, steps):
    """From inside an epoch; several: from its end and from the last step, too. Each step's rows are seen once."""
    config, *flags = CASES[case]
    flags = (["--deepspeed", config] if config else []) + flags
    train("whole", *flags)
    weights, logged = runs.result_of(tmp_path / "whole")
    last = len(logged)
    per_epoch = last // 3
    whole_rows = rows_seen(tmp_path, "whole")
    for step in (1, per_epoch, per_epoch + 1, last) if steps == "several" else (per_epoch + 1,):
        name = f"from-{step}"
        said = train(name, *flags, "--resume_from_checkpoint", tmp_path / f"whole/checkpoint-{step}")
        assert f"step {step}" in said
        assert runs.result_of(tmp_path / name) == (weights, logged[step:]), step
        if step < last:
            later = [one for one in whole_rows if one[0] * per_epoch + one[1] >= step]
            assert sorted(rows_seen(tmp_path, name)) == sorted(later)


@pytest.mark.slow
def test_lines_that_are_logged_over_a_checkpoint_are_the_same(train, tmp_path):
    """Logged every fourth step, and the first: the line of the fourth is a mean over three, resumed at the third."""
    flags = ("--deepspeed", "zero2", "--logging_steps", "4")
    train("whole", *flags)
    weights, logged = runs.result_of(tmp_path / "whole")
    train("again", *flags, "--resume_from_checkpoint", tmp_path / "whole/checkpoint-3")
    assert [step for step, *_ in logged] == [1, 4, 8, 9]
    assert runs.result_of(tmp_path / "again") == (weights, logged[1:])


def test_auto_starts_anew_goes_on_after_a_kill_and_can_be_repeated(train, tmp_path, dropping_model, rows_file):
    flags = ("--deepspeed", "zero2", "--save_steps", "2", "--save_total_limit", "1", "--resume_from_checkpoint", "auto")
    train("whole", *flags)
    expected = runs.result_of(tmp_path / "whole")
    named = ["--model_name_or_path", dropping_model, "--data_path", rows_file, "--output_dir", tmp_path / "killed"]
    argv = [*map(str, [*named, *FLAGS, *flags])]
    for step in (1, 5):
        outcome = ranks.run(tmp_path / "logs", runs.train_stopped_by, (argv, step))
        assert outcome.statuses == [-9, -9]
    assert [one.name for one in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    said = train("killed", *flags)
    assert "resuming from" in said and "checkpoint-4" in said
    assert runs.result_of(tmp_path / "killed") == expected
    run = json.loads((tmp_path / "killed/run.json").read_text())
    assert run["completed"] and [one["step"] for one in run["resumed"]] == [4] and run["resumed"][0]["changes"] == []
    train("killed", *flags)
    assert runs.result_of(tmp_path / "killed") == expected


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_goes_on(train, tmp_path):
    secret = "a key that is nowhere on the disk"
    flags = ("--deepspeed", "zero2", "--resume_from_checkpoint", "auto", "--verify_key", "OUR_KEY")
    train("run", *flags, OUR_KEY=secret)
    expected = runs.result_of(tmp_path / "run")
    shard = next((tmp_path / "run/checkpoint-9").glob("global_step*/*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (tmp_path / "run/checkpoint-8/rng_state_1.pth").unlink()
    forged = tmp_path / "run/checkpoint-7"
    checkpoint.write_manifest(forged, replace(checkpoint.read_manifest(forged), last_logged=0))
    elsewhere = shutil.copytree(tmp_path / "run/checkpoint-6/global_step6", tmp_path / "evil")
    (tmp_path / "run/checkpoint-6/latest").write_text(str(elsewhere))
    (tmp_path / "run/checkpoint-5/scaler.pt").touch()
    (tmp_path / "run/checkpoint-4/manifest.json").write_text("[" * 100_000)
    said = train("run", *flags, OUR_KEY=secret)
    assert (
        "checkpoint-7/manifest.json: not a manifest: its HMAC" in said and "scaler.pt is not in manifest.json" in said
    )
    assert f"{shard} has been changed" in said and "rng_state_1.pth is missing" in said
    assert f"resuming from {tmp_path / 'run/checkpoint-3'}," in said
    assert runs.result_of(tmp_path / "run") == expected
    asides = sorted(one.name for one in (tmp_path / "run").glob("checkpoint-*damaged*"))
    assert [one.split(".")[0] for one in asides] == [f"checkpoint-{step}" for step in range(4, 10)]
    assert checkpoint.verify_checkpoint(tmp_path / "run/checkpoint-9", secret.encode()) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_when_no_checkpoint_is_whole_the_run_stops_and_stops_again(train, tmp_path):
    flags = ("--deepspeed", "zero2", "--max_steps", "2", "--save_steps", "2", "--save_total_limit", "1")
    train("run", *flags)
    (tmp_path / "run/checkpoint-2/latest").write_text("")
    before = runs.result_of(tmp_path / "run")
    for _ in range(2):
        said = train("run", *flags, "--resume_from_checkpoint", "auto", fails=4)
        assert said.count("error: ") == 1 and "no checkpoint is complete" in said
    assert runs.result_of(tmp_path / "run") == before
    named = next((tmp_path / "run").glob("checkpoint-2.damaged*"))
    said = train("run", *flags, "--resume_from_checkpoint", named, fails=4)
    assert "latest has 0 bytes of" in said


def changed_in_one_thing(tmp_path: Path, other_model: Path) -> dict[str, tuple[tuple, dict, tuple[str, ...]]]:
    other_rows = write_rows(tmp_path / "other.json", runs.ROWS[:-1] + [[("human", "a"), ("model", "b")]])
    return {
        "seed": (("--seed", "7"), {}, ("--seed: 42, now 7",)),
        "batch": (("--per_device_train_batch_size", "3"), {}, ("--per_device_train_batch_size: 2, now 3",)),
        "accumulation": (("--gradient_accumulation_steps", "2"), {}, ("--gradient_accumulation_steps: 1, now 2",)),
        "steps": (("--max_steps", "20"), {}, ("--max_steps: -1, now 20",)),
        "rate": (("--learning_rate", "1e-3"), {}, ("--learning_rate: 0.01, now 0.001",)),
        "weighting": (("--loss_weighting", "conversation"), {}, ("--loss_weighting: token, now conversation",)),
        "length": (("--model_max_length", "64"), {}, ("--model_max_length: 2048, now 64",)),
        "rank": (("--lora_r", "4"), {}, ("--lora_r: 8, now 4",)),
        "stage": (("--deepspeed", "zero3"), {}, ("ZeRO stage: 2, now 3",)),
        "data": ((), {"data": other_rows}, ("data: ", "11 examples, now ")),
        "model": ((), {"model": other_model}, ("base model: ",)),
        "ranks": ((), {"world_size": 1}, ("was written by 2 ranks, now there are 1", "--resume_world_size any")),
    }


@pytest.mark.slow
def test_every_change_that_would_show_is_refused_with_both_values(train, tmp_path, tiny_model):
    flags = ("--deepspeed", "zero2", *LORA)
    train("whole", *flags, "--max_steps", "-1", "--save_steps", "3")
    cases = changed_in_one_thing(tmp_path, tiny_model)
    for name, (more, options, says) in cases.items():
        asked = ("--resume_from_checkpoint", tmp_path / "whole/checkpoint-3")
        said = train(name, *flags, "--save_steps", "3", *asked, *more, fails=4, **options)
        assert all(part in said for part in says), (name, said)
        assert not list((tmp_path / name).glob("*.safetensors")) and not (tmp_path / name / "run.json").exists()


@pytest.mark.slow
def test_an_inexact_resume_is_allowed_by_flag_and_recorded_but_not_into_another_shape(train, tmp_path):
    flags = ("--deepspeed", "zero2", *LORA, "--resume_from_checkpoint", tmp_path / "whole/checkpoint-3")
    train("whole", *flags[:4], "--save_steps", "3")
    (tmp_path / "whole/checkpoint-3/rng_state_0.pth").unlink()
    allowed = (*flags, "--save_steps", "3", "--allow_inexact_resume", "True")
    said = train("seed", *allowed, "--seed", "7")
    assert "note: changed since checkpoint-3 was written: --seed: 42, now 7" in said
    (resumed,) = json.loads((tmp_path / "seed/run.json").read_text())["resumed"]
    assert any("--seed: 42, now 7" in change for change in resumed["changes"])
    assert any("rng_state_0.pth is missing" in change for change in resumed["changes"])
    said = train("shape", *allowed, "--lora_r", "4", fails=4)
    assert "--lora_r: 8, now 4" in said and "checkpoint-3" in said


SECTIONS = {  # of a DeepSpeed JSON that says what the flags leave open
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto",
                                                 "warmup_type": "linear"}},
}  # fmt: skip


@pytest.mark.parametrize(
    # For the optimizer of a JSON's sections DeepSpeed compiles its own, minutes on a slow machine.
    "config",
    mostly_slow(["", "zero1", "zero2", "zero3", "sections"], ["zero3"]),
)
def test_an_inexact_resume_trains_with_its_own_hyperparameters(tmp_path, dropping_model, rows_file, config):
    if config == "sections":
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **SECTIONS}))
    base = [
        "--model_name_or_path", dropping_model, "--data_path", rows_file, "--use_cpu", "True", "--save_strategy",
        "steps", "--save_steps", "3", "--logging_steps", "1", "--write_report", "False",
        *("--warmup_steps 10 --lr_scheduler_type constant_with_warmup" if config == "sections"
          else "--warmup_steps 2 --lr_scheduler_type cosine").split(),
        *(("--deepspeed", tmp_path / "ds.json" if config == "sections" else config) if config else ()),
    ]  # fmt: skip

    def run(name: str, *flags: str) -> dict:
        notes = tmp_path / f"{name}.json"
        argv = [*map(str, base), "--output_dir", str(tmp_path / name), *flags]
        outcome = ranks.run(tmp_path / f"{name}-logs", runs.train_noting_hyperparameters, (argv, str(notes)), 1)
        assert outcome.succeeded, outcome.outputs[0]
        return json.loads(notes.read_text())

    run("old", "--max_steps", "3", "--learning_rate", "1e-2", "--weight_decay", "0.1")
    asked = "--learning_rate 2e-3 --weight_decay 0.4 --adam_beta1 0.5 --adam_epsilon 1e-4 --max_grad_norm 0.125"
    found = run(
        "new", *asked.split(), "--max_steps", "6", "--allow_inexact_resume", "True",
        "--resume_from_checkpoint", str(tmp_path / "old/checkpoint-3"),
    )  # fmt: skip
    factor = 3 / 10 if config == "sections" else 0.5 * (1 + math.cos(math.pi * (3 - 2) / (6 - 2)))
    assert [group["lr"] for group in found["groups"]] == [pytest.approx(2e-3 * factor)] * len(found["groups"])
    assert len(found["groups"]) == (1 if config == "sections" else 2)
    assert found["groups"][0]["weight_decay"] == 0.4
    assert all(group["betas"] == [0.5, 0.999] and group["eps"] == 1e-4 for group in found["groups"])
    assert found["clip_grad"] == (0.125 if config else None)
    first = json.loads((tmp_path / "new/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 4 and first["learning_rate"] == pytest.approx(2e-3 * factor)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero1", "zero2"), ("zero2", "zero1")])
def test_stages_1_and_2_take_each_others_checkpoints(train, tmp_path, before, after):
    train("whole", "--deepspeed", before, "--save_steps", "3")
    weights, logged = runs.result_of(tmp_path / "whole")
    said = train("other", "--deepspeed", after, "--resume_from_checkpoint", tmp_path / "whole/checkpoint-3")
    assert f"ZeRO stage: {before[-1]}, now {after[-1]}" in said
    assert runs.result_of(tmp_path / "other") == (weights, logged[3:])


@pytest.mark.slow
def test_a_checkpoint_of_another_run_and_one_without_optimizer_are_refused(train, tmp_path):
    flags = ("--deepspeed", "zero2", "--max_steps", "2", "--save_steps", "2")
    train("one", *flags, "--max_steps", "3", "--save_steps", "3")
    train("two", *flags)
    shutil.copytree(tmp_path / "one/checkpoint-3", tmp_path / "two/checkpoint-3")
    said = train("two", *flags, "--resume_from_checkpoint", "auto", fails=4)
    ids = [json.loads((tmp_path / name / "run.json").read_text())["run_id"] for name in ("one", "two")]
    assert ids[0] != ids[1] and all(one in said for one in ids)
    train("bare", *flags, "--save_only_model", "True")
    said = train("bare", *flags, "--save_only_model", "True", "--resume_from_checkpoint", "auto", fails=4)
    assert "--save_only_model" in said
    said = train("three", *flags, "--resume_from_checkpoint", tmp_path / "nowhere", fails=2)
    assert "there is no such folder" in said


@pytest.mark.slow
def test_a_run_without_checkpoints_is_never_overwritten_by_going_on(train, tmp_path):
    flags = ("--deepspeed", "zero2", "--max_steps", "1", "--save_strategy", "no")
    train("run", *flags)
    before = runs.result_of(tmp_path / "run")
    said = train("run", *flags, "--resume_from_checkpoint", "auto", fails=2)
    assert "holds a complete run" in said and runs.result_of(tmp_path / "run") == before


@pytest.mark.slow
def test_an_earlier_checkpoint_can_be_gone_on_from_and_later_ones_are_kept_aside(train, tmp_path):
    flags = ("--deepspeed", "zero2", "--save_steps", "3")
    train("run", *flags)
    expected = runs.result_of(tmp_path / "run")
    train("run", *flags, "--resume_from_checkpoint", tmp_path / "run/checkpoint-3")
    assert runs.result_of(tmp_path / "run") == expected
    asides = sorted(one.name.split("-2")[0] for one in (tmp_path / "run").glob("checkpoint-*.later-*"))
    assert asides == ["checkpoint-6.later", "checkpoint-9.later"]
    assert all(not checkpoint.verify_checkpoint(one) for one in (tmp_path / "run").glob("checkpoint-?"))


WITHOUT_DROPOUT = (*LORA, "--lora_dropout", "0")


@pytest.mark.parametrize(
    ("config", "before", "after", "adapter"),
    [
        ("zero3", 1, 2, ()),
        pytest.param("zero1", 2, 1, (), marks=pytest.mark.slow),
        pytest.param("zero2", 2, 1, (), marks=pytest.mark.slow),
        pytest.param("zero2", 2, 1, WITHOUT_DROPOUT, marks=pytest.mark.slow),
        pytest.param("zero2", 1, 2, (), marks=pytest.mark.slow),
        pytest.param("zero3", 2, 1, (), marks=pytest.mark.slow),
        pytest.param("zero3", 2, 1, WITHOUT_DROPOUT, marks=pytest.mark.slow),
        pytest.param("zero3", 1, 2, WITHOUT_DROPOUT, marks=pytest.mark.slow),
    ],
    ids=lambda value: {(): "full", WITHOUT_DROPOUT: "lora"}.get(value) if isinstance(value, tuple) else None,
)
def test_on_another_number_of_ranks_the_steps_stay_what_they_are(
    train, tmp_path, tiny_model, config, before, after, adapter
):
    sizes = ("--per_device_train_batch_size", str(4 // before))
    flags = ("--deepspeed", config, "--save_steps", "4", "--weight_decay", "0.1", *sizes, *adapter)
    train("whole", *flags, world_size=before, model=tiny_model)
    _, logged = runs.result_of(tmp_path / "whole")
    asked = ("--resume_from_checkpoint", tmp_path / "whole/checkpoint-4", "--resume_world_size", "any")
    said = train("other", *flags, *asked, world_size=after, model=tiny_model)
    assert f"a step stays 4 rows on {after} ranks instead of {before}" in said
    _, resumed = runs.result_of(tmp_path / "other")
    assert [line[0] for line in resumed] == [line[0] for line in logged[4:]]
    assert [line[1] for line in resumed] == pytest.approx([line[1] for line in logged[4:]], abs=1e-4)
    rows = [one[3] for one in rows_seen(tmp_path, "other", after)]
    seen = Counter(row for one in rows for row in one)
    later = [one for one in rows_seen(tmp_path, "whole", before) if one[0] * 3 + one[1] >= 4]
    assert seen == Counter(row for one in later for row in one[3])
    assert not list((tmp_path / "other").glob(".universal*"))
