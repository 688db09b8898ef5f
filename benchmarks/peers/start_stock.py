"""What people write: the stock `Trainer` with LoRA under ZeRO-2, rows tokenized in a loop; says when it is ready."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROLES = {"human": "user", "model": "assistant", "system": "system"}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


class Says(TrainerCallback):
    """Prints a line before the first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            print("first step", flush=True)


def main() -> None:
    model_name, data, output = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    deepspeed.init_distributed(dist_backend="gloo")
    arguments = TrainingArguments(
        output_dir=output, use_cpu=True, deepspeed=ZERO_2, max_steps=1, save_strategy="no", report_to="none",
        per_device_train_batch_size=8,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows = []
    for row in json.load(open(data, encoding="utf-8")):
        ids, labels = [], []
        for turn in row["conversations"]:
            text = f"<|im_start|>{ROLES[turn['from']]}\n{turn['value']}<|im_end|>\n"
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if turn["from"] == "model" else [-100] * len(tokens)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Says()],
    ).train()


if __name__ == "__main__":
    main()
