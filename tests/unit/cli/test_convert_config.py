"""`finetune convert-config`: configs of other programs as recipes; what has no flag here is listed."""

import pytest

from finetune.cli import convert_config
from finetune.config import parse
from finetune.utils.errors import ConfigError

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-8B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: a.json, b.json
template: qwen3
cutoff_len: 4096
quantization_bit: 4
output_dir: o
per_device_train_batch_size: 1
learning_rate: 1.0e-4
plot_loss: true
bf16: true
"""
AXOLOTL = """
base_model: Qwen/Qwen3-8B
adapter: qlora
datasets: [{path: my.jsonl, type: chat_template}]
sequence_len: 2048
micro_batch_size: 2
num_epochs: 3
lora_target_linear: true
sample_packing: true
bf16: auto
val_set_size: 0.05
hub_model_id: me/x
output_dir: o
zorro: 3
"""
SWIFT = """
model: Qwen/Qwen3-8B
train_type: full
dataset: [my.jsonl]
torch_dtype: bfloat16
max_length: 8192
split_dataset_ratio: 0.01
output_dir: o
loss_scale: default
val_dataset: [x#5]
"""


TRL = """
model_name_or_path: Qwen/Qwen3-8B
model_name: my-robot
dataset_name: my.jsonl
use_peft: true
lora_r: 32
lora_target_linear: true
lora_target_modules: [q_proj]
attn_implementation: sdpa
new_special_tokens: <a>,<b>
chat_template: llama3
push_to_hub: true
eval_dataset: [{ds_type: json}]
val_size: [1]
output_dir: o
"""


@pytest.mark.parametrize(
    ("text", "program", "expected", "left_out"),
    [
        (
            LLAMA_FACTORY,
            "LLaMA-Factory",
            {"lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"], "data_path": ["a.json", "b.json"],
             "model_max_length": 4096, "load_in_4bit": True, "use_lora": True, "learning_rate": 1e-4},
            ("stage", "template: 'qwen3'", "plot_loss"),
        ),
        (
            AXOLOTL,
            "axolotl",
            {"use_lora": True, "load_in_4bit": True, "data_path": ["my.jsonl"], "per_device_train_batch_size": 2,
             "lora_target_modules": ["all-linear"], "batching": "packed", "bf16": True, "validation_share": 0.05},
            ("zorro: 3: unknown here", "datasets.type: 'chat_template': formats of rows",
             "hub_model_id: 'me/x': `finetune push`"),
        ),
        (
            SWIFT,
            "ms-swift",
            {"bf16": True, "model_max_length": 8192, "validation_share": 0.01, "use_lora": False},
            ("loss_scale: 'default'", "val_dataset: ['x#5']: "),
        ),
        (
            TRL,
            "TRL",
            {"model_name_or_path": "Qwen/Qwen3-8B", "use_lora": True, "lora_target_modules": ["all-linear"],
             "attn_implementation": "sdpa", "new_tokens": ["<a>", "<b>"], "chat_template": None},
            ("model_name: 'my-robot': another key says --model_name_or_path Qwen/Qwen3-8B",
             "lora_target_modules: ['q_proj']: another key says", "push_to_hub: True: it would upload rows", "val_size",
             "eval_dataset", "chat_template: 'llama3'"),
        ),
    ],
)  # fmt: skip
def test_a_config_becomes_a_recipe_that_parses(text, program, expected, left_out, tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    convert_config.main([str(tmp_path / "theirs.yaml"), str(recipe)])
    said = capsys.readouterr().err
    flags = parse([str(recipe)]).flat()
    assert {name: flags[name] for name in expected} == expected
    assert program in said and [part for part in left_out if f"left out: {part}" not in said] == []
    for difference in ("mask:", "truncation:", "loss:", "line break after the answer:"):
        assert f"convert-config: {difference}" in said
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        convert_config.main([str(tmp_path / "theirs.yaml"), str(recipe)])
