"""LLaMA-Factory: its conversion to its own columns, then its supervised dataset processor, ChatML, prompts masked."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

from measured import MAX_LENGTH, Clock, given_task, report, token_counts

NAME = "conversations"


def main() -> None:
    task = given_task()
    stand_in_for_torchaudio()
    from llamafactory.data import loader
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {"file_name": str(task.messages), "formatting": "sharegpt", "columns": {"messages": "messages"}}
    (task.cache / "dataset_info.json").write_text(json.dumps({NAME: {**described, "tags": tags}}))
    model_arguments = ModelArguments(model_name_or_path=task.tokenizer)
    data_arguments = DataArguments(
        dataset=NAME,
        dataset_dir=str(task.cache),
        template="chatml",
        cutoff_len=MAX_LENGTH,
        train_on_prompt=False,
        overwrite_cache=True,
        preprocessing_num_workers=None if task.processes == 1 else task.processes,
    )
    training_arguments = Seq2SeqTrainingArguments(str(task.cache / "output"), use_cpu=True, report_to="none")
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    template = get_template_and_fix_tokenizer(tokenizer, data_arguments)
    reading, clock = Clock(), Clock()
    loader.load_dataset = reading.around(loader.load_dataset)
    arguments = (template, model_arguments, data_arguments, training_arguments)
    with clock:
        prepared = loader.get_dataset(*arguments, stage="sft", tokenizer=tokenizer)["train_dataset"]
    counts = token_counts(prepared["input_ids"], prepared["labels"])
    report(task, clock, rows=len(prepared), reading=reading, **counts)


def stand_in_for_torchaudio() -> None:
    """It is imported for audio inputs only, and the one on PyPI does not load beside a CPU build of torch."""
    stand_in = types.ModuleType("torchaudio")
    stand_in.__version__, stand_in.__spec__ = "0", importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in


if __name__ == "__main__":
    main()
