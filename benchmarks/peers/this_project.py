"""This project: everything between the JSON file and examples on disk, then the second start, which finds them."""

from __future__ import annotations

from measured import MAX_LENGTH, Clock, given_task, report


def main() -> None:
    task = given_task()
    import datasets  # noqa: F401  what opening the examples imports is not measured
    from transformers import AutoTokenizer

    from finetune.chat_templates import Renderer, select_chat_format
    from finetune.dataset.data_sources import find_sources
    from finetune.dataset.prepare import PreparedData, prepare_dataset

    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)

    def start() -> tuple[PreparedData, Clock]:
        template = task.data.with_suffix(".jinja")
        name = str(template) if template.is_file() else "chatml"
        chat_format, _ = select_chat_format(tokenizer, name)
        renderer = Renderer(chat_format, MAX_LENGTH)
        sources = find_sources([str(task.data)])
        with Clock() as clock:
            prepared = prepare_dataset(sources, renderer, cache_dir=task.cache, num_processes=task.processes)
        return prepared, clock

    prepared, cold = start()
    again, warm = start()
    with warm:  # on top of the above: mapping the examples, as a training run does
        assert len(again.examples) == prepared.summary.examples
    summary = prepared.summary
    figures = {"tokens": summary.tokens, "supervised_tokens": summary.supervised_tokens, "kept": summary.kept}
    report(task, cold, rows=summary.rows, second_start_seconds=warm.seconds, **figures)


if __name__ == "__main__":
    main()
