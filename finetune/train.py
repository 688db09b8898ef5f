"""Fine-tune a chat model on conversations.

    # one machine, all its GPUs (or its CPU)
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero3.json --bf16 True
    # the same, training LoRA adapters
    deepspeed finetune/finetune.py --model_name_or_path M --data_path data/identity.json --output_dir output \
        --deepspeed ds_configs/zero2.json --bf16 True --use_lora True
    # the machines of a hostfile
    deepspeed --hostfile=hostfiles/two_hosts finetune/finetune.py --model_name_or_path M \
        --data_path data/identity.json --output_dir output --deepspeed ds_configs/zero3.json --bf16 True

`main` is the story, one line a stage: parse -> check -> read -> render -> resume -> load -> attach -> fit -> seal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune.chat_templates import ChatFormat, stop_token_id
from finetune.chat_templates.text_segments import speller
from finetune.checkpoint.resume import ResumeConfig, ResumePoint, find_checkpoint
from finetune.checkpoint.saver import RunIdentity, new_run_id
from finetune.config import Arguments, parse
from finetune.config.hardware import measured_matmul_rate, peak_flops
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.dataset.skip_rows import append_to_ledger, rows_to_skip
from finetune.distributed import consistency, stop_requests, watchdog
from finetune.distributed.collectives import (
    StorageGroup,
    destroy_process_group,
    find_storage_group,
    init_process_group,
    run_on_all_ranks,
    run_on_rank_0,
)
from finetune.distributed.compat import patch_build_lock
from finetune.distributed.process_setup import prepare_environment
from finetune.distributed.startup_timer import timed
from finetune.distributed.watchdog import start_watchdog
from finetune.models import adapters, loader
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.data_samples import write_samples
from finetune.training.config_check import Setup, check_setup, evaluation_options
from finetune.training.data_setup import prepare_data
from finetune.training.finalize import finalize_run
from finetune.training.metrics import cut_metrics, model_flops
from finetune.training.resume_check import compare_with_checkpoint, resume_facts
from finetune.training.training_setup import attach_adapter, build_dataloaders, summarize_plan
from finetune.utils import console
from finetune.utils.errors import ConfigError, exit_on_error, process_exit_guard


def run() -> None:
    """`main`, in a process that ends with it."""
    with process_exit_guard():
        main()


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; the exit statuses are those of `errors`."""
    with exit_on_error():
        prepare_environment()
        console.configure_logging()
        with start_watchdog():
            arguments = parse(sys.argv[1:] if argv is None else argv)
            console.quiet_libraries()
            set_limits(arguments)
            setup = check_setup(arguments)
            tokenizer, chat_format, data = prepare_data(arguments.model, arguments.data)
            approve(arguments, data)
            training_arguments, disk = begin(arguments, setup, data)
            data = leave_out(arguments, data)
            lineage = resume(arguments, setup, chat_format, data, disk)
            base = load(arguments, setup, tokenizer, chat_format)
            trained = attach(arguments, setup, base, tokenizer)
            batches, held_out = build_dataloaders(arguments, setup, training_arguments, trained, tokenizer, data)
            dealt = (data, batches, held_out)
            trainer = fit(arguments, setup, training_arguments, trained, tokenizer, chat_format, dealt, lineage)
            leave_if_asked(arguments, trainer)
            finalize(arguments, setup, trainer)


def set_limits(arguments: Arguments) -> None:
    """How long a phase may take before the guards call the run stuck."""
    run = arguments.run
    watchdog.set_timeouts(
        meeting=run.meeting_timeout, start=run.start_timeout, step=run.step_timeout, save=run.save_timeout
    )
    watchdog.report_phase("data")


def approve(arguments: Arguments, data: PreparedData) -> None:
    """Show what the data comes to, and refuse data that the run should not start with."""
    console.say_data(data.summary.lines())
    check_dropped_share(data, arguments.data.max_dropped_rows)
    if data.evaluation is not None:
        console.say_data(data.evaluation.summary.lines(), "Held-out data")
        check_dropped_share(data.evaluation, arguments.data.max_dropped_rows)


