"""Run tasks of lm-evaluation-harness on a loaded model, with requests divided among the ranks.

Every rank builds all requests, answers its share, and receives all answers: the harness computes the same everywhere,
with any number of ranks and requests.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.evaluation.task_names import OWN_TASKS, SUFFIXES
from finetune.utils.console import is_rank_0
from finetune.utils.errors import ConfigError

BOOTSTRAP_ITERS = 1000  # for metrics that are not means; the standard error of a mean has a formula


class SharedModel(HFLM):
    """The harness's transformers model around a loaded one; each rank answers its share of the requests."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._divided(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._divided(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._divided(super().generate_until, requests, disable_tqdm)

    def _divided(self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        share = requests[get_rank() :: get_world_size()]
        parts = all_gather_object(answer(share, disable_tqdm=disable_tqdm or not is_rank_0()) if share else [])
        answers: list[Any] = [None] * len(requests)
        for rank, part in enumerate(parts):
            answers[rank :: get_world_size()] = part
        return answers


def find_manager(names: Sequence[str]) -> TaskManager:
    """Return a manager of the harness's tasks, this project's, and those of the folders among the names.

    The harness reads a file for each of its 14,000 tasks. They are skipped if only files and folders are named and none
    of them refers to other tasks.
    """
    folders = [Path(name) for name in names if Path(name).is_dir()]
    if all(Path(name).is_dir() or Path(name).suffix in SUFFIXES for name in names):
        manager = TaskManager(include_path=[OWN_TASKS, *folders], include_defaults=False)
        files = [Path(name) for name in names if Path(name).is_file()]
        configs = [load_yaml(path, resolve_func=False) for path in files]
        configs += [_config(manager, name) for name in manager.all_tasks]
        if all(child in manager.task_index for config in configs for child in _children(config)):
            return manager
    return TaskManager(include_path=[OWN_TASKS, *folders])


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    entry = manager.task_index[name]
    return entry.cfg or (load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path is not None else {})


def _children(config: dict[str, Any]) -> list[str]:
    """Return the tasks and groups that a group refers to by name."""
    entries = config.get("task")
    return [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []


def names_in(manager: TaskManager, folder: Path) -> list[str]:
    """Return the tasks and groups of a folder that are not part of another group in it."""
    names = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and entry.yaml_path.resolve().is_relative_to(folder.resolve())
    ]
    members = {child for name in names for child in _children(_config(manager, name))}
    top_level = sorted(set(names) - members)
    if not top_level:
        raise ConfigError(f"--tasks {folder}: the folder has no YAML file of a task or group")
    return top_level


def files_of(manager: TaskManager, name: str) -> list[Path]:
    """Return the YAML files of a task, or of all tasks of a group, as far as known without loading them."""
    path = Path(name)
    if path.suffix in SUFFIXES and path.is_file():
        return [path]
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    files = [entry.yaml_path] if entry.yaml_path is not None else []
    children = sorted(entry.tags) if entry.kind.name == "TAG" else _children(_config(manager, name))
    return files + [path for child in children if child != name for path in files_of(manager, child)]


def runs_code(manager: TaskManager, name: str) -> bool:
    """Whether a task runs programs that the model writes; known before the task's code is loaded."""
    return any(load_yaml(path, resolve_func=False).get("unsafe_code") for path in files_of(manager, name))


def load_task(manager: TaskManager, name: str) -> list[Any]:
    """Load a task or group with its data; a tag gives several. Data files may be next to the YAML file."""
    folders = [path.resolve().parent for path in files_of(manager, name) if _has_data_files_beside(path)]
    absolute_name = str(Path(name).resolve()) if Path(name).suffix in SUFFIXES else name
    with contextlib.chdir(folders[0]) if folders else contextlib.nullcontext():
        loaded = manager.load([absolute_name])
    groups = loaded["groups"]
    subgroups = {child for children in loaded["group_map"].values() for child in children}
    grouped_tasks = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [
        *(group for group_name, group in groups.items() if group_name not in subgroups),
        *(task for task_name, task in loaded["tasks"].items() if task_name not in grouped_tasks),
    ]


def _has_data_files_beside(path: Path) -> bool:
    """Whether the data files of a task are relative to its YAML file, not to the working directory."""
    files = _strings((load_yaml(path, resolve_func=False).get("dataset_kwargs") or {}).get("data_files"))
    return bool(files) and all(
        not Path(file).is_absolute() and "://" not in file and not Path(file).exists() and (path.parent / file).exists()
        for file in files
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _strings(child)]


def run_tasks(model: Any, tokenizer: Any, batch_size: int | str, **settings: Any) -> dict[str, Any]:
    """Run `simple_evaluate` with these settings; return its results on every rank, without the answers."""
    shared_model = SharedModel(model, tokenizer, batch_size)
    results = simple_evaluate(model=shared_model, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=False, **settings)
    keys = ("results", "groups", "n-samples", "n-shot", "versions")
    return all_gather_object(None if results is None else {key: results.get(key) for key in keys})[0]
