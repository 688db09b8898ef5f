"""Start the processes of a run: the process group, checks that all ranks mean the same run, `TrainingArguments`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.run_config import RankCounts
from finetune.distributed import watchdog
from finetune.distributed.collectives import StorageGroup, find_storage_group, init_process_group
from finetune.distributed.compat import patch_build_lock
from finetune.distributed.consistency import RankFacts, check_rank_consistency
from finetune.distributed.startup_timer import timed
from finetune.launcher import resources_of_command
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def count_ranks() -> RankCounts:
    """Return the number of ranks that were started, and check it against the hostfile.

    The launcher takes a hostfile that does not exist for an order to train on this host alone. `finetune launch` sets
    how many ranks there must be; a bare `deepspeed` command on this host is read from its process.

    Raises:
        ConfigError: the hostfile names another number of ranks than were started.
    """
    size = int(os.environ["WORLD_SIZE"])
    stated, words = os.environ.get("FINETUNE_WORLD_SIZE"), watchdog.runner_arguments(watchdog.launcher_pid())
    expected, where = int(stated or size), "the hostfile"
    if stated is None and words is not None:
        resources = resources_of_command(words)
        if resources is not None:
            expected, where = resources.world_size, f"--hostfile {resources.path}"
    if expected != size:
        raise ConfigError(f"{where} names {expected} ranks, but {size} were started: start with `finetune launch`")
    return RankCounts(size, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size))


@timed("processes")
def start_processes(
    facts: RankFacts, *, backend: str, uses_deepspeed: bool, timeout: int, data_path: list[str], model_name: str
) -> None:
    """Start the process group, and check that all ranks have the same data, code, libraries and base model.

    Args:
        facts: of this rank.
        timeout: of collectives, seconds.
        data_path, model_name: as on the command line, for the message.
    """
    watchdog.report_phase("rendezvous")
    patch_build_lock()
    init_process_group(backend, uses_deepspeed=uses_deepspeed, timeout=timeout)
    check_rank_consistency(facts, data_path=data_path, model_name=model_name)


@timed("processes")
def build_training_arguments(
    values: Mapping[str, Any], storage: StorageGroup, sequence_parallel_size: int = 1
) -> TrainingArguments:
    """Build `transformers.TrainingArguments`, which touches the devices.

    Raises:
        ConfigError: a value that transformers refuses.
    """
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import TrainingArguments

    options = {**values, "save_on_each_node": not storage.is_shared}
    if sequence_parallel_size > 1:
        options["parallelism_config"] = ParallelismConfig(sp_backend="deepspeed", sp_size=sequence_parallel_size)
    try:
        return TrainingArguments(**options)
    except ValueError as error:
        raise ConfigError(f"the training flags contradict each other: {error}") from None


def shared_storage(output_dir: Path) -> StorageGroup:
    """Find out which ranks see the same `output_dir`; all ranks."""
    storage = find_storage_group(output_dir)
    if not storage.is_shared:
        logging.getLogger(__name__).warning(
            "--output_dir is not shared: each of %d hosts keeps the checkpoints of its own ranks",
            len(storage.all_groups),
        )
    return storage
