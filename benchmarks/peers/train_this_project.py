"""This project: its training story as the launcher would run it, on one rank."""

from __future__ import annotations

from trained import Watch, given_task


def main() -> None:
    task = given_task()
    flags = {
        **task.trainer_flags,
        "model_name_or_path": task.model,
        "data_path": task.data,
        "data_cache_dir": task.cache,
        "model_max_length": task.max_length,
        "batching": task.form,
        "train_sampling_strategy": "sequential",
    }
    if task.form == "packed":  # about as many tokens in a step as the others have
        flags["per_device_train_batch_size"] = max(1, task.batch // 4)
    if task.adapter == "lora":
        flags |= {"use_lora": True, "lora_dropout": 0}
    from finetune.train import main as train

    watch = Watch(task)
    train([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    watch.report()


if __name__ == "__main__":
    main()