def leave_out(arguments: Arguments, data: PreparedData) -> PreparedData:
    """The data, with the rows that `--skip_rows` names marked; rank 0 reads for all."""
    rows = run_on_rank_0(lambda: rows_to_skip(arguments.run.skip_rows, data.summary.rows_by_source))
    if rows:
        console.say_note(f"{len(rows):,} rows are left out from now on, as --skip_rows says")
    return replace(data, left_out=rows)


@timed("processes")
def begin(arguments: Arguments, setup: Setup, data: PreparedData) -> tuple[Any, StorageGroup]:
    """Start the processes, see that all mean the same run and who shares the output folder; build `TrainingArguments`,
    which touches the devices."""
    from finetune.training.training_arguments import build_arguments

    watchdog.report_phase("rendezvous")
    patch_build_lock()
    init_process_group(
        setup.hardware.backend, uses_deepspeed=setup.zero is not None, timeout=arguments.given("ddp_timeout")
    )
    facts = consistency.RankFacts.here(data=data.fingerprints, model=setup.model.fingerprint)
    consistency.check_rank_consistency(facts, data_path=arguments.data.data_path, model_name=setup.model.name)
    disk = find_storage_group(_output_dir(arguments))
    if not disk.is_shared:
        console.say_note(
            f"--output_dir is not shared: each of {len(disk.all_groups)} hosts keeps the checkpoints of its own ranks"
        )
    values = {
        **arguments.training,
        "output_dir": str(_output_dir(arguments)),
        "bf16": setup.hardware.precision == "bf16",
        "fp16": setup.hardware.precision == "fp16",
        "tf32": setup.hardware.tf32,
        "use_cpu": setup.hardware.use_cpu,
        "activation_checkpointing": setup.activation_checkpointing,
        "per_device_train_batch_size": arguments.deepspeed_batch(),
        **evaluation_options(arguments),
        "deepspeed": setup.zero.config if setup.zero else None,
        "save_on_each_node": not disk.is_shared,
        "save_total_limit": None,  # transformers would remove by name, before the new one is whole: see `saving`
        "resume_from_checkpoint": None,
    }
    if setup.hardware.use_cpu:
        values["dataloader_pin_memory"] = False
    # Liger's fused loss would compute logits of its own; norms, rotations and gates are what is wanted of it.
    values.setdefault("liger_kernel_config", {"fused_linear_cross_entropy": False, "cross_entropy": False})
    return build_arguments(values, sequence_parallel_size=arguments.batch.sequence_parallel_size), disk


def _output_dir(arguments: Arguments) -> Path:
    return Path(arguments.training["output_dir"]).expanduser()


@timed("checkpoint")
def resume(
    arguments: Arguments, setup: Setup, chat_format: ChatFormat, data: PreparedData, disk: StorageGroup
) -> RunIdentity:
    """Find the checkpoint to go on from, if any; claim the output folder for this run alone; write down what runs."""
    output_dir = _output_dir(arguments)
    watchdog.report_phase("model")
    console.say_notes(
        [*filter(None, run_on_all_ranks(lambda: output_dir_lock.acquire_lock(output_dir) if disk.is_writer else None))]
    )
    facts_now = resume_facts(arguments, setup, data)
    found = find_checkpoint(
        ResumeConfig(
            resume_from=arguments.resumes_from(),
            output_dir=output_dir,
            world_size=setup.world_size,
            world_size_changes=setup.expects_other_ranks,
            allow_inexact=arguments.run.allow_inexact_resume,
        ),
        disk,
        partial(compare_with_checkpoint, arguments, facts_now, setup.world_size),
    )
    run_on_all_ranks(lambda: _claim(output_dir, setup) if disk.is_writer else None)
    lineage = RunIdentity(
        run_id=found.manifest.run_id if found else run_on_rank_0(new_run_id),
        facts=facts_now,
        step_rows=arguments.step_rows(setup.world_size),
        disk=disk,
        manifest=found.manifest if found else None,
        folder=found.folder_to_load(output_dir) if found else None,
    )
    facts = {"run_id": lineage.run_id, **_facts(arguments, setup, chat_format, data)}
    run_on_rank_0(lambda: _write_down(output_dir, arguments, facts, chat_format, data, found))
    watchdog.set_output_dir(output_dir, lineage.run_id)
    return lineage


