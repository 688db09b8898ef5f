"""The training story on real ranks: every ZeRO stage, full and adapters; what is saved loads with plain libraries."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import ranks
from conftest import byte_tokenizer

SHORT = (
    "--num_train_epochs 2 --per_device_train_batch_size 1 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --save_strategy no"
).split()
LORA = ("--use_lora", "True", "--lora_dropout", "0")
SAVING = ("--save_strategy", "steps", "--save_steps", "2")  # between steps that all ranks must go on to make


@pytest.fixture
def train(tmp_path, tiny_model, conversation_file):
    """Train the tiny model and return its output folder; every run of a test gets a folder of its own."""

    def run(name: str, *flags: str, world_size: int = 2, model: Path = tiny_model) -> Path:
        output = tmp_path / name
        base = ["--model_name_or_path", model, "--data_path", conversation_file, "--output_dir", output, *SHORT]
        outcome = ranks.train(tmp_path / f"{name}-logs", [*base, *flags], world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        return output

    return run


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def load_adapter(output: Path):
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(output)


def logits(model, ids=(1, 4093, 198, 2)):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(ids)])).logits


@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_every_zero_stage_gives_the_same_losses(train, adapter):
    by_stage = {stage: losses(train(stage, "--deepspeed", stage, *adapter)) for stage in ("zero1", "zero2", "zero3")}
    assert len(by_stage["zero1"]) == 6
    assert by_stage["zero1"][-1] < by_stage["zero1"][0] - 0.1
    assert by_stage["zero2"] == pytest.approx(by_stage["zero1"], abs=1e-5)
    assert by_stage["zero3"] == pytest.approx(by_stage["zero1"], abs=1e-5)


@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload", "zeropp"])
def test_offload_and_zeropp_give_the_losses_of_their_stage(train, config, tmp_path):
    plain = losses(train("plain", "--deepspeed", "zero3"))
    assert losses(train(config, "--deepspeed", config)) == pytest.approx(plain, abs=1e-4)
    said = (tmp_path / f"{config}-logs/rank-0.log").read_text()
    assert ("zero_quantized_weights is off: its kernels need a GPU" in said) == (config == "zeropp")


def test_one_rank_gives_the_losses_of_two(train):
    two = losses(train("two", "--deepspeed", "zero2"))
    one = losses(train("one", "--deepspeed", "zero2", "--per_device_train_batch_size", "2", world_size=1))
    accumulated = losses(train("acc", "--deepspeed", "zero2", "--gradient_accumulation_steps", "2", world_size=1))
    assert len(two) == 6
    assert one == pytest.approx(two, abs=1e-5)
    assert accumulated == pytest.approx(two, abs=1e-5)


def test_a_full_model_loads_with_plain_transformers(train, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = train("full", "--deepspeed", "zero3", "--gradient_checkpointing", "True")

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, output))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert len(moved) > 10 and all(moved)
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert after.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("lora", ("--use_lora", "True", "--deepspeed", "zero3", "--gradient_checkpointing", "True")),
        ("named", ("--adapter", "lora", "--lora_target_modules", "q_proj", "v_proj", "--deepspeed", "zero2")),
        ("dora", (*LORA, "--use_dora", "True", "--deepspeed", "zero3")),
        ("rslora", (*LORA, "--use_rslora", "True", "--lora_r", "4", "--lora_alpha", "8", "--deepspeed", "zero2")),
        ("head", (*LORA, "--modules_to_save", "lm_head", "--deepspeed", "zero3")),
        ("prefix", ("--adapter", "prefix", "--num_virtual_tokens", "3", "--deepspeed", "zero3", *SAVING)),
        ("prompt", ("--adapter", "prompt", "--num_virtual_tokens", "3", "--deepspeed", "zero3", *SAVING)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_adapter_loads_with_plain_peft(train, tiny_model, kind, flags):
    import torch
    from transformers import AutoModelForCausalLM

    output = train(kind, *flags)

    before, after = logits(AutoModelForCausalLM.from_pretrained(tiny_model)), logits(load_adapter(output))
    assert after.shape[-1] == before.shape[-1]
    assert not torch.allclose(before, after[:, -before.shape[1] :], atol=1e-3)  # virtual tokens come first
    assert not (output / "model.safetensors").exists()


def test_prefix_tuning_switches_checkpointing_off_with_a_line(train, tmp_path):
    with_it = train("with", "--adapter", "prefix", "--deepspeed", "zero2", "--gradient_checkpointing", "True")
    without = train("without", "--adapter", "prefix", "--deepspeed", "zero2")
    assert losses(with_it) == pytest.approx(losses(without), abs=1e-6)
    assert "--gradient_checkpointing is off: prefix tuning" in (tmp_path / "with-logs/rank-0.log").read_text()


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_moved_base_weights_are_saved_as_a_plain_lora_for_the_original_base(tmp_path, tiny_model, start, rslora):
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.adapters import InitialLora, attach_lora

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untouched = logits(base)
    model = attach_lora(
        base, r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], init_lora_weights=start,
        use_rslora=rslora,
    )  # fmt: skip
    assert torch.allclose(logits(model), untouched, atol=1e-4)
    initial = InitialLora(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    trained = logits(model)
    model.save_pretrained(tmp_path / "pissa")

    initial.rewrite(tmp_path / "pissa")

    assert not torch.allclose(trained, untouched, atol=1e-2)
    assert torch.allclose(logits(load_adapter(tmp_path / "pissa")), trained, atol=1e-4)


def test_pissa_under_zero_3_gives_the_losses_of_zero_2_and_loads(train):
    flags = (*LORA, "--init_lora_weights", "pissa")
    stage_2, stage_3 = (train(stage, "--deepspeed", stage, *flags) for stage in ("zero2", "zero3"))
    assert losses(stage_3) == pytest.approx(losses(stage_2), abs=1e-4)
    config = json.loads((stage_3 / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (16, 32, True)
    assert logits(load_adapter(stage_3)).isfinite().all()


@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_new_tokens_grow_the_vocabulary_and_are_trained_under_zero_3(train, adapter):
    flags = ("--new_tokens", "<look>", "<act>", *adapter)
    stage_2, stage_3 = (train(stage, "--deepspeed", stage, *flags) for stage in ("zero2", "zero3"))
    assert losses(stage_3) == pytest.approx(losses(stage_2), abs=1e-4)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_adapter(stage_3) if adapter else AutoModelForCausalLM.from_pretrained(stage_3)
    tokenizer = AutoTokenizer.from_pretrained(stage_3)
    assert tokenizer.encode("<look>") == [49152]
    assert logits(model, ids=(1, 49152, 49153)).shape[-1] == 49154


def test_a_base_model_without_template_gets_chatml_and_learns_its_markers(train, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "bare"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=266, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    output = train("chatml", "--deepspeed", "zero3", model=folder)

    tokenizer = AutoTokenizer.from_pretrained(output)
    trained = AutoModelForCausalLM.from_pretrained(output)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end >= 266 and trained.get_input_embeddings().weight.shape[0] > end
    assert end in trained.generation_config.eos_token_id
    assert "<|im_start|>" in tokenizer.chat_template


def test_bf16_is_replaced_by_float32_on_a_cpu_with_a_line(train, tmp_path):
    output = train("run", *LORA, "--deepspeed", "zero3", "--bf16", "True", "--tf32", "True")
    run = json.loads((output / "run.json").read_text())
    said = (tmp_path / "run-logs/rank-0.log").read_text()
    assert run["precision"] == "float32" and run["deepspeed"]["bf16"]["enabled"] is False
    assert said.count("note: --bf16 is off") == 1 and said.count("note: --tf32 is off") == 1


def test_in_bf16_the_stages_train_the_same_adapters(tmp_path, tiny_model, conversation_file):
    """With peft's float32 adapters on a bf16 base, ZeRO-3 would compute other numbers than ZeRO-2 from step 2 on."""
    by_stage = {}
    for stage in ("zero2", "zero3"):
        output = tmp_path / stage
        argv = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output, *SHORT]
        flags = [*LORA, "--deepspeed", stage, "--bf16", "True", "--gradient_checkpointing", "True", "--max_steps", "2"]
        outcome = ranks.run(tmp_path / f"{stage}-logs", _train_in_bf16, ([*map(str, argv), *flags],))
        assert outcome.succeeded, outcome.outputs[0]
        assert json.loads((output / "run.json").read_text())["precision"] == "bf16"
        by_stage[stage] = losses(output)
    assert by_stage["zero3"] == pytest.approx(by_stage["zero2"], abs=1e-6)
    assert len(by_stage["zero2"]) == 2


