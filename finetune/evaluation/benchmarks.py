"""Published benchmarks and other tasks: found, loaded and explained before the model is; then asked, base and tuned."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.evaluation import lingowhale_benchmarks
from finetune.inference.load_result import BASE, TUNED, LoadedModel
from finetune.utils.errors import ConfigError, first_line, format_faults
from finetune.utils.hub import use_cache_if_hub_unreachable

logger = logging.getLogger(__name__)

INSTALL = "pip install 'lm_eval>=0.4.13,<0.5'"
ON_A_CPU = 8  # questions that are asked together under --batch_size auto
CERTAIN = 1.96


@dataclass
class BenchmarkJob:
    """Tasks that are asked with the same settings; `metric` is None where all of a task's are shown."""

    name: str
    loaded: list[Any]
    shots: int | None = None
    metric: str | None = None
    notes: list[str] = field(default_factory=list)


def find_jobs(names: Sequence[str], *, num_fewshot: int | None, allow_code: bool) -> list[BenchmarkJob]:
    """The tasks that the words name, their data read.

    Raises:
        ConfigError: lm-eval is not installed; no such task; one that runs code without the flag; data that is not here.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-evaluation-harness, which is not installed: {INSTALL}")
    wanted = [part for name in names for part in name.split(",") if part]
    if not wanted:
        raise ConfigError("--tasks names no task")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    use_cache_if_hub_unreachable()
    harness = import_harness()
    manager = harness.find_manager(wanted)
    jobs: list[BenchmarkJob] = []
    faults: list[str] = []
    for name in wanted:
        if name == lingowhale_benchmarks.SUITE:
            chosen = [one for one in lingowhale_benchmarks.BENCHMARKS if allow_code or not one.runs_code]
            for one in lingowhale_benchmarks.BENCHMARKS:
                if one not in chosen:
                    logger.warning(
                        f"{one.name} is left out: it runs programs that the model writes: --allow_code_execution"
                    )
            made = [_job_of(one, num_fewshot) for one in chosen]
        elif Path(name).is_dir():
            made = [BenchmarkJob(one, [one], num_fewshot) for one in harness.names_in(manager, Path(name))]
        else:
            made = [BenchmarkJob(name, [name], num_fewshot)]
        for job in made:
            _load(harness, manager, job, allow_code, faults)
        jobs += made
    if faults:
        raise ConfigError(format_faults(faults, "fault"))
    return jobs


def _job_of(one: lingowhale_benchmarks.Benchmark, num_fewshot: int | None) -> BenchmarkJob:
    shots = one.shots if num_fewshot is None else num_fewshot
    departures = [*one.departures, *([f"{shots}-shot, the table {one.shots}-shot"] if shots != one.shots else [])]
    return BenchmarkJob(
        one.name, [one.task], shots, one.metric, [f"{one.name}: {departure}" for departure in departures]
    )


def import_harness() -> Any:
    """`harness`, which imports lm-eval, whose own imports warn of what nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from finetune.evaluation import lm_eval_harness
    lm_eval_harness.quiet()
    return lm_eval_harness


def _load(harness: Any, manager: Any, job: BenchmarkJob, allow_code: bool, faults: list[str]) -> None:
    """Replace the name of a job's task by the task."""
    (name,) = job.loaded
    is_file = Path(name).suffix in harness.SUFFIXES
    if is_file and not Path(name).is_file():
        faults.append(f"--tasks {name}: there is no such file")
        return
    if not is_file and name not in manager.task_index:
        faults.append(f"--tasks {name}: lm-eval {_version()} knows no such task: see lm-eval ls tasks")
        return
    if not allow_code and harness.runs_code(manager, name):
        faults.append(f"--tasks {name}: runs programs that the model writes: allow it with --allow_code_execution")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job.loaded = harness.load_task(manager, name)
    except Exception as error:  # code of any task, and of the libraries that read its data, may fail in any way
        faults.append(f"--tasks {name}: {_why(job, error)}")


