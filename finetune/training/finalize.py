"""The end of a run: the result saved, verified, recorded and shown, and the next command."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.config.hardware import Precision
from finetune.distributed import stop_requests, watchdog
from finetune.distributed.collectives import destroy_process_group, run_on_rank_0
from finetune.distributed.process_setup import allocate_outside_heap
from finetune.export.model_card import write_model_card
from finetune.export.model_files import copy_other_files
from finetune.export.verify_saved import LOSS_TOKENS, digests_to_save, verify_result
from finetune.inference.run_result import read_result
from finetune.models.loader import ModelInfo
from finetune.models.quantization import is_packed_in_files
from finetune.run_dir import output_dir_lock, run_json
from finetune.training.compat import free_training_memory
from finetune.training.metrics import loss_curve
from finetune.training.trainer import SupervisedTrainer
from finetune.training.weight_proof import WeightChanges
from finetune.utils.console import labelled, section, width

logger = logging.getLogger(__name__)


def finalize(trainer: SupervisedTrainer, base: ModelInfo, *, is_adapter: bool, precision: Precision) -> None:
    """Save the result, verify it, record how the run ended, and show it; or record that it was stopped. All ranks.

    Raises:
        CheckpointError: the saved result is not what was trained.
    """
    if trainer.stopped_by is not None:
        _finalize_stopped(trainer)
        return
    watchdog.report_phase("end", trainer.state.global_step)
    logger.info(f"Saving the result in {trainer.output_dir}")
    changes = trainer.weight_changes()
    trainer.save_result()
    trained = digests_to_save(trainer.model)
    example = trainer.train_dataset.shortest_example(LOSS_TOKENS)
    loss = trainer.loss_of(example)
    free_training_memory(trainer.model, trainer.optimizer, trainer.accelerator)
    allocate_outside_heap()

    logger.info("Loading it again, to compare it with what was trained")

    def conclude() -> None:
        checked = verify_result(
            trainer.output_dir,
            base=base.name,
            trained=trained,
            input_ids=example["input_ids"].tolist(),
            labels=example["labels"].tolist(),
            loss=loss,
            precision=precision,
            trust_remote_code=base.trusts_code,
            base_bits=None if is_packed_in_files(base.config) else base.bits,
        )
        _record(trainer, checked, "adapter" if is_adapter else "full model", changes)
        if not is_adapter:
            copy_other_files(trainer.output_dir, base.files)
        write_model_card(read_result(trainer.output_dir))

    run_on_rank_0(conclude)


def _finalize_stopped(trainer: SupervisedTrainer) -> None:
    """Record and show that the run was asked to stop: its last checkpoint is what this start leaves."""
    stop_requests.ignore_signals()
    output_dir, by, step = trainer.output_dir, trainer.stopped_by, trainer.state.global_step
    logger.info(
        f"Stopped by {by} after step {step}. Saved checkpoint-{step}. To resume, rerun the same command with "
        "--resume_from_checkpoint auto."
    )

    def record() -> None:
        starts = run_json.ended(output_dir, f"stopped by {by}")
        run_json.update_run_json(output_dir, {"stopped": {"by": by, "step": step}, "starts": starts})

    run_on_rank_0(record)


def end_run(trainer: SupervisedTrainer, write_report: Callable[[Path, bool], None]) -> None:
    """Leave the process group, write the report and mark the run complete, or exit with 75 where it was stopped.

    Args:
        write_report: (output_dir, whether the run was stopped).
    """
    output_dir, was_stopped = trainer.output_dir, trainer.stopped_by is not None
    is_writer = trainer.saver.storage.is_writer  # ranks are known to a process group only
    destroy_process_group()
    write_report(output_dir, was_stopped)
    if is_writer and not was_stopped:
        run_json.mark_complete(output_dir, trainer.identity.run_id)
    output_dir_lock.release_lock()
    if was_stopped:
        sys.exit(stop_requests.EXIT_STOPPED)


def _record(trainer: SupervisedTrainer, checked: str, kind: str, changes: WeightChanges | None) -> None:
    """Write the outcome to run.json and show the summary; `checked` is a line, `kind` adapter or full model."""
    output_dir, history = trainer.output_dir, trainer.state.log_history
    logged = [entry for entry in history if entry.get("loss") is not None]
    losses = [entry["loss"] for entry in logged]
    result: dict[str, Any] = {"steps": trainer.state.global_step}
    of_base: dict[str, int] = {}
    if changes is not None:
        result["tensors"] = changes.by_kind
        if trainer.base_tensors is not None:
            of_base = result["base_tensors"] = trainer.base_tensors.report(output_dir, set(changes.changed))
        for line in changes.warnings():
            logger.warning(line)
    if losses:
        result |= {"first_loss": losses[0], "last_loss": losses[-1]}
    evaluated = [entry["eval_loss"] for entry in history if entry.get("eval_loss") is not None]
    best, held_out = trainer.best(), {}
    if evaluated:
        result |= {"first_eval_loss": evaluated[0], "last_eval_loss": evaluated[-1]}
        held_out["held out"] = f"loss {evaluated[0]:.4f} -> {evaluated[-1]:.4f}, lowest {min(evaluated):.4f}"
    if best is not None:
        step, best_loss = best
        result["best"] = {"step": step, "eval_loss": best_loss, "checkpoint": f"checkpoint-{step}"}
        is_result = "; it is what was saved as the result" if trainer.args.load_best_model_at_end else ""
        held_out["best saved"] = f"checkpoint-{step}, with {best_loss:.4f}{is_result}"
    deepspeed_config = trainer.args.hf_deepspeed_config.config if trainer.args.deepspeed else None
    ending = {"completed": True, "starts": run_json.ended(output_dir, "complete")}
    run_json.update_run_json(output_dir, {"deepspeed": deepspeed_config, "result": result, **ending})
    curve = loss_curve([int(entry["step"]) for entry in logged], losses, width())
    facts = {
        "saved": f"{output_dir} ({kind})",
        "checked": checked,
        **({"weights": changes.line()} if changes else {}),
        **({"base": ", ".join(f"{count:,} tensors {state}" for state, count in of_base.items())} if of_base else {}),
        "loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not logged: see --logging_steps",
        **held_out,
        "steps": f"{trainer.state.global_step:,}, logged in {output_dir / run_json.METRICS_FILE}",
        "run": str(output_dir / run_json.RUN_FILE),
    }
    if curve:
        logger.info(f"\n{curve}")
    logger.info(section("Done", labelled(facts)))
    logger.info(section("Next:", [next_command(output_dir)]) + "\n")


def next_command(output_dir: Path) -> str:
    """Return the command that chats with the result, as it can be typed where the run was started."""
    script = Path(sys.executable).with_name("finetune")
    if shutil.which("finetune") == str(script):
        program = "finetune"
    elif script.is_file():
        program = os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
    else:
        return f"{shlex.quote(sys.executable)} -m finetune chat {shlex.quote(str(output_dir))}"
    return f"{shlex.quote(program)} chat {shlex.quote(str(output_dir))}"