def _train_in_bf16(argv: list[str]) -> None:
    from deepspeed.accelerator import get_accelerator

    from finetune import checking, train
    from finetune.hardware import Hardware

    get_accelerator().is_bf16_supported = lambda: True  # emulated is good enough for two small steps
    checking.decide = lambda found, **asked: Hardware("bf16", None, "sdpa", "gloo", use_cpu=True)
    train.main(argv)


def test_checkpointing_options_pass_through_with_a_line_and_change_no_number(train, tmp_path):
    plain = losses(train("plain", "--deepspeed", "zero2"))
    some = ("--activation_checkpointing", "True", "--activation_checkpointing_kwargs", '{"every_n_layers": 2}')
    assert losses(train("some", "--deepspeed", "zero2", *some)) == pytest.approx(plain, abs=1e-6)
    assert "activations of one layer in 2 are checkpointed" in (tmp_path / "some-logs/rank-0.log").read_text()


def test_a_model_that_cannot_run_flat_gets_padded_rows_with_the_reason(train, tmp_path, smol_tokenizer):
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    folder = tmp_path / "gptj"
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}
    GPTJForCausalLM(GPTJConfig(vocab_size=len(smol_tokenizer), **sizes)).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)

    output = train("padded", "--deepspeed", "zero3", model=folder)

    said = (tmp_path / "padded-logs/rank-0.log").read_text()
    reason = "note: --batching flat is replaced by padded: its code does not take attention functions"
    assert said.count(reason) == 1 and "of the positions; logits at learned positions only" in said
    run = json.loads((output / "run.json").read_text())
    assert run["batching"] == "padded" and any(note in f"{reason} from transformers" for note in run["notes"])


