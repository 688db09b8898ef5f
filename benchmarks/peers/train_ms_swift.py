"""ms-swift: its supervised fine-tuning, template ChatML."""

from __future__ import annotations

from trained import Watch, given_task


def main() -> None:
    task = given_task()
    from swift import SftArguments, sft_main

    watch = Watch(task)
    sft_main(
        SftArguments(
            **{**task.trainer_flags, "report_to": ["none"]},
            model=task.model,
            model_type="llama",
            template="chatml",
            system="",
            dataset=[str(task.messages)],
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            torch_dtype="float32",
            attn_impl="sdpa",
            max_length=task.max_length,
            gradient_checkpointing=False,
            add_version=False,
            tuner_type=task.adapter,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=["all-linear"],
        )
    )
    watch.report()


if __name__ == "__main__":
    main()