def _claim(output_dir: Path, setup: Setup) -> None:
    moved = output_dir_lock.prepare_output_dir(output_dir, move_aside=setup.move_aside)
    if moved:
        console.say_note(moved)
        output_dir_lock.acquire_lock(output_dir)


def _write_down(
    output_dir: Path,
    arguments: Arguments,
    facts: dict[str, Any],
    chat_format: ChatFormat,
    data: PreparedData,
    found: ResumePoint | None,
) -> None:
    data.copy_ledger(output_dir / run_json.LEDGER_FILE)
    append_to_ledger(output_dir / run_json.LEDGER_FILE, data.examples, data.left_out)
    drawn = data.sample(arguments.run.report_samples, arguments.given("seed"))
    write_samples(output_dir, drawn, speller(chat_format))
    step = found.manifest.step if found else 0
    if arguments.resumes_from():
        cut_metrics(output_dir / run_json.METRICS_FILE, step)
    facts["starts"] = [*(run_json.starts(output_dir) if found else []), run_json.new_start(step)]
    if found:
        facts["resumed"] = [*run_json.resumptions(output_dir), found.facts()]
    run_json.update_run_json(output_dir, facts)
    run_json.clear_ending(output_dir)


def _facts(arguments: Arguments, setup: Setup, chat_format: ChatFormat, data: PreparedData) -> dict[str, Any]:
    return {
        "arguments": arguments.flat(),
        "run_arguments": asdict(arguments.run),
        "chat": {
            "format": chat_format.name,
            "human_token_ids": arguments.data.human_token_ids,
            "model_token_ids": arguments.data.model_token_ids,
            "content_tokens": arguments.data.content_tokens,
            "stop_token_id": stop_token_id(chat_format),
        },
        "notes": list(setup.notes),
        "deepspeed": setup.zero.config if setup.zero else None,
        "versions": run_json.library_versions(),
        "world_size": setup.world_size,
        "precision": setup.hardware.precision,
        "attention": setup.model.attention,
        "data": {
            "path": arguments.data.data_path,
            "fingerprint": data.fingerprint,
            "summary": data.summary.facts(),
            "left_out": [f"{source}:{row}" for source, row in data.left_out],
        },
        "completed": False,
    }


@timed("model")
def load(arguments: Arguments, setup: Setup, tokenizer: Any, chat_format: ChatFormat) -> Any:
    """The base model; under ZeRO-3 each rank receives its share while rank 0 reads."""
    base = loader.load_model(
        setup.model,
        tokenizer,
        precision=setup.hardware.precision if setup.zero else "float32",
        trust_remote_code=arguments.model.trusts_code(),
        stop_token_id=stop_token_id(chat_format),
    )
    trusts = {"trusts_code": arguments.model.trusts_code()}
    run_on_rank_0(
        lambda: run_json.update_run_json(_output_dir(arguments), {"model": {**setup.model.facts(), **trusts}})
    )
    return base


@timed("model")
def attach(arguments: Arguments, setup: Setup, base: Any, tokenizer: Any) -> Any:
    """The model that is trained: the base itself, or the base with an adapter."""
    from transformers import set_seed

    if arguments.adapter.kind() is None:
        return base
    set_seed(arguments.given("seed"))  # the Trainer sets it only later, and loading draws numbers under ZeRO-3
    return attach_adapter(arguments, base, grows=loader.needs_new_embeddings(setup.model, tokenizer))


