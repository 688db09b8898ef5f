"""Benchmarks of lm-evaluation-harness: load the tasks, then run them on the base and the tuned model."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from finetune.evaluation import lingowhale_benchmarks
from finetune.evaluation.forgetting import load_questions
from finetune.evaluation.task_names import SUFFIXES, split_names
from finetune.evaluation.token_losses import MeasuredModel, measure_each
from finetune.inference.load_result import BASE, TUNED, LoadedModel
from finetune.utils.errors import ConfigError, first_line, raise_faults
from finetune.utils.hub import use_cache, use_cache_if_hub_unreachable

logger = logging.getLogger(__name__)

CPU_BATCH_SIZE = 8  # for --batch_size auto
Z_95 = 1.96  # standard errors in a 95 % interval
MAX_REASON = 300  # characters of another library's error


@dataclass
class BenchmarkJob:
    """Tasks that run with the same settings."""

    name: str
    task_name: str
    shots: int | None = None
    metric: str | None = None  # the metric to show, as metric,filter; None: all metrics of each task
    notes: list[str] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)  # tasks and groups of lm-eval, once they are loaded


def find_jobs(names: Sequence[str], *, num_fewshot: int | None, allow_code: bool) -> list[BenchmarkJob]:
    """Find the tasks with these names and load their data, online where the hub can be reached."""
    use_cache_if_hub_unreachable()
    jobs, faults = load_jobs(names, num_fewshot=num_fewshot, allow_code=allow_code)
    raise_faults(faults)
    return jobs


def load_jobs(
    names: Sequence[str], *, num_fewshot: int | None, allow_code: bool
) -> tuple[list[BenchmarkJob], list[str]]:
    """Load the tasks with these names; also return why some cannot be loaded."""
    names = split_names(names)
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    harness = import_harness()
    manager = harness.find_manager(names)
    jobs: list[BenchmarkJob] = []
    for name in names:
        if name == lingowhale_benchmarks.SUITE:
            for benchmark in lingowhale_benchmarks.BENCHMARKS:
                if allow_code or not benchmark.runs_code:
                    jobs.append(_benchmark_job(benchmark, num_fewshot))
                else:
                    logger.warning(
                        f"{benchmark.name} is skipped: it runs programs that the model writes: --allow_code_execution"
                    )
        else:
            tasks = harness.names_in(manager, Path(name)) if Path(name).is_dir() else [name]
            jobs += [BenchmarkJob(task, task, num_fewshot) for task in tasks]
    return jobs, [fault for job in jobs if (fault := _load(harness, manager, job, allow_code))]


def _benchmark_job(benchmark: lingowhale_benchmarks.Benchmark, num_fewshot: int | None) -> BenchmarkJob:
    shots = benchmark.shots if num_fewshot is None else num_fewshot
    departures = [*benchmark.departures]
    if shots != benchmark.shots:
        departures.append(f"{shots}-shot, the table {benchmark.shots}-shot")
    notes = [f"{benchmark.name}: {departure}" for departure in departures]
    return BenchmarkJob(benchmark.name, benchmark.task, shots, benchmark.metric, notes)


def read_benchmark_questions(names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the questions by benchmark, those of `--forgetting` first, and why others cannot be read; no downloads.

    Args:
        names: as in `finetune evaluate --tasks`.
    """
    questions = {"forgetting": [question.text for question in load_questions()]}
    use_cache()
    try:
        jobs, _ = load_jobs(names, num_fewshot=None, allow_code=False)
    except ConfigError as error:
        return questions, [str(error)]
    missing = [job.name for job in jobs if not job.tasks]
    unread = [f"{', '.join(missing)}: finetune evaluate OUTPUT --tasks says why they cannot be read"] if missing else []
    return questions | {job.name: _questions(job.tasks) for job in jobs if job.tasks}, unread


def _questions(tasks: Sequence[Any]) -> list[str]:
    each = [task for entry in tasks for task in (entry.get_all_tasks() if is_group(entry) else [entry])]
    return [text for task in each for document in task.eval_docs if isinstance(text := task.doc_to_text(document), str)]


