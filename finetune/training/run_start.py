"""The start of a run: ranks, process group, checks that all ranks mean the same run, and its `output_dir`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatFormat, end_token_ids
from finetune.chat_templates.text_segments import segmenter
from finetune.checkpoint import MANIFEST_FILE
from finetune.checkpoint.resume import ResumePoint, find_checkpoint
from finetune.checkpoint.saver import RunIdentity, new_run_id
from finetune.config import RunArguments
from finetune.config.run_config import CheckpointConfig, RankCounts, RunConfig
from finetune.dataset.prepare import PreparedData
from finetune.dataset.skip_rows import rows_to_skip
from finetune.distributed import watchdog
from finetune.distributed.collectives import StorageGroup, find_storage_group, init_process_group, run_on_rank_0
from finetune.distributed.compat import patch_build_lock
from finetune.distributed.consistency import RankFacts, check_rank_consistency
from finetune.distributed.launcher_processes import runner_arguments
from finetune.launcher import resources_of_command
from finetune.models.loader import ModelInfo
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.data_samples import write_samples
from finetune.training.dataloaders import BatchLayout
from finetune.training.metrics import cut_metrics
from finetune.training.resume_check import compare_with_checkpoint, resume_facts
from finetune.utils.console import log_notes, log_to_file, quiet_libraries
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def set_timeouts(run: RunArguments) -> None:
    """Set the log level of libraries and the timeouts of the watchdog."""
    quiet_libraries()
    watchdog.set_timeouts(
        rendezvous=run.meeting_timeout, start=run.start_timeout, step=run.step_timeout, save=run.save_timeout
    )
    watchdog.report_phase("data")


def count_ranks() -> RankCounts:
    """Return the number of ranks that were started, and check it against the hostfile.

    The launcher takes a hostfile that does not exist for an order to train on this host alone. `finetune train` sets
    how many ranks there must be; a bare `deepspeed` command on this host is read from its process.

    Raises:
        ConfigError: the hostfile names another number of ranks than were started.
    """
    size = int(os.environ["WORLD_SIZE"])
    stated, words = os.environ.get("FINETUNE_WORLD_SIZE"), runner_arguments()
    expected, where = int(stated or size), "the hostfile"
    if stated is None and words is not None:
        resources = resources_of_command(words)
        if resources is not None:
            expected, where = resources.world_size, f"--hostfile {resources.path}"
    if expected != size:
        raise ConfigError(f"{where} names {expected} ranks, but {size} were started: start with `finetune train`")
    return RankCounts(size, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size))


def start_processes(
    data: PreparedData, info: ModelInfo, data_path: Sequence[str], backend: str, zero_stage: int | None, timeout: int
) -> None:
    """Start the process group, and check that all ranks have the same data, code, libraries and base model.

    Args:
        data_path: as on the command line, for the message.
        timeout: of collectives, seconds.
    """
    facts = RankFacts.here(data=data.fingerprints, model=info.fingerprint, day=data.day)
    watchdog.report_phase("rendezvous")
    patch_build_lock()
    init_process_group(backend, uses_deepspeed=zero_stage is not None, timeout=timeout)
    check_rank_consistency(facts, data_path=data_path, model_name=info.name)


def find_storage(output_dir: Path) -> StorageGroup:
    """Find out which ranks see the same `output_dir`. All ranks."""
    storage = find_storage_group(output_dir)
    if not storage.is_shared:
        hosts = len(storage.all_groups)
        logger.warning(f"--output_dir is not shared: each of {hosts} hosts keeps the checkpoints of its own ranks")
    return storage


def build_training_arguments(
    values: Mapping[str, Any], storage: StorageGroup, sequence_parallel_size: int
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


def skip_rows(data: PreparedData, files: Sequence[str]) -> PreparedData:
    """Mark the rows that these files name; rank 0 reads them for all."""
    rows = run_on_rank_0(lambda: rows_to_skip(files, data.summary.rows_by_source))
    if rows:
        logger.warning(f"--skip_rows: {len(rows):,} rows are skipped from now on")
    return replace(data, skipped_rows=rows)


def start_run(
    config: RunConfig, storage: StorageGroup, data: PreparedData, chat_format: ChatFormat, model_fingerprint: str
) -> RunIdentity:
    """Lock `output_dir`, select the checkpoint to resume from, prepare the folder and record the start. All ranks."""
    batch, output_dir = config.batch, config.checkpoint.output_dir
    watchdog.report_phase("model")
    notes = storage.run_on_writers(lambda: output_dir_lock.acquire_lock(output_dir))
    log_notes(filter(None, notes))
    facts = resume_facts(config, data, model_fingerprint)
    compare = partial(compare_with_checkpoint, facts, batch, config.checkpoint)
    resumed = find_checkpoint(config.checkpoint, batch.world_size, storage, compare)
    storage.run_on_writers(lambda: _prepare(config.checkpoint))
    folder, manifest = resumed.to_load(output_dir) if resumed else (None, None)
    identity = RunIdentity(
        run_id=resumed.manifest.run_id if resumed else run_on_rank_0(new_run_id),
        facts=facts,
        step_rows=batch.step_rows,
        storage=storage,
        manifest=manifest,
        folder=folder,
        verify_key=config.checkpoint.verify_key,
    )
    watchdog.set_output_dir(output_dir, identity.run_id)

    def record() -> None:
        log_to_file(output_dir / run_json.LOG_FILE)
        write_samples(output_dir, data.sample(config.run.report_samples, batch.seed), segmenter(chat_format))
        data.write_ledger(output_dir / run_json.LEDGER_FILE)
        recorded = {"run_id": identity.run_id, **config.facts()}
        recorded["chat"] |= {"format": chat_format.name, "stop_token_id": end_token_ids(chat_format)[0]}
        recorded["data"] |= {"fingerprint": data.fingerprint, "summary": data.summary.facts()}
        recorded["data"]["left_out"] = [f"{source}:{row}" for source, row in data.skipped_rows]
        _record_start(config.checkpoint, recorded, resumed)

    run_on_rank_0(record)
    return identity


def _prepare(config: CheckpointConfig) -> None:
    """Prepare the folder that is locked now: another run may have ended in it since the flags were checked."""
    moved = output_dir_lock.prepare_output_dir(
        config.output_dir, overwrite=config.overwrite, resume=config.resume_from is not None
    )
    if moved:
        logger.warning(moved)
        output_dir_lock.acquire_lock(config.output_dir)


def _record_start(config: CheckpointConfig, facts: dict[str, Any], resumed: ResumePoint | None) -> None:
    """Write run.json, and cut metrics.jsonl at the step that the run resumes from."""
    output_dir, step = config.output_dir, resumed.manifest.step if resumed else 0
    if config.resume_from is not None:  # whether or not there was a checkpoint
        cut_metrics(output_dir / run_json.METRICS_FILE, step)
    earlier = run_json.starts(output_dir) if resumed or config.resume_from is not None else []
    saved_at = resumed.folder.joinpath(MANIFEST_FILE).stat().st_mtime if resumed else None
    facts["starts"] = run_json.restarted(earlier, run_json.new_start(step), saved_at)
    if resumed:
        facts["resumed"] = [*run_json.known(output_dir).get("resumed", []), resumed.facts()]
    run_json.update_run_json(output_dir, {**facts, "versions": run_json.library_versions(), "completed": False})
    run_json.clear_ending(output_dir)


def record_model(output_dir: Path, info: ModelInfo, layout: BatchLayout, notes: Sequence[str]) -> None:
    """Record what is known once model and dataloaders are there; rank 0 writes."""
    facts = {"model": info.facts(), "batching": layout.batching, "selects_logits": layout.selects_logits}
    run_on_rank_0(lambda: run_json.update_run_json(output_dir, {**facts, "notes": [*notes, *layout.notes]}))
