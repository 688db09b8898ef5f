"""The floor: the tokenizer alone, one batched call over conversations that are rendered already."""

from __future__ import annotations

import json
import multiprocessing

from measured import CHATML, CHATML_WITH_TOOLS, Clock, given_task, report


def main() -> None:
    task = given_task()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    rows = json.loads(task.messages.read_text(encoding="utf-8"))
    for call in (call for row in rows for message in row["messages"] for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    texts = [
        tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=CHATML_WITH_TOOLS if "tools" in row else CHATML,
            tokenize=False,
        )
        for row in rows
    ]
    figures = {}
    with Clock() as clock:
        if task.processes == 1:
            encoded = tokenizer(texts, add_special_tokens=False)
        else:
            _in_processes(tokenizer, texts, task.processes)
    if task.processes == 1:
        figures["tokens"] = sum(map(len, encoded["input_ids"]))
    report(task, clock, rows=len(rows), **figures)


def _in_processes(tokenizer: object, texts: list[str], processes: int) -> None:
    """The same texts, dealt to forked processes that keep what they get."""
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=tokenizer, args=(texts[first::processes],), kwargs={"add_special_tokens": False})
        for first in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a forked process failed")


if __name__ == "__main__":
    main()
