"""The start of a run in its `output_dir`: the checkpoint to resume from, the lock, run.json, ledger and metrics."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from finetune.chat_templates import ChatFormat, stop_token_id
from finetune.checkpoint.resume import ResumePoint, find_checkpoint
from finetune.checkpoint.saver import RunIdentity, new_run_id
from finetune.config.arguments import DataArguments
from finetune.config.run_config import BatchConfig, CheckpointConfig
from finetune.dataset.prepare import PreparedData
from finetune.distributed import watchdog
from finetune.distributed.collectives import StorageGroup, run_on_all_ranks, run_on_rank_0
from finetune.distributed.startup_timer import timed
from finetune.run_dir import output_dir_lock, run_json
from finetune.training.metrics import cut_metrics
from finetune.training.resume_check import compare_with_checkpoint

logger = logging.getLogger(__name__)


@timed("checkpoint")
def start_run(
    config: CheckpointConfig, batch: BatchConfig, storage: StorageGroup, facts: dict[str, Any]
) -> tuple[RunIdentity, ResumePoint | None]:
    """Lock `output_dir`, select the checkpoint to resume from, prepare the folder. All ranks.

    Args:
        facts: what a resumed run must have in common, from `resume_facts`.

    Returns:
        Which run this is, and the checkpoint that it resumes from, or None.
    """
    output_dir = config.output_dir
    watchdog.report_phase("model")
    notes = run_on_all_ranks(lambda: output_dir_lock.acquire_lock(output_dir) if storage.is_writer else None)
    for note in filter(None, notes):
        logger.warning(note)
    compare = partial(compare_with_checkpoint, facts, batch, config)
    resumed = find_checkpoint(config, batch.world_size, storage, compare)
    run_on_all_ranks(lambda: _prepare(config) if storage.is_writer else None)
    identity = RunIdentity(
        run_id=resumed.manifest.run_id if resumed else run_on_rank_0(new_run_id),
        facts=facts,
        step_rows=batch.step_rows,
        storage=storage,
        manifest=resumed.manifest if resumed else None,
        folder=resumed.folder_to_load(output_dir) if resumed else None,
    )
    watchdog.set_output_dir(output_dir, identity.run_id)
    return identity, resumed


def _prepare(config: CheckpointConfig) -> None:
    moved = output_dir_lock.prepare_output_dir(config.output_dir, move_aside=config.move_aside)
    if moved:
        logger.warning(moved)
        output_dir_lock.acquire_lock(config.output_dir)


def record_start(
    output_dir: Path, facts: dict[str, Any], data: PreparedData, resumed: ResumePoint | None, *, resumes: bool
) -> None:
    """Write run.json and the ledger, and cut metrics.jsonl at the step that the run resumes from; rank 0.

    Args:
        facts: of run.json.
        resumes: `--resume_from_checkpoint` was given, whether or not there was a checkpoint.
    """
    data.write_ledger(output_dir / run_json.LEDGER_FILE)
    step = resumed.manifest.step if resumed else 0
    if resumes:
        cut_metrics(output_dir / run_json.METRICS_FILE, step)
    facts["starts"] = [*(run_json.starts(output_dir) if resumed else []), run_json.new_start(step)]
    if resumed:
        facts["resumed"] = [*run_json.resumptions(output_dir), resumed.facts()]
    run_json.update_run_json(output_dir, facts)
    run_json.clear_ending(output_dir)


def data_facts(chat_format: ChatFormat, config: DataArguments, data: PreparedData) -> dict[str, Any]:
    """Return what run.json says of the chat template and the data."""
    return {
        "chat": {
            "format": chat_format.name,
            "human_token_ids": config.human_token_ids,
            "model_token_ids": config.model_token_ids,
            "content_tokens": config.content_tokens,
            "stop_token_id": stop_token_id(chat_format),
        },
        "data": {
            "path": config.data_path,
            "fingerprint": data.fingerprint,
            "summary": data.summary.facts(),
            "left_out": [f"{source}:{row}" for source, row in data.skipped_rows],
        },
    }