@pytest.mark.parametrize("lost", ["loss", "grad_norm"])
def test_numbers_that_are_not_finite_end_the_run_with_status_5(tmp_path, tiny_model, conversation_file, lost):
    folder = tiny_model
    if lost == "loss":  # a head that is not finite: the first loss already
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "broken"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = float("inf")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["--model_name_or_path", folder, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    flags = [*SHORT, "--deepspeed", "zero2", "--optim", "sgd", "--max_grad_norm", "0", "--learning_rate", "1e30"]

    outcome = ranks.train(tmp_path / "logs", [*argv, *flags])

    assert outcome.statuses[0] == 5
    said = "".join(outcome.outputs)
    assert said.count("error: step ") == 1 and re.search(rf"{lost} is (nan|inf): lower --learning_rate", said)
    assert "Traceback" not in said
    last = (tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)[lost] is None


def test_what_a_run_leaves_behind(train, tmp_path, conversation_file):
    output = train("run", "--deepspeed", "zero2", "--model_max_length", "60", "--hub_token", "hf_secret")

    run = json.loads((output / "run.json").read_text())
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (output / "data_ledger.jsonl").read_text().splitlines()]
    said = (tmp_path / "run-logs/rank-0.log").read_text()

    assert run["completed"] and run["world_size"] == 2 and run["versions"]["deepspeed"]
    assert run["data"]["summary"]["cut"] == len(ledger) == 1
    assert "the first 2 of 4 turns are kept" in ledger[0]["reason"]
    assert "hf_secret" not in (output / "run.json").read_text()
    assert len(metrics) == 6
    for entry in metrics:
        assert all(isinstance(entry[name], int | float) and math.isfinite(entry[name]) for name in entry)
        assert entry["tokens_per_second"] > entry["supervised_tokens_per_second"] > 0
        assert entry["peak_memory_bytes"] > 100e6
        assert 0 < entry["mfu"] < 1
    assert "auto" not in json.dumps(run["deepspeed"])
    assert "1 per device x 1 accumulated x 2 ranks = 2 examples" in said and "6 steps (2 epochs)" in said
    assert "loss by step" in said and "Next:" in said
    assert (tmp_path / "run-logs/rank-1.log").read_text().count("Plan") == 0

    repeated = tmp_path / "repeated"
    outcome = ranks.train(tmp_path / "logs", ["--config", output / "run.json", "--output_dir", repeated])
    assert outcome.succeeded, outcome.outputs[0]
    assert losses(repeated) == pytest.approx(losses(output), abs=1e-6)


