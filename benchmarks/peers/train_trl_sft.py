"""TRL: `SFTTrainer` with the loss on the assistant's turns only, padded or packed."""

from __future__ import annotations

from measured import CHATML_WITH_GENERATION
from trained import Watch, given_task


def main() -> None:
    task = given_task()
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.chat_template = CHATML_WITH_GENERATION
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    batch = {"per_device_train_batch_size": max(1, task.batch // 4)} if task.form == "packed" else {}
    arguments = SFTConfig(
        **{**task.trainer_flags, **batch},
        assistant_only_loss=True,
        max_length=task.max_length,
        packing=task.form == "packed",
        model_init_kwargs={"dtype": torch.float32},
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
    )
    data = load_dataset("json", data_files=str(task.messages), split="train")
    watch = Watch(task)
    SFTTrainer(
        task.model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora if task.adapter == "lora" else None,
    ).train()
    watch.report()


if __name__ == "__main__":
    main()
