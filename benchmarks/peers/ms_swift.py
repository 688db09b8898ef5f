"""ms-swift: its conversion to messages, then `EncodePreprocessor`, which calls the template on every row."""

from __future__ import annotations

from measured import MAX_LENGTH, Clock, given_task, report, token_counts


def main() -> None:
    task = given_task()
    from swift import EncodePreprocessor, get_processor, get_template, load_dataset
    from swift.dataset import loader

    processor = get_processor(task.tokenizer, model_type="llama", download_model=False)
    template = get_template(processor, default_system="", max_length=MAX_LENGTH, template_type="chatml")
    template.set_mode("train")
    reading, clock = Clock(), Clock()
    loader.hf_load_dataset = reading.around(loader.hf_load_dataset)
    with clock:
        data, _ = load_dataset([str(task.messages)], num_proc=task.processes, load_from_cache_file=False, strict=True)
        prepared = EncodePreprocessor(template)(
            data, num_proc=task.processes, load_from_cache_file=False, strict=True, batch_size=1000
        )
    counts = token_counts(prepared["input_ids"], prepared["labels"])
    report(task, clock, rows=len(prepared), reading=reading, **counts)


if __name__ == "__main__":
    main()