def _why(job: BenchmarkJob, error: Exception) -> str:
    needs = next((one.needs for one in lingowhale_benchmarks.BENCHMARKS if [one.task] == job.loaded), ())
    reason = first_line(error)[:300]
    if not needs:
        return f"its data or its code cannot be loaded: {reason}"
    return f"its data is not here ({reason}): get " + "; and ".join(map(lingowhale_benchmarks.how_to_get, needs))


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def evaluate_benchmarks(
    opened: LoadedModel,
    jobs: Sequence[BenchmarkJob],
    *,
    with_base: bool,
    limit: int | None,
    batch_size: str,
    apply_chat_template: bool,
    allow_code: bool,
) -> dict[str, Any]:
    """The document of `benchmarks.json`, on every rank.

    Raises:
        ConfigError: the result's format is no chat template; the base is not there any more.
    """
    import torch

    harness = import_harness()
    if apply_chat_template and opened.tokenizer.chat_template is None:
        raise ConfigError(
            f"--apply_chat_template: conversations of this result are in the {opened.chat_format.name} format, which "
            "lm-eval cannot write: leave the flag out"
        )
    together: int | str = batch_size if batch_size == "auto" else int(batch_size)
    if together == "auto" and not torch.cuda.is_available():
        together = ON_A_CPU

    def run(model: Any) -> list[dict[str, Any]]:
        found = []
        for job in jobs:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(
                        harness.scores(
                            model,
                            opened.tokenizer,
                            job.loaded,
                            num_fewshot=job.shots,
                            limit=limit,
                            batch_size=together,
                            apply_chat_template=apply_chat_template,
                            allow_code=allow_code,
                        )
                    )
            except (AssertionError, ValueError) as error:  # a task that has no examples to put in front, for a start
                raise ConfigError(f"--tasks {job.name}: lm-eval cannot ask it so: {first_line(error)[:300]}") from error
        return found

    found = {}
    if with_base:
        with opened.base() as base:
            found[BASE] = run(base)
    found[TUNED] = run(opened.tuned)
    scores = [
        score
        for number, job in enumerate(jobs)
        for score in scores_of_job(job, {model: results[number] for model, results in found.items()})
    ]
    notes = [note for job in jobs for note in job.notes]
    if limit is not None:
        notes.insert(0, f"only the first {limit:,} questions of each task: these are no scores to report")
    notes.append(
        "questions are in the chat format, and published scores are measured on plain text"
        if apply_chat_template
        else "questions are plain text, as published scores are measured; --apply_chat_template for chat"
    )
    is_suite = {job.name for job in jobs} & {one.name for one in lingowhale_benchmarks.BENCHMARKS}
    return {
        "result": str(opened.result.folder),
        "base": opened.base_name or opened.result.base["name"],
        "lm_eval": _version(),
        "verdict": verdict(scores),
        "scores": scores,
        "notes": notes,
        "published": lingowhale_benchmarks.PUBLISHED if is_suite else None,
        "settings": {"limit": limit, "batch_size": batch_size, "apply_chat_template": apply_chat_template},
    }


def scores_of_job(job: BenchmarkJob, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A score for each metric of each task that was named; of a benchmark of the suite its one metric."""
    scores, tuned = [], found[TUNED]
    for task in _with_metrics(job.loaded, tuned):
        name = _name(task)
        results = {model: _results(name, one) for model, one in found.items()}
        metrics = _metrics(name, tuned)
        for metric in [job.metric] if job.metric else metrics:
            score: dict[str, Any] = {
                "name": job.name if job.metric else name,
                "task": name,
                "metric": metric.removesuffix(",none"),
                "shots": job.shots if job.shots is not None else _shots(task, tuned),
                "rows": _rows(task, tuned),
            }
            label, _, kind = metric.partition(",")
            for model, values in results.items():
                value, error = values.get(metric), values.get(f"{label}_stderr,{kind}")
                score[model] = {
                    "value": value,
                    "stderr": error if isinstance(error, int | float) else None,
                }
            scores.append(score)
    return scores


def _name(task: Any) -> str:
    return getattr(task, "task_name", None) or task.name


def _results(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return found["results"].get(name) or (found["groups"] or {}).get(name, {})


def _metrics(name: str, found: dict[str, Any]) -> list[str]:
    """What was measured of a task, each as metric,filter."""
    return [
        metric
        for metric, value in _results(name, found).items()
        if "," in metric and not metric.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    ]


def _with_metrics(loaded: Sequence[Any], found: dict[str, Any]) -> list[Any]:
    """Tasks and groups; in place of a group that makes no mean of its own, its tasks."""
    chosen: list[Any] = []
    for task in loaded:
        is_bare = hasattr(task, "get_all_tasks") and not _metrics(_name(task), found)
        chosen += task.get_all_tasks() if is_bare else [task]
    return chosen


def _names(task: Any) -> list[str]:
    return [one.task_name for one in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [task.task_name]


def _shots(task: Any, results: dict[str, Any]) -> int | None:
    counts = {results["n-shot"].get(name) for name in _names(task)}
    return counts.pop() if len(counts) == 1 else None


def _rows(task: Any, results: dict[str, Any]) -> int:
    return sum(results["n-samples"][name]["effective"] for name in _names(task))


def verdict(scores: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each score that moved by more than chance, by the standard errors of both."""
    moved = []
    compared = [one for one in scores if BASE in one and None not in (one[BASE]["value"], one[TUNED]["value"])]
    for one in compared:
        apart = one[TUNED]["value"] - one[BASE]["value"]
        errors = [one[model]["stderr"] for model in (BASE, TUNED)]
        if None not in errors and abs(apart) > CERTAIN * sum(error**2 for error in errors) ** 0.5:
            moved.append(
                f"{one['name']}, {one['metric']}: {one[BASE]['value']:.4f} -> {one[TUNED]['value']:.4f}, which is more "
                "than chance"
            )
    if compared and not moved:
        return ["no score moved by more than chance would move it"]
    return moved
