"""Fine-tune a chat model on conversations.

    # one machine, all its GPUs (or its CPU)
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero3.json --bf16 True
    # the machines of a hostfile, LoRA adapters
    deepspeed --hostfile=hostfiles/two_hosts finetune/finetune.py --model_name_or_path M --use_lora True \
        --data_path data/identity.json --output_dir output --deepspeed ds_configs/zero2.json --bf16 True

`run_training` has one line per stage: config -> data -> processes -> checkpoint -> model -> dataloaders -> fit ->
finalize.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatFormat, stop_token_id
from finetune.chat_templates.text_segments import segmenter
from finetune.checkpoint.resume import saved_step
from finetune.checkpoint.saver import RunIdentity
from finetune.config import Arguments, parse
from finetune.config.hardware import DetectedHardware, detect_hardware
from finetune.config.resolve import resolve_config
from finetune.config.run_config import RankCounts, RunConfig
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.dataset.skip_rows import rows_to_skip
from finetune.distributed import stop_requests, watchdog
from finetune.distributed.collectives import StorageGroup, destroy_process_group, run_on_rank_0
from finetune.distributed.consistency import RankFacts
from finetune.distributed.op_builder import build_notes
from finetune.distributed.process_setup import prepare_environment
from finetune.distributed.startup_timer import timed
from finetune.distributed.watchdog import start_watchdog
from finetune.models import adapters, loader
from finetune.models.loader import ModelInfo
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.data_samples import write_samples
from finetune.training import process_start, run_start
from finetune.training.data_setup import prepare_run_data
from finetune.training.dataloaders import Dataloaders, build_dataloaders
from finetune.training.finalize import finalize_run, finalize_stopped
from finetune.training.fit import FitOptions, TrainingInputs, fit
from finetune.training.model_checks import check_sequence_parallel, resolve_activation_checkpointing
from finetune.training.resume_check import resume_facts
from finetune.training.trackers import check_trackers
from finetune.utils import console
from finetune.utils.errors import exit_on_error, process_exit_guard

logger = logging.getLogger("finetune.train")  # the launcher may run this module as __main__

if TYPE_CHECKING:
    from finetune.training.trainer import SupervisedTrainer


def run() -> None:
    """Run `main` in a process that ends with it."""
    with process_exit_guard():
        main()


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; exit statuses are those of `utils.errors`."""
    with exit_on_error():
        console.configure_logging()
        run_training(sys.argv[1:] if argv is None else argv)


def run_training(argv: Sequence[str]) -> Path:
    """Train, and return the output_dir.

    Raises:
        FinetuneError: why the run cannot start or continue.
        SystemExit: status 75 after a request to stop, once a checkpoint is saved.
    """
    prepare_environment()
    with start_watchdog():
        arguments = parse(argv)
        set_up_process(arguments)
        hardware = detect_hardware(use_cpu=bool(arguments.given("use_cpu")))
        config, model_info = resolve(arguments, hardware, process_start.count_ranks())
        log_notes(config.notes)
        tokenizer, chat_format, data = load_data(config)
        storage = start_processes(arguments, config, model_info, data)
        data = skip_rows(arguments, data)
        training_arguments = process_start.build_training_arguments(
            config.training_values(), storage, config.batch.sequence_parallel_size
        )
        identity = start_run(arguments, config, model_info, storage, chat_format, data)
        model = load_model(config, model_info, tokenizer, chat_format)
        loaders = build_loaders(config, model, tokenizer, data, training_arguments.device)
        inputs = TrainingInputs(model, tokenizer, chat_format, data, loaders, training_arguments)
        trainer = fit(inputs, identity, fit_options(arguments, config))
        finish(arguments, config, trainer)
    return config.checkpoint.output_dir


def log_notes(notes: Sequence[str]) -> None:
    """Show decisions that differ from the flags."""
    for note in notes:
        logger.warning(note)


def set_up_process(arguments: Arguments) -> None:
    """Set the log level of libraries and the timeouts of the watchdog."""
    console.quiet_libraries()
    run = arguments.run
    watchdog.set_timeouts(
        rendezvous=run.meeting_timeout, start=run.start_timeout, step=run.step_timeout, save=run.save_timeout
    )
    watchdog.report_phase("data")


