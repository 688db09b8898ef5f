"""Mistakes that are found before torch is imported: files, folders, room, ranks."""

import builtins
import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune import checkpoint
from finetune.checkpoint.manifest import STAGE
from finetune.config import parse
from finetune.config.hardware import DetectedHardware
from finetune.config.run_config import RankCounts
from finetune.launcher import parse_launcher_args
from finetune.run_dir import output_dir_lock
from finetune.training import start_checks
from finetune.training.start_checks import PlannedRanks, check_ranks, check_start
from finetune.utils.errors import CheckpointError, ConfigError, DataError, FinetuneError, StorageError
from tests.helpers.checkpoint_files import MANIFEST


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Check a run on files of the working directory, with more flags or others."""
    monkeypatch.chdir(tmp_path)
    model = Path("model")
    model.mkdir()
    save_file({"a": np.zeros(250, dtype=np.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}\n")
    (model / "config.json").write_text('{"model_type": "qwen3", "num_attention_heads": 9}')
    Path("d.json").write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]}]')

    import_module = builtins.__import__

    def import_quickly(name: str, *others: Any, **named: Any) -> Any:
        is_slow = name.partition(".")[0] in ("torch", "transformers", "deepspeed", "peft")
        assert named.get("level") or not is_slow, f"{name} takes seconds"
        return import_module(name, *others, **named)

    def check(*words: str, ranks: int = 1) -> None:
        named = ["--model_name_or_path", "./model", "--data_path", "d.json", "--output_dir", "o"]
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", import_quickly)
            planned = PlannedRanks(RankCounts(ranks, ranks), ranks, DetectedHardware())
            check_start(parse([*named, *words]), planned, is_launch=True)

    return check


def refused(start, *words: str, ranks: int = 1) -> FinetuneError:
    with pytest.raises(FinetuneError) as raised:
        start(*words, ranks=ranks)
    return raised.value


def test_a_run_that_can_start_passes(start):
    Path("t.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    start("--skip_rows", "d.json", "--chat_template", "t.jinja", "--deepspeed", "zero3")
    start("--eval_data_path", "d.json", "--allow_seen_held_out")
    start("--use_lora", "--lora_target_modules", "q_proj", "layers.0.mlp.up_proj", "w2")
    Path("o").mkdir()
    Path("o/slurm-7.out").write_text("")
    start()
    Path("o/run.json").write_text("{}")
    Path("o/notes.md").write_text("")
    start()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model.safetensors", lambda content: content[:-1], "model.safetensors: cannot be read"),
        ("model.safetensors", lambda content: b"<html>", "model.safetensors: cannot be read"),
        ("tokenizer.json", lambda content: content[:1], "tokenizer.json: not a JSON object"),
        (
            "config.json",
            lambda content: b'{"quantization_config": {"quant_method": "gptq"}}',
            "its weights are quantized (gptq)",
        ),
        (
            "config.json",
            lambda content: b'{"quantization_config": {"load_in_4bit": true}}',
            "(stored in 4 bits): quantized weights cannot be trained: add --use_lora",
        ),
    ],
)
def test_a_damaged_or_quantized_base_is_named(start, file, change, said):
    path = Path("model", file)
    path.write_bytes(change(path.read_bytes()))
    assert said in str(refused(start))


def test_what_a_resumed_run_may_not_change_is_named(start):
    folder = checkpoint.checkpoint_folder(Path("o"), 4)
    folder.mkdir(parents=True)
    data = start_checks.fingerprint_sources(start_checks.find_sources(["d.json"]))
    facts = {"--seed": 42, STAGE: "none", "data": f"{data}, 2 tokens in 1 examples", "base model": "0a1b"}
    checkpoint.write_manifest(folder, replace(MANIFEST, world_size=1, disks=[[0]], loss_since_log=[0.1], facts=facts))
    resumed = ("--resume_from_checkpoint", "auto")
    start(*resumed)
    for words, said in ((["--seed", "7"], "--seed: 42, now 7"), (["--deepspeed", "zero3"], "ZeRO stage: none, now 3")):
        error = refused(start, *resumed, *words)
        assert type(error) is CheckpointError and said in str(error)
    assert "was written by 1 ranks, now there are 2" in str(refused(start, *resumed, ranks=2))
    start(*resumed, "--resume_world_size", "any", ranks=2)
    start(*resumed, "--seed", "7", "--allow_inexact_resume")
    Path("d.json").write_text(Path("d.json").read_text() + "\n")
    assert f"data: {data}, now" in str(refused(start, *resumed))


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
@pytest.mark.parametrize(
    ("text", "said"),
    [("", "the file is empty"), ("[]", "holds no conversations"), ("{oops", "not JSON"), ('[{"a": 1}]', "the keys a")],
)
def test_rows_are_read_for_a_moment(start, flag, text, said):
    Path("rows.json").write_text(text)
    assert said in str(refused(start, flag, "rows.json"))
    start(flag, "rows.json", "--bad_rows", "drop")


def test_rows_after_the_moment_are_left_to_the_run(start, monkeypatch):
    rows = [json.dumps({"text": f"row {number}"}) for number in range(50)]
    Path("rows.jsonl").write_text("\n".join([*rows, "{oops"]))
    assert "row 50" in str(refused(start, "--data_path", "rows.jsonl"))
    monkeypatch.setattr(start_checks, "SECONDS_FOR_ROWS", 0.0)
    start("--data_path", "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ("--eval_strategy steps", ConfigError, "--eval_strategy: needs held-out conversations"),
        ("--report_to wandbb", ConfigError, "--report_to wandbb: expected"),
        ("--deepspeed broken.json", ConfigError, "broken.json, line 1, column 2: not JSON"),
        ("--model_name_or_path ./modle", ConfigError, "no such folder: did you mean model?"),
        (
            "--model_name_or_path ./nothing",
            ConfigError,
            "holds no config.json: give the folder of a model; it is empty",
        ),
        ("--model_name_or_path ./papers", ConfigError, "papers: holds no config.json"),
        (
            "--model_name_or_path ./above",
            ConfigError,
            "holds no config.json: give the folder of a model; found in it: hf",
        ),
        ("--model_name_or_path ./mute", ConfigError, "mute: holds no tokenizer"),
        ("--data_path e.json", DataError, "e.json: there is no such file"),
        ("--eval_data_path *.csv", DataError, "*.csv: no file matches"),
        (
            "--data_path papers/a.json,papers/b.json",
            DataError,
            "written with spaces between them: papers/a.json papers/",
        ),
        ("--data_path papers/a.json:half", DataError, "expected a number after the colon, the weight of papers/a.json"),
        ("--data_path papers/aa.json", DataError, "there is no such file: did you mean papers/a.json"),
        ("--output_dir model", ConfigError, "--output_dir model: is the folder of the model: choose another one"),
        ("--skip_rows rows", ConfigError, "--skip_rows rows: there is no such file"),
        ("--chat_template t.jinja", ConfigError, "--chat_template t.jinja"),
        ("--deepspeed zero33", ConfigError, "did you mean zero3?"),
        ("--output_dir papers", ConfigError, "papers: is not a run's folder, it holds a.json, b.json, thesis.tex"),
        ("--resume_from_checkpoint ./c", ConfigError, "c: there is no such folder; auto finds the newest checkpoint"),
        ("--resume_from_checkpoint papers", CheckpointError, "papers: holds no manifest.json"),
        ("--chat_template loop.jinja", ConfigError, "--chat_template loop.jinja, line 2: not Jinja: unexpected '}'"),
        ("--deepspeed stge.json", ConfigError, '"zero_optimization.stge" is not a DeepSpeed key: did you mean "stage"'),
        ("--deepspeed seven.json", ConfigError, "train_batch_size is 7, but 8 per device"),
        ("--sequence_parallel_size 2", ConfigError, "give --deepspeed zero3; it does not divide the 1 ranks"),
        ("--model_revision main", ConfigError, "--model_revision main: ./model is a folder"),
        ("--model_name_or_path a/b", ConfigError, "a/b: no such folder, not in the cache"),
        ("--model_name_or_path a?b", ConfigError, "a?b: no such folder, and no name of a model"),
        (
            "--sequence_parallel_size 2 --deepspeed zero3",
            ConfigError,
            "it does not divide the model's 9 attention heads",
        ),
        (
            "--model_name_or_path https://hf.co/a",
            ConfigError,
            "https://hf.co/a: is an address: give the mod",
        ),
        ("--adapter_name_or_path ./modle", ConfigError, "modle: no such folder: did you mean model?"),
        ("--attn_implementation sdp", ConfigError, "--attn_implementation sdp: did you mean sdpa? expected flash_"),
        ("--attn_implementation a/b", ConfigError, "--attn_implementation a/b: kernels is not installed: pip install"),
        ("--data_path model", ConfigError, "model: is the folder of a model or a run, it holds config.json, tokeni"),
        ("--eval_data_path ended:2", ConfigError, "ended: is the folder of a model or a run, it holds run.json"),
        ("--data_path model/model.safetensors", DataError, "the weights of a model: give the folder of the model as"),
        (
            "--verify_key my-secret",
            ConfigError,
            "--verify_key: expected the name of an environment var",
        ),
        (
            '--gradient_checkpointing --gradient_checkpointing_kwargs {"every_n_layers":0}',
            ConfigError,
            "every_n_layers is at least 1, offload, use_reentrant",
        ),
        (
            '--activation_checkpointing_kwargs {"offlod":true}',
            ConfigError,
            '{"offlod":true}: expected a JSON',
        ),
        ("--use_lora --lora_target_modules q_prj v_proj", ConfigError, "--lora_target_modules q_prj: qwen3 has no"),
    ],
)
def test_a_mistake_is_named_with_value_and_remedy(start, words, kind, said):
    for folder in ("nothing", "papers", "above/hf", "mute", "ended"):
        Path(folder).mkdir(parents=True)
    Path("broken.json").write_text("{zero")
    Path("loop.jinja").write_text("{% generation %}a{% endgeneration %}\n{{ messages[0] }")
    Path("stge.json").write_text('{"zero_optimization": {"stge": 2}}')
    Path("ended/run.json").write_text("{}")
    Path("seven.json").write_text('{"train_batch_size": 7}')
    for name in ("thesis.tex", "a.json", "b.json"):
        Path("papers", name).write_text("")
    Path("above/hf/config.json").write_text("{}")
    for name in ("config.json", "model.safetensors"):
        Path("mute", name).write_text("{}")
    error = refused(start, *words.split())
    assert type(error) is kind and said in str(error) and "trust_remote_code" not in str(error)


def test_all_mistakes_are_named_at_once(start):
    text = str(refused(start, "--data_path", "x.json", "--deepspeed", "zero33", ranks=10_000))
    assert text.startswith("3 faults:") and "10000 ranks" in text
    Path("two.json").write_text('{"train_batch_size": 7, "gradient_clipping": 7}')
    text = str(refused(start, "--data_path", "x.json", "y.json", "--deepspeed", "two.json"))
    assert text.startswith("4 faults:") and text.count("faults:") == 1 and len(text.splitlines()) == 5


def test_a_folder_in_use_and_a_full_disk_are_refused(start, monkeypatch):
    output_dir_lock.acquire_lock(Path("o"))
    try:
        assert "another run is writing there" in str(refused(start))
    finally:
        output_dir_lock.release_lock()
    monkeypatch.setattr(start_checks.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2500))
    assert isinstance(refused(start), StorageError)
    start("--save_strategy", "no")
    start("--use_lora")


def test_ranks_are_compared_with_cores_and_memory(monkeypatch):
    monkeypatch.setattr(start_checks.os, "sched_getaffinity", lambda pid: {0, 1})
    assert check_ranks(2) == [] and "share them" in check_ranks(4)[0]
    with pytest.raises(ConfigError, match="64 ranks on the 2 cores.*--num_gpus 2"):
        check_ranks(64)
    monkeypatch.setattr(start_checks.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(10**9))
    with pytest.raises(ConfigError, match="1.0 GB are free: give --num_gpus 2"):
        check_ranks(4)


@pytest.mark.parametrize(
    ("visible", "words", "expected"),
    [
        (None, [], (8, 8)),
        ("0,1,2,3,4,5,6,7", [], (8, 8)),
        ("2,3", [], (2, 8)),
        ("", [], (1, 0)),
        (None, ["--num_gpus", "2"], (2, 8)),
    ],
)
def test_ranks_are_planned_only_where_their_gpus_are_known(visible, words, expected, monkeypatch):
    monkeypatch.setattr(start_checks.host_probe, "count_gpus", lambda: 8)
    monkeypatch.setattr(start_checks.host_probe, "gpu_facts", lambda: [{"name": "H100", "capability": "9.0"}] * 8)
    monkeypatch.setattr(start_checks.host_probe, "has_unlisted_gpus", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    flags = parse_launcher_args([*words, "finetune.py"], supervised=True)

    planned = PlannedRanks.of_launch(flags, None, use_cpu=False)
    assert expected == (planned and (planned.counts.size, len(planned.hardware.gpus)))
    # the launcher starts a rank for each GPU, whether the rank uses it or not
    on_cpu = PlannedRanks.of_launch(flags, None, use_cpu=True)
    assert on_cpu is not None and (on_cpu.here, on_cpu.hardware.gpus) == (expected[0], ())
    monkeypatch.setattr(start_checks.host_probe, "has_unlisted_gpus", lambda: True)  # only torch can tell
    assert PlannedRanks.of_launch(flags, None, use_cpu=False) is None


def test_some_of_unlike_gpus_are_left_to_the_ranks(monkeypatch):
    gpus = [{"name": "GT 1030", "capability": "6.1"}, {"name": "A6000", "capability": "8.6"}]
    monkeypatch.setattr(start_checks.host_probe, "count_gpus", lambda: 2)
    monkeypatch.setattr(start_checks.host_probe, "gpu_facts", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    flags = [parse_launcher_args([*words, "finetune.py"], supervised=True) for words in ([], ["--include=localhost:1"])]

    both, one = (PlannedRanks.of_launch(each, None, use_cpu=False) for each in flags)
    assert one is None and both is not None and both.hardware.weakest.name == "GT 1030"


@pytest.mark.parametrize("name", ["foo/bar--baz", "a/b..c", "runs/x.git"])
def test_a_name_that_no_hub_can_have_is_a_fault(start, name):
    assert f"--model_name_or_path {name}: no such folder, and no name of a model" in str(
        refused(start, "--model_name_or_path", name)
    )


@pytest.mark.parametrize("kind", ["mistral3", "llava", "paligemma", "gemma3"])
def test_layers_of_a_language_model_inside_another_are_left_to_the_run(start, kind):
    Path("model/config.json").write_text(json.dumps({"model_type": kind}))
    start("--use_lora", "--lora_target_modules", "q_proj", "v_proj")
