"""A model with Python files of its own and a sentencepiece tokenizer trains, saves with its files, and loads again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from conftest import ROOT, ROWS

FLAGS = (
    "--gradient_checkpointing True --num_train_epochs 2 --per_device_train_batch_size 2 --learning_rate 1e-2 "
    "--logging_steps 1"
).split()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """Made in a process of its own: registering code with transformers' Auto classes is global."""
    folder = tmp_path_factory.mktemp("stand_in")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, cwd=ROOT / "tests")
    return folder


def make(folder: Path) -> None:
    """A folder as the hub would hold it: weights, config with auto_map, code, a sentencepiece model."""
    import sentencepiece
    import torch
    from qkv_code import QkvConfig, QkvForCausalLM

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text for turns in ROWS for _, text in turns) + "\nabcdefghijklmnopqrstuvwxyz", "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=380, byte_fallback=True,
        model_type="bpe", pad_id=0, bos_id=1, eos_id=2, unk_id=5, user_defined_symbols=["<human>", "<model>"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    torch.manual_seed(0)
    QkvForCausalLM(QkvConfig()).save_pretrained(folder)
    shutil.copy(ROOT / "tests/qkv_code.py", folder / "modeling_qkv.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_qkv.QkvConfig",
        "AutoModelForCausalLM": "modeling_qkv.QkvForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    )


def load(output: Path, adapter: bool) -> str:
    """Load a result in a fresh interpreter that knows nothing of the stand-in; returns the generated ids."""
    loader = "peft import AutoPeftModelForCausalLM" if adapter else "transformers import AutoModelForCausalLM"
    name = loader.split()[-1]
    code = (
        f"from {loader}; import torch\n"
        f"m = {name}.from_pretrained({str(output)!r}, trust_remote_code=True)\n"
        "print(m.generate(input_ids=torch.tensor([[3, 20, 30, 4]]), max_new_tokens=3, do_sample=False).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=output)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [
        ("zero2", ()),
        ("zero3", ()),
        ("zero3", ("--use_lora", "True", "--lora_target_modules", "qkv_proj")),
    ],
    ids=["full-zero2", "full-zero3", "lora-zero3"],
)
def test_it_trains_saves_its_code_and_loads(stand_in, conversation_file, tmp_path, stage, adapter):
    output = tmp_path / "output"
    flags = ["--model_name_or_path", stand_in, "--data_path", conversation_file, "--output_dir", output]
    outcome = ranks.train(
        tmp_path / "logs",
        [
            *flags,
            *FLAGS,
            *adapter,
            "--deepspeed",
            stage,
            "--trust_remote_code",
            "True",
            "--chat_template",
            "lingowhale",
        ],
    )
    assert outcome.succeeded, outcome.outputs[0]
    assert "--gradient_checkpointing is off: this model's code does not support it" in outcome.outputs[0]
    if not adapter:
        assert (output / "modeling_qkv.py").is_file()
    assert "[[3, 20, 30, 4" in load(output, bool(adapter))


def test_without_the_flag_the_error_names_it(stand_in, conversation_file, tmp_path):
    flags = ["--model_name_or_path", stand_in, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    outcome = ranks.train(tmp_path / "logs", [*flags, "--deepspeed", "zero2"], world_size=1)
    assert outcome.statuses == [2]
    assert "comes with Python files of its own" in outcome.outputs[0]
    assert "--trust_remote_code True" in outcome.outputs[0]
    assert "Traceback" not in outcome.outputs[0]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
