"""The stock `Trainer`: rows padded to the longest of their batch, or (`longest`) all to 2048, logits of all positions.

The second is the published LingoWhale example's way. Both train on the very ids and labels of this project.
"""

from __future__ import annotations

from trained import Watch, given_task

PUBLISHED_LENGTH = 2048


def main() -> None:
    task = given_task()
    import torch
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from finetune.config import parse
    from finetune.training.data_setup import prepare_run_data

    named = {"model_name_or_path": task.model, "data_path": task.data, "output_dir": task.cache / "output"}
    more = {"model_max_length": task.max_length, "data_cache_dir": task.cache}
    arguments = parse([word for name, value in {**named, **more}.items() for word in (f"--{name}", str(value))])
    tokenizer, _, data = prepare_run_data(arguments.model, arguments.data)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in data.examples]
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    if task.adapter == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    whole = {"padding": "max_length", "max_length": PUBLISHED_LENGTH} if task.form == "longest" else {"padding": True}
    watch = Watch(task)
    Trainer(
        model=model,
        args=TrainingArguments(**task.trainer_flags, train_sampling_strategy="sequential"),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, **whole),
    ).train()
    watch.report()


if __name__ == "__main__":
    main()