@timed("checks")
def resolve(arguments: Arguments, hardware: DetectedHardware, ranks: RankCounts) -> tuple[RunConfig, ModelInfo]:
    """Resolve and check all that needs neither data nor weights; `finetune doctor` calls it, too.

    Raises:
        ConfigError: flags that exclude each other, or that the model, the hardware or the ranks cannot do.
    """
    report_to = arguments.given("report_to")
    check_trackers([report_to] if isinstance(report_to, str) else report_to or [])
    saved = saved_step(
        Path(arguments.training["output_dir"]).expanduser(),
        arguments.resumes_from(),
        any_world_size=arguments.run.resume_world_size == "any",
        world_size=ranks.size,
    )
    config = resolve_config(arguments, hardware, ranks, saved)
    info = loader.inspect_model(
        config.model.model_name_or_path,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trusts_code(),
        attention=config.hardware.attention,
    )
    check_sequence_parallel(config.batch, info.config, config.zero_stage)
    checkpointing, notes = resolve_activation_checkpointing(
        config.activation_checkpointing, config.adapter.kind(), info.can_checkpoint
    )
    if config.deepspeed is not None:
        notes += build_notes(Path(os.environ["TORCH_EXTENSIONS_DIR"]), use_cpu=config.hardware.use_cpu)
    return replace(config, activation_checkpointing=checkpointing, notes=(*config.notes, *info.notes, *notes)), info


def load_data(config: RunConfig) -> tuple[Any, ChatFormat, PreparedData]:
    """Prepare the data, show its summary, and refuse data that the run should not start with."""
    tokenizer, chat_format, data = prepare_run_data(config.model, config.data)
    for part, title in ((data, "Data"), (data.evaluation, "Held-out data")):
        if part is not None:
            logger.info(console.section(title, part.summary.lines()))
            check_dropped_share(part, config.data.max_dropped_rows)
    return tokenizer, chat_format, data


def start_processes(arguments: Arguments, config: RunConfig, info: ModelInfo, data: PreparedData) -> StorageGroup:
    """Start the process group, check that all ranks mean the same run, and find out who shares `output_dir`."""
    process_start.start_processes(
        RankFacts.here(data=data.fingerprints, model=info.fingerprint),
        backend=config.hardware.backend,
        uses_deepspeed=config.deepspeed is not None,
        timeout=arguments.given("ddp_timeout"),
        data_path=config.data.data_path,
        model_name=info.name,
    )
    return process_start.shared_storage(config.checkpoint.output_dir)


def skip_rows(arguments: Arguments, data: PreparedData) -> PreparedData:
    """Mark the rows that `--skip_rows` names; rank 0 reads the files for all."""
    rows = run_on_rank_0(lambda: rows_to_skip(arguments.run.skip_rows, data.summary.rows_by_source))
    if rows:
        logger.warning(f"--skip_rows: {len(rows):,} rows are skipped from now on")
    return replace(data, skipped_rows=rows)


def start_run(
    arguments: Arguments,
    config: RunConfig,
    info: ModelInfo,
    storage: StorageGroup,
    template: ChatFormat,
    data: PreparedData,
) -> RunIdentity:
    """Select the checkpoint to resume from, and record the start of the run in `output_dir`."""
    output_dir = config.checkpoint.output_dir
    facts = resume_facts(
        config.resume_flags,
        config.batch.seed,
        data,
        model_fingerprint=info.fingerprint,
        precision=config.hardware.precision,
        zero=config.deepspeed,
    )
    identity, resumed = run_start.start_run(config.checkpoint, config.batch, storage, facts)

    def record() -> None:
        write_samples(output_dir, data.sample(arguments.run.report_samples, config.batch.seed), segmenter(template))
        run_facts = {
            "run_id": identity.run_id,
            "arguments": dict(config.flags),
            "run_arguments": asdict(arguments.run),
            "notes": list(config.notes),
            "deepspeed": config.deepspeed.config if config.deepspeed else None,
            "versions": run_json.library_versions(),
            "world_size": config.batch.world_size,
            "precision": config.hardware.precision,
            "attention": info.attention,
            **run_start.data_facts(template, config.data, data),
            "completed": False,
        }
        run_start.record_start(output_dir, run_facts, data, resumed, resumes=config.checkpoint.resume_from is not None)

    run_on_rank_0(record)
    return identity