def test_an_earlier_run_is_never_overwritten_silently(train, tmp_path, tiny_model, conversation_file):
    output = train("run", *LORA, "--deepspeed", "zero2")
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    again = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output, *SHORT]

    refused = ranks.train(tmp_path / "refused", [*again, "--deepspeed", "zero2"])
    assert refused.statuses[0] == 2
    assert "already holds a run, nothing was changed" in refused.outputs[0]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written

    moved = ranks.train(tmp_path / "moved", [*again, "--deepspeed", "zero2", "--overwrite_output_dir", "True"])
    assert moved.succeeded, moved.outputs[0]
    (aside,) = output.parent.glob("run.before-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == written
    assert (output / "model.safetensors").is_file()


def test_a_run_that_never_made_a_step_does_not_stand_in_the_way(tmp_path, tiny_model, conversation_file):
    argv = [
        "--model_name_or_path",
        tiny_model,
        "--data_path",
        conversation_file,
        "--output_dir",
        tmp_path / "out",
        *SHORT,
    ]
    refused = ranks.train(tmp_path / "refused", [*argv, "--deepspeed", "zero2", "--report_to", "tensorboard"], 1)
    assert refused.statuses == [2]
    assert "the Trainer refuses these flags: TensorBoardCallback requires tensorboard" in refused.outputs[0]
    assert "Traceback" not in refused.outputs[0]
    assert ranks.train(tmp_path / "again", [*argv, "--deepspeed", "zero2"], 1).succeeded


def test_a_run_that_learned_nothing_does_not_report_success(tmp_path, tiny_model, conversation_file):
    flags = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    warming_up = ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "10", "--max_steps", "1")
    outcome = ranks.train(tmp_path / "logs", [*flags, *SHORT, *LORA, "--deepspeed", "zero2", *warming_up], world_size=1)
    assert outcome.statuses == [4]
    assert "LoRA B matrices are still zero: the run learned nothing" in outcome.outputs[0]
    assert "Traceback" not in outcome.outputs[0]