def import_harness() -> Any:
    """Import `lm_eval_harness` without the warnings of lm-eval's own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from finetune.evaluation import lm_eval_harness
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval_harness


def _load(harness: Any, manager: Any, job: BenchmarkJob, allow_code: bool) -> str | None:
    """Load the tasks of a job; return why that is not possible, or None."""
    name = job.task_name
    if Path(name).suffix not in SUFFIXES and name not in manager.task_index:
        return f"--tasks {name}: lm-eval {version('lm_eval')} knows no such task: see lm-eval ls tasks"
    if not allow_code and harness.runs_code(manager, name):
        return f"--tasks {name}: runs programs that the model writes: allow it with --allow_code_execution"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job.tasks = harness.load_task(manager, name)
    except Exception as error:  # the code of a task, and libraries that read its data, may raise anything
        reason = first_line(error)[:MAX_REASON]
        needs = next((suite.needs for suite in lingowhale_benchmarks.BENCHMARKS if suite.task == name), ())
        if not needs:
            remedy = f": copy {constants.HF_HOME} from where it is loaded, or set HF_ENDPOINT to a mirror"
            reason += remedy * constants.HF_HUB_OFFLINE
            return f"--tasks {name}: its data or its code cannot be loaded: {reason}"
        remedies = "; and ".join(map(lingowhale_benchmarks.how_to_get, needs))
        return f"--tasks {name}: its data is missing ({reason}): get {remedies}"
    return None


def evaluate_benchmarks(
    loaded: LoadedModel,
    jobs: Sequence[BenchmarkJob],
    *,
    limit: int | None,
    batch_size: str,
    apply_chat_template: bool,
    allow_code: bool,
) -> dict[str, Any]:
    """Run the tasks and return the content of `benchmarks.json`, on every rank."""
    harness = import_harness()
    if apply_chat_template and loaded.tokenizer.chat_template is None:
        raise ConfigError(
            f"--apply_chat_template: lm-eval cannot write the {loaded.chat_format.name} format of this result: leave "
            "the flag out"
        )
    questions_per_batch: int | str = batch_size if batch_size == "auto" else int(batch_size)
    if questions_per_batch == "auto" and not torch.cuda.is_available():
        questions_per_batch = CPU_BATCH_SIZE

    def run(model: MeasuredModel) -> list[dict[str, Any]]:
        results = []
        for job in jobs:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results.append(
                        harness.run_tasks(
                            model.model,
                            loaded.tokenizer,
                            questions_per_batch,
                            tasks=job.tasks,
                            num_fewshot=job.shots,
                            limit=limit,
                            apply_chat_template=apply_chat_template,
                            confirm_run_unsafe_code=allow_code,
                        )
                    )
            except (AssertionError, ValueError) as error:  # for example a task without examples for few-shot prompts
                reason = first_line(error)[:MAX_REASON]
                raise ConfigError(f"--tasks {job.name}: lm-eval does not accept these settings: {reason}") from error
        return results

    results = measure_each(loaded, run)
    scores = [
        score
        for index, job in enumerate(jobs)
        for score in scores_of_job(job, {model: of_jobs[index] for model, of_jobs in results.items()})
    ]
    notes = [note for job in jobs for note in job.notes]
    if limit is not None:
        notes.insert(0, f"only the first {limit:,} questions of each task: not comparable with published scores")
    notes.append(
        "questions are in the chat format; published scores use plain text"
        if apply_chat_template
        else "questions are plain text, as for published scores; --apply_chat_template for the chat format"
    )
    is_suite = {job.name for job in jobs} & {benchmark.name for benchmark in lingowhale_benchmarks.BENCHMARKS}
    return {
        "lm_eval": version("lm_eval"),
        "verdict": verdict(scores),
        "scores": scores,
        "notes": notes,
        "published": lingowhale_benchmarks.PUBLISHED if is_suite else None,
        "settings": {"limit": limit, "batch_size": batch_size, "apply_chat_template": apply_chat_template},
    }


def scores_of_job(job: BenchmarkJob, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a score for each metric of each task; for a benchmark of the suite its one metric."""
    scores, tuned = [], results[TUNED]
    for task in _tasks_with_metrics(job.tasks, tuned):
        name = _name(task)
        subtasks = task.get_all_tasks() if is_group(task) else [task]
        shots = {tuned["n-shot"].get(subtask.task_name) for subtask in subtasks}
        for metric in [job.metric] if job.metric else _metrics(name, tuned):
            label, _, filter_name = metric.partition(",")
            score: dict[str, Any] = {
                "name": job.name if job.metric else name,
                "task": name,
                "metric": metric.removesuffix(",none"),
                "shots": job.shots if job.shots is not None else shots.pop() if len(shots) == 1 else None,
                "rows": sum(tuned["n-samples"][subtask.task_name]["effective"] for subtask in subtasks),
            }
            for model, of_model in results.items():
                values = _values(name, of_model)
                error = values.get(f"{label}_stderr,{filter_name}")
                score[model] = {
                    "value": values.get(metric),
                    "stderr": error if isinstance(error, int | float) else None,
                }
            scores.append(score)
    return scores


def is_group(task: Any) -> bool:
    """Whether this is a group of tasks."""
    return hasattr(task, "get_all_tasks")


def _name(task: Any) -> str:
    return getattr(task, "task_name", None) or task.name


def _values(name: str, results: dict[str, Any]) -> dict[str, Any]:
    return results["results"].get(name) or (results["groups"] or {}).get(name, {})


def _metrics(name: str, results: dict[str, Any]) -> list[str]:
    """Return the metrics of a task, each as metric,filter."""
    return [
        metric
        for metric, value in _values(name, results).items()
        if "," in metric and not metric.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    ]


def _tasks_with_metrics(tasks: Sequence[Any], results: dict[str, Any]) -> list[Any]:
    """Return the tasks and groups; a group without a mean of its own is replaced by its tasks."""
    with_metrics: list[Any] = []
    for task in tasks:
        is_bare = is_group(task) and not _metrics(_name(task), results)
        with_metrics += task.get_all_tasks() if is_bare else [task]
    return with_metrics


def verdict(scores: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each score that changed significantly, judged by the standard errors of both."""
    sentences = []
    compared = [
        score for score in scores if BASE in score and None not in (score[BASE]["value"], score[TUNED]["value"])
    ]
    for score in compared:
        base, tuned = score[BASE], score[TUNED]
        if base["stderr"] is None or tuned["stderr"] is None:
            continue
        if abs(tuned["value"] - base["value"]) > Z_95 * (base["stderr"] ** 2 + tuned["stderr"] ** 2) ** 0.5:
            sentences.append(
                f"{score['name']}, {score['metric']}: {base['value']:.4f} -> {tuned['value']:.4f}, a significant change"
            )
    return sentences if sentences or not compared else ["no score changed significantly"]