@timed("model")
def load_model(config: RunConfig, info: ModelInfo, tokenizer: Any, template: ChatFormat) -> Any:
    """Load the base model (under ZeRO-3 each rank receives its share while rank 0 reads) and attach the adapter."""
    trusts_code = config.model.trusts_code()
    base = loader.load_model(
        info,
        tokenizer,
        precision=config.hardware.precision if config.deepspeed else "float32",
        trust_remote_code=trusts_code,
        stop_token_id=stop_token_id(template),
    )
    facts = {"model": {**info.facts(), "trusts_code": trusts_code}}
    run_on_rank_0(lambda: run_json.update_run_json(config.checkpoint.output_dir, facts))
    if config.adapter.kind() is None:
        return base
    from transformers import set_seed

    set_seed(config.batch.seed)  # the Trainer sets it only later, and loading draws numbers under ZeRO-3
    grows = loader.needs_new_embeddings(info, tokenizer)
    return adapters.attach_adapter(base, config.adapter, base_revision=config.model.model_revision, grows=grows)


def build_loaders(config: RunConfig, model: Any, tokenizer: Any, data: PreparedData, device: Any) -> Dataloaders:
    """Build the micro-batches of this rank, and record their layout in run.json."""
    loaders = build_dataloaders(config.batch, model, tokenizer, data, device, config.zero_stage)
    layout = loaders.layout
    log_notes(layout.notes)
    notes = [*config.notes, *layout.notes]
    facts = {"batching": layout.batching, "selects_logits": layout.selects_logits, "notes": notes}
    run_on_rank_0(lambda: run_json.update_run_json(config.checkpoint.output_dir, facts))
    return loaders


def fit_options(arguments: Arguments, config: RunConfig) -> FitOptions:
    """Collect what `fit` needs of the configuration."""
    adapter, run = config.adapter, arguments.run
    return FitOptions(
        hardware=config.hardware,
        keep_checkpoints=config.checkpoint.keep,
        keeps_initial_lora=adapter.kind() == "lora" and adapters.changes_base_weights(adapter.init_lora_weights),
        early_stopping_patience=run.early_stopping_patience,
        early_stopping_threshold=run.early_stopping_threshold,
        plan_settings=config.plan_settings(),
    )


def finish(arguments: Arguments, config: RunConfig, trainer: SupervisedTrainer) -> None:
    """End the run: save and verify the result, or leave with status 75 where it was asked to stop; write the report."""
    output_dir, was_stopped = config.checkpoint.output_dir, trainer.stopped_by is not None
    is_writer = trainer.identity.storage.is_writer
    if was_stopped:
        finalize_stopped(trainer)
    else:
        watchdog.report_phase("end", trainer.state.global_step)
        is_adapter = config.adapter.kind() is not None
        finalize_run(trainer, model=config.model, is_adapter=is_adapter, precision=config.hardware.precision)
    destroy_process_group()
    write_report(arguments, output_dir, answers=0 if was_stopped else arguments.run.report_answers)
    if is_writer and not was_stopped:
        run_json.mark_complete(output_dir, trainer.identity.run_id)
    output_dir_lock.release_lock()
    if was_stopped:
        sys.exit(stop_requests.EXIT_STOPPED)


def write_report(arguments: Arguments, output_dir: Path, *, answers: int) -> None:
    """Write report.html on rank 0 once the other ranks are gone; the result does not depend on it."""
    if not (console.is_rank_0() and arguments.run.write_report):
        return
    from finetune.report import write_at_the_end

    line = write_at_the_end(output_dir, answers=answers, seconds=arguments.run.report_seconds)
    logger.info(f"Report:\n  {line}\n")


class _TrainModule(ModuleType):
    """This module can be called: `finetune.train(...)` is public, and the launcher needs a module of the same name."""

    def __call__(self, **flags: Any) -> Path:
        """Train in this process with flags as keyword arguments; see `finetune.train`."""
        words = []
        for name, value in flags.items():
            if isinstance(value, list | tuple):
                words += [f"--{name}", *map(str, value)]
            elif value is not None:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return run_training(words)


sys.modules[__name__].__class__ = _TrainModule

if __name__ == "__main__":
    run()
