"""The questions of benchmarks, as far as they are on this machine: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.evaluation import benchmarks
from finetune.evaluation.forgetting_questions import load_questions
from finetune.utils.errors import ConfigError
from finetune.utils.hub import use_cache


def read_benchmark_questions(names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the questions by benchmark, those of `--forgetting` first, and why others cannot be read.

    Args:
        names: as in `finetune evaluate --tasks`.
    """
    questions = {"forgetting": [question.text for question in load_questions()]}
    use_cache()
    try:
        jobs, _ = benchmarks.load_jobs(names, num_fewshot=None, allow_code=False)
    except ConfigError as error:
        return questions, [str(error)]
    missing = [job.name for job in jobs if not job.tasks]
    unread = [f"{', '.join(missing)}: finetune evaluate OUTPUT --tasks says why they cannot be read"] if missing else []
    return questions | {job.name: _questions(job.tasks) for job in jobs if job.tasks}, unread


def _questions(tasks: Sequence[Any]) -> list[str]:
    """The question of each document that the tasks evaluate on."""
    each = [task for entry in tasks for task in (entry.get_all_tasks() if benchmarks.is_group(entry) else [entry])]
    return [text for task in each for document in task.eval_docs if isinstance(text := task.doc_to_text(document), str)]
