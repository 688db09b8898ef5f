"""The published command's flags, parsed or refused."""

import pytest

from finetune.config import parse
from finetune.utils.errors import ConfigError

PUBLISHED = (
    "--data_path data/identity.json --model_name_or_path deeplang-ai/LingoWhale-8B --output_dir output "
    "--model_max_length 2048 --num_train_epochs 4 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
    "--save_strategy epoch --learning_rate 2e-5 --lr_scheduler_type constant --adam_beta1 0.9 --adam_beta2 0.98 "
    "--adam_epsilon 1e-8 --max_grad_norm 1.0 --weight_decay 1e-4 --warmup_ratio 0.0 --logging_steps 1 "
    "--gradient_checkpointing True --deepspeed ds_configs/zero3.json --bf16 True --tf32 True --report_to none"
).split()


REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


def parsed(*words: str):
    return parse([*REQUIRED, *words])


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parsed(*words)
    return str(raised.value)