def fit(
    arguments: Arguments,
    setup: Setup,
    training_arguments: Any,
    trained: Any,
    tokenizer: Any,
    chat_format: ChatFormat,
    dealt: tuple[PreparedData, Any, Any],
    lineage: RunIdentity,
) -> Any:
    """Train; the plan is printed once the number of steps is known. `dealt`: the data, its micro-batches of this rank,
    and those that are held out."""
    data, batches, held_out = dealt
    from finetune.training.callbacks import PhaseReporter
    from finetune.training.evaluator import EarlyStopping
    from finetune.training.trainer import SupervisedTrainer

    def announce(steps: int) -> None:
        planned = summarize_plan(arguments, setup, trained, chat_format, data, batches, held_out, steps)
        console.say_plan(planned)
        run_on_rank_0(lambda: run_json.update_run_json(_output_dir(arguments), {"plan": asdict(planned)}))

    try:
        trainer = SupervisedTrainer(
            model=trained,
            args=training_arguments,
            micro_batches=batches,
            held_out=held_out,
            flops=model_flops(trained),
            peak_flops=_peak_flops(setup),
            lineage=lineage,
            keep=arguments.given("save_total_limit"),
            processing_class=tokenizer,
            initial_lora=adapters.InitialLora(trained) if _moves_base_weights(arguments) else None,
            on_plan=announce,
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, evaluation without data
        raise ConfigError(f"the Trainer refuses these flags: {error}") from error
    run = arguments.run
    if run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(run.early_stopping_patience, run.early_stopping_threshold))
    trainer.add_callback(PhaseReporter())
    trainer.train(resume_from_checkpoint=str(lineage.folder) if lineage.folder else None)
    return trainer


def leave_if_asked(arguments: Arguments, trainer: Any) -> None:
    """Where the ranks have agreed to stop, the last checkpoint is what this start leaves: status 75, run me again."""
    if trainer.stopped_by is None:
        return
    stop_requests.ignore_signals()
    step = trainer.state.global_step
    console.say(
        f"stopped by {trainer.stopped_by} after step {step}: saved as checkpoint-{step}; go on with the same command "
        "and --resume_from_checkpoint auto"
    )
    run_on_rank_0(lambda: _note_stop(Path(trainer.args.output_dir), trainer.stopped_by, step))
    destroy_process_group()
    _report(arguments, answers=0)
    output_dir_lock.release_lock()
    sys.exit(stop_requests.EXIT_STOPPED)


def _note_stop(output_dir: Path, by: str, step: int) -> None:
    starts = run_json.ended(output_dir, f"stopped by {by}")
    run_json.update_run_json(output_dir, {"stopped": {"by": by, "step": step}, "starts": starts})


def _peak_flops(setup: Setup) -> float | None:
    """What one rank's device can do in a second, on a CPU what it is seen to do."""
    if setup.hardware.use_cpu:
        return measured_matmul_rate()
    import torch

    return peak_flops(torch.cuda.get_device_name(), setup.hardware.precision, setup.hardware.tf32)


def _moves_base_weights(arguments: Arguments) -> bool:
    return arguments.adapter.kind() == "lora" and adapters.changes_base_weights(arguments.adapter.init_lora_weights)


def finalize(arguments: Arguments, setup: Setup, trainer: Any) -> None:
    """Save the result, open it again and check it, write down how the run ended, say what to do next."""
    watchdog.report_phase("end", trainer.state.global_step)
    trainer.save_result()
    example = trainer.train_dataset.shortest_example()
    loss = trainer.loss_of(example)
    run_on_rank_0(lambda: finalize_run(arguments, setup, trainer, example, loss))
    is_writer = trainer.lineage.disk.is_writer
    destroy_process_group()
    _report(arguments, answers=arguments.run.report_answers)
    if is_writer:
        run_json.mark_complete(_output_dir(arguments), trainer.lineage.run_id)
    output_dir_lock.release_lock()


def _report(arguments: Arguments, *, answers: int) -> None:
    """The page about the run, by rank 0 once the others are gone; the result does not depend on it."""
    if not (console.is_rank_0() and arguments.run.write_report):
        return
    from finetune.report import write_at_the_end

    line = write_at_the_end(_output_dir(arguments), answers=answers, seconds=arguments.run.report_seconds)
    console.say(f"Report:\n  {line}\n")


if __name__ == "__main__":
    run()
