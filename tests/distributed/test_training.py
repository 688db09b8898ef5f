"""The training story on real ranks: every ZeRO stage, full and adapters; what is saved loads with plain libraries."""

import json
from itertools import product
from pathlib import Path

import pytest

from finetune.models.stored_tensors import StoredTensors
from tests.helpers import ranks
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.short_runs import LORA, SHORT, losses
from tests.helpers.tiers import mostly_slow

SAVING = ("--save_strategy", "steps", "--save_steps", "2")  # between steps that all ranks must go on to make


def load_adapter(output: Path):
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(output)


def logits(model, ids=(1, 4093, 198, 2)):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(ids)])).logits


@pytest.mark.parametrize("adapter", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_every_zero_stage_gives_the_same_losses(train, adapter):
    by_stage = {stage: losses(train(stage, "--deepspeed", stage, *adapter)) for stage in ("zero1", "zero2", "zero3")}
    assert len(by_stage["zero1"]) == 6
    assert by_stage["zero1"][-1] < by_stage["zero1"][0] - 0.1
    assert by_stage["zero2"] == pytest.approx(by_stage["zero1"], abs=1e-5)
    assert by_stage["zero3"] == pytest.approx(by_stage["zero1"], abs=1e-5)


# Offloaded optimizers wait for DeepSpeed to compile CPUAdam, minutes on a slow machine.
@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload", "zeropp"])
def test_offload_and_zeropp_give_the_losses_of_their_stage(train, config, tmp_path):
    linear = ("--lr_scheduler_type", "linear")
    plain, other = train("plain", "--deepspeed", "zero3", *linear), train(config, "--deepspeed", config, *linear)
    assert losses(other) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(other, "learning_rate") == losses(plain, "learning_rate")  # of the step, whoever holds the schedule
    said = (tmp_path / f"{config}-logs/rank-0.log").read_text()
    assert ("zero_quantized_weights is off: its kernels need a GPU" in said) == (config == "zeropp")


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
        pytest.param(
            "lora",
            ("--use_lora", "True", "--deepspeed", "zero3", "--gradient_checkpointing", "True"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "named",
            ("--adapter", "lora", "--lora_target_modules", "q_proj", "v_proj", "--deepspeed", "zero2"),
            marks=pytest.mark.slow,
        ),
        pytest.param("dora", (*LORA, "--use_dora", "True", "--deepspeed", "zero3"), marks=pytest.mark.slow),
        pytest.param(
            "rslora",
            (*LORA, "--use_rslora", "True", "--lora_r", "4", "--lora_alpha", "8", "--deepspeed", "zero2"),
            marks=pytest.mark.slow,
        ),
        pytest.param("head", (*LORA, "--modules_to_save", "lm_head", "--deepspeed", "zero3"), marks=pytest.mark.slow),
        ("prefix", ("--adapter", "prefix", "--num_virtual_tokens", "3", "--deepspeed", "zero3", *SAVING)),
        pytest.param(
            "prompt",
            ("--adapter", "prompt", "--num_virtual_tokens", "3", "--deepspeed", "zero3", *SAVING),
            marks=pytest.mark.slow,
        ),
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


@pytest.mark.slow
def test_prefix_tuning_switches_checkpointing_off_with_a_line(train, tmp_path):
    with_it = train("with", "--adapter", "prefix", "--deepspeed", "zero2", "--gradient_checkpointing", "True")
    without = train("without", "--adapter", "prefix", "--deepspeed", "zero2")
    assert losses(with_it) == pytest.approx(losses(without), abs=1e-6)
    assert "--activation_checkpointing is off: prefix tuning" in (tmp_path / "with-logs/rank-0.log").read_text()


@pytest.mark.parametrize(
    ("start", "rslora"),
    mostly_slow(product(["pissa", "pissa_niter_4", "olora"], [False, True]), [("pissa", False), ("olora", True)]),
)
def test_moved_base_weights_are_saved_as_a_plain_lora_for_the_original_base(tmp_path, tiny_model, start, rslora):
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.models.adapters import InitialLora
    from tests.helpers.lora import attach_lora

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


@pytest.mark.slow
def test_pissa_under_zero_3_gives_the_losses_of_zero_2_and_loads(train):
    flags = (*LORA, "--init_lora_weights", "pissa")
    stage_2, stage_3 = (train(stage, "--deepspeed", stage, *flags) for stage in ("zero2", "zero3"))
    assert losses(stage_3) == pytest.approx(losses(stage_2), abs=1e-4)
    config = json.loads((stage_3 / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (16, 32, True)
    assert logits(load_adapter(stage_3)).isfinite().all()


def test_experts_under_zero_3_train_as_under_zero_2_and_frozen_weights_are_proven_unchanged(train, tmp_path):
    from tests.helpers import tiny_models

    tiny_models.build("gpt_oss", vocab_size=270).save_pretrained(tmp_path / "experts")
    byte_tokenizer().save_pretrained(tmp_path / "experts")
    stage_2, stage_3 = (
        train(stage, "--deepspeed", stage, "--use_lora", "True", "--max_steps", "3", model=tmp_path / "experts")
        for stage in ("zero2", "zero3")
    )

    assert losses(stage_3) == pytest.approx(losses(stage_2), abs=1e-5)
    run = json.loads((stage_3 / "run.json").read_text())
    assert run["plan"]["kinds"]["routed experts"]["state"] == "trained"
    assert run["plan"]["kinds"]["router"] == {"state": "frozen", "trained": 0, "frozen": 264}
    assert run["result"]["tensors"]["routed experts"] == {"trained": 8, "changed": 8, "frozen": 8}
    assert "24 of 24 trained tensors changed" in (tmp_path / "zero3-logs/rank-0.log").read_text()


def test_without_deepspeed_weights_that_files_name_otherwise_are_resumed_too(train, tmp_path):
    from tests.helpers import vision_models

    folder = vision_models.save("gemma3", tmp_path / "base", vocab_size=270)
    byte_tokenizer().save_pretrained(folder)
    processors = {"preprocessor_config.json", "processor_config.json"}
    for name in processors:
        (folder / name).write_text('{"image_size": 16}')
    flags = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    output = train("run", *flags, world_size=1, model=folder)
    whole = losses(output)
    resumed = train("run", *flags, "--resume_from_checkpoint", str(output / "checkpoint-1"), world_size=1, model=folder)
    assert losses(resumed) == whole and len(whole) == 2
    assert processors <= {path.name for path in resumed.iterdir()}
    run = json.loads((resumed / "run.json").read_text())
    assert run["result"]["base_tensors"]["missing"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "llama4"])
def test_a_checkpoint_with_images_is_whole_after_two_ranks_of_zero_3(train, tmp_path, family):
    from tests.helpers import vision_models

    base = vision_models.save(family, tmp_path / "base", vocab_size=270)
    byte_tokenizer().save_pretrained(base)
    output = train("run", "--deepspeed", "zero3", "--max_steps", "2", model=base)
    before, after = StoredTensors(base), StoredTensors(output)
    assert set(before) == set(after)
    same = {name for name in before if before[name].dtype == after[name].dtype and before[name].equal(after[name])}
    assert 0 < len(same) < len(before)
    assert {name for name in before if "vision" in name or "visual" in name} <= same
    assert json.loads((output / "run.json").read_text())["result"]["base_tensors"]["missing"] == 0


@pytest.mark.slow
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
    output = train("run", *LORA, "--deepspeed", "zero3", "--bf16", "True", "--tf32", "True", world_size=1)
    run = json.loads((output / "run.json").read_text())
    said = (tmp_path / "run-logs/rank-0.log").read_text()
    assert run["precision"] == "float32" and run["deepspeed"]["bf16"]["enabled"] is False
    assert said.count("note: --bf16 is off") == 1 and said.count("note: --tf32 is off") == 1


@pytest.mark.slow
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

    from finetune import train
    from finetune.config import resolve
    from finetune.config.hardware import HardwareConfig

    get_accelerator().is_bf16_supported = lambda: True  # emulated is good enough for two small steps
    resolve.resolve_hardware = lambda found, **asked: HardwareConfig("bf16", None, "sdpa", "gloo", use_cpu=True)
    train.main(argv)


@pytest.mark.slow
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

    output = train("padded", "--deepspeed", "zero3", model=folder, world_size=1)

    said = (tmp_path / "padded-logs/rank-0.log").read_text()
    reason = "--batching flat: fallback to padded because its code does not take attention functions"
    assert said.count(reason) == 1 and "of the positions; logits at supervised positions only" in said
    run = json.loads((output / "run.json").read_text())
    assert run["batching"] == "padded" and any(note in f"{reason} from transformers" for note in run["notes"])


def test_adapters_have_the_precision_of_their_base(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.helpers.lora import attach_lora

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = attach_lora(base, r=2, alpha=4, dropout=0.0, target_modules=["all-linear"])
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
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
