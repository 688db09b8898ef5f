"""A loaded model asked the tasks of lm-evaluation-harness, the requests divided among the ranks.

Every rank builds all requests, answers its share of them, and receives all answers: whatever the harness does with
them is then the same everywhere, and any number of ranks may ask any number of questions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.utils.console import is_rank_0
from finetune.utils.errors import ConfigError

OWN_TASKS = Path(__file__).resolve().parent / "tasks"
SUFFIXES = (".yaml", ".yml")
# For metrics that are no means; those have a formula.
BOOTSTRAPPED = 1000


class SharedModel(HFLM):
    """The harness's own model of transformers around one that is loaded; each rank answers its share."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().generate_until, requests, disable_tqdm)

    def _shared(self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        mine = requests[get_rank() :: get_world_size()]
        parts = all_gather_object(answer(mine, disable_tqdm=disable_tqdm or not is_rank_0()) if mine else [])
        answers: list[Any] = [None] * len(requests)
        for rank, part in enumerate(parts):
            answers[rank :: get_world_size()] = part
        return answers


def quiet() -> None:
    """The harness keeps to errors."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def find_manager(names: Sequence[str]) -> TaskManager:
    """The tasks of the harness, this project's own, and those of the folders among the names.

    The harness knows 14,000 tasks and reads a file for each: it is left out where only files and folders are named,
    which are whole by themselves.
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
    """The tasks and groups that a group names; those that it writes out itself are part of it."""
    listed = config.get("task")
    return [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []


def names_in(manager: TaskManager, folder: Path) -> list[str]:
    """The tasks and groups of a folder that are part of no other group of it.

    Raises:
        ConfigError: it holds none.
    """
    here = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and entry.yaml_path.resolve().is_relative_to(folder.resolve())
    ]
    members = {child for name in here for child in _children(_config(manager, name))}
    found = sorted(set(here) - members)
    if not found:
        raise ConfigError(f"--tasks {folder}: no YAML file of a task or a group lies there")
    return found


def files_of(manager: TaskManager, name: str) -> list[Path]:
    """The YAML files of a task, or of all tasks of a group, as far as they are known without loading them."""
    path = Path(name)
    if path.suffix in SUFFIXES and path.is_file():
        return [path]
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    found = [entry.yaml_path] if entry.yaml_path is not None else []
    children = sorted(entry.tags) if entry.kind.name == "TAG" else _children(_config(manager, name))
    return found + [path for child in children if child != name for path in files_of(manager, child)]


def runs_code(manager: TaskManager, name: str) -> bool:
    """Whether a task runs what the model writes; asked before its own code is loaded."""
    return any(load_yaml(path, resolve_func=False).get("unsafe_code") for path in files_of(manager, name))


def load_task(manager: TaskManager, name: str) -> list[Any]:
    """The task or group, its data read; a tag is several. Files that its YAML names are looked for beside it too."""
    beside = next((path for path in files_of(manager, name) if _names_files_beside(path)), None)
    asked = str(Path(name).resolve()) if Path(name).suffix in SUFFIXES else name
    with _standing_in(beside.resolve().parent if beside else None):
        loaded = manager.load([asked])
    groups, members = loaded["groups"], set()
    for children in loaded["group_map"].values():
        members |= set(children)
    whole = [groups[one] for one in groups if one not in members]
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return whole + [task for task_name, task in loaded["tasks"].items() if task_name not in inside]


@contextmanager
def _standing_in(folder: Path | None) -> Iterator[None]:
    """Relative names inside the block are those of the folder; None: of where the command was typed."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def _names_files_beside(path: Path) -> bool:
    """Whether a task's data are files that lie beside its YAML and not where the command was typed."""
    named = (load_yaml(path, resolve_func=False).get("dataset_kwargs") or {}).get("data_files")
    files = _strings(named)
    return bool(files) and all(
        not Path(one).is_absolute() and "://" not in one and not Path(one).exists() and (path.parent / one).exists()
        for one in files
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _strings(child)]


def scores(
    model: Any,
    tokenizer: Any,
    loaded: Sequence[Any],
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | str,
    apply_chat_template: bool,
    allow_code: bool,
) -> dict[str, Any]:
    """What `simple_evaluate` finds, on every rank, without the answers themselves."""
    found = simple_evaluate(
        model=SharedModel(model, tokenizer, batch_size),
        tasks=list(loaded),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=BOOTSTRAPPED,
        log_samples=False,
        apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=allow_code,
    )
    kept = ("results", "groups", "n-samples", "n-shot", "versions")
    return all_gather_object(None if found is None else {name: found.get(name) for name in kept})[0]