BAD_INPUT = {
    "no data file": (3, "nothing.json: there is no such file", {"--data_path": "nothing.json"}),
    "bad JSON": (3, "bad.json, line 1, column", {"--data_path": "bad.json"}),
    "empty file": (3, "empty.json: the file is empty", {"--data_path": "empty.json"}),
    "unknown role": (3, 'role.json, row 0, turn 0: expected "from" to be human', {"--data_path": "role.json"}),
    "no model turn": (3, "human.json, row 0: has no model turn", {"--data_path": "human.json"}),
    "no model": (2, "/no/such/model: there is no such folder", {"--model_name_or_path": "/no/such/model"}),
    "no such name": (
        2,
        "there is no such folder, and the model hub has no answer",
        {"--model_name_or_path": "some/body"},
    ),
    "no config": (2, "--deepspeed zero9: there is no such file", {"--deepspeed": "zero9"}),
    "unknown flag": (2, "unknown flag --learning_rat: did you mean --learning_rate?", {"--learning_rat": "1"}),
    "mismatch": (
        2,
        "train_batch_size is 7, but 1 per device x 1 accumulated x 2 ranks is 2",
        {"--deepspeed": "ds.json"},
    ),
    "too short": (3, "all 6 rows are dropped", {"--model_max_length": "3"}),
    "no evaluation data": (2, "there is no evaluation data in this version", {"--eval_strategy": "epoch"}),
    "bad value": (2, "training flags contradict each other", {"--lr_scheduler_type": "wavy"}),
    "liger on a CPU": (2, "--use_liger_kernel True: its kernels need a GPU", {"--use_liger_kernel": "True"}),
    "a step that changes": (2, "a step must stay what it is", {"--auto_find_batch_size": "True"}),
    "unknown order": (2, "expected random, sequential", {"--train_sampling_strategy": "backwards"}),
    "two sizes of a batch": (2, "exclude each other", {"--tokens_per_device_batch": "500"}),
    "checkpointing": (
        2,
        "expected a JSON object",
        {"--activation_checkpointing": "True", "--activation_checkpointing_kwargs": "often"},
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_error(tmp_path, tiny_model, conversation_file, name):
    status, message, changed = BAD_INPUT[name]
    (tmp_path / "bad.json").write_text('[{"conversations": ]')
    (tmp_path / "empty.json").write_text(" \n")
    (tmp_path / "role.json").write_text('[{"conversations": [{"from": "tool", "value": "x"}]}]')
    (tmp_path / "human.json").write_text('[{"conversations": [{"from": "human", "value": "x"}]}]')
    (tmp_path / "ds.json").write_text('{"train_batch_size": 7, "zero_optimization": {"stage": 2}}')
    flags = {
        "--model_name_or_path": tiny_model,
        "--data_path": conversation_file,
        "--output_dir": tmp_path / "out",
        "--per_device_train_batch_size": "1",
        "--deepspeed": "zero2",
    }
    in_folder = {flag: tmp_path / value if value.endswith(".json") else value for flag, value in changed.items()}
    argv = [word for pair in {**flags, **in_folder}.items() for word in pair]

    outcome = ranks.train(tmp_path / "logs", argv)

    assert outcome.statuses[0] == status
    said = "".join(outcome.outputs)
    assert said.count("error: ") == 1 and message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_adapters_have_the_precision_of_their_base(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.adapters import attach_lora

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = attach_lora(base, r=2, alpha=4, dropout=0.0, target_modules=["all-linear"])
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


def test_under_zero_3_only_rank_0_reads_the_weights(tmp_path, tiny_model, conversation_file):
    argv = [
        "--model_name_or_path",
        tiny_model,
        "--data_path",
        conversation_file,
        "--output_dir",
        tmp_path / "out",
        *SHORT,
    ]
    outcome = ranks.run(tmp_path / "logs", _say_where_weights_are_read_to, ([*map(str, argv), "--deepspeed", "zero3"],))
    assert outcome.succeeded, outcome.outputs[0]
    places = [[line for line in output.splitlines() if line.startswith("read to ")] for output in outcome.outputs]
    assert places == [["read to cpu"], ["read to meta"]]


def _say_where_weights_are_read_to(argv: list[str]) -> None:
    from transformers import modeling_utils

    from finetune.train import main

    original = modeling_utils.load_state_dict

    def load_state_dict(*args, map_location="cpu", **kwargs):
        print(f"read to {map_location}", flush=True)
        return original(*args, map_location=map_location, **kwargs)

    modeling_utils.load_state_dict = load_state_dict
    main(argv)
