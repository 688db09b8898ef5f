"""LLaMA-Factory: its supervised stage, template ChatML, prompts masked."""

from __future__ import annotations

import json

from llama_factory import NAME, stand_in_for_torchaudio
from trained import Watch, given_task


def main() -> None:
    task = given_task()
    stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {"file_name": str(task.messages), "formatting": "sharegpt", "columns": {"messages": "messages"}}
    (task.cache / "dataset_info.json").write_text(json.dumps({NAME: {**described, "tags": tags}}))
    adapter = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": "all"}
    watch = Watch(task)
    run_exp(
        {
            **task.trainer_flags,
            "model_name_or_path": task.model,
            "stage": "sft",
            "do_train": True,
            "dataset": NAME,
            "dataset_dir": str(task.cache),
            "template": "chatml",
            "cutoff_len": task.max_length,
            "overwrite_cache": True,
            "flash_attn": "sdpa",
            "disable_shuffling": True,
            "disable_gradient_checkpointing": True,
            "finetuning_type": task.adapter,
            **(adapter if task.adapter == "lora" else {}),
        }
    )
    watch.report()


if __name__ == "__main__":
    main()
