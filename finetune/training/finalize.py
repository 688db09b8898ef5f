"""The end of a run: its result opened again, its outcome written down and shown, what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune.config import Arguments
from finetune.export.verify_saved import verify_result
from finetune.run_dir import run_json
from finetune.training.config_check import Setup
from finetune.training.metrics import loss_curve
from finetune.utils import console


def finalize_run(arguments: Arguments, setup: Setup, trainer: Any, example: dict[str, Any], loss: float) -> None:
    """Open the saved result and compare it, write down how the run ended, and say it.

    Args:
        example: one conversation, and `loss` its loss in the memory of the run.

    Raises:
        CheckpointError: what was saved is not what was trained.
    """
    output_dir = Path(trainer.args.output_dir)
    is_adapter = arguments.adapter.kind() is not None
    seen = verify_result(
        output_dir,
        base=arguments.model.model_name_or_path,
        input_ids=example["input_ids"].tolist(),
        labels=example["labels"].tolist(),
        loss=loss,
        precision=setup.hardware.precision,
        trust_remote_code=arguments.model.trusts_code(),
    )
    logged = [entry for entry in trainer.state.log_history if entry.get("loss") is not None]
    losses = [entry["loss"] for entry in logged]
    result = {"steps": trainer.state.global_step}
    if losses:
        result |= {"first_loss": losses[0], "last_loss": losses[-1]}
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if entry.get("eval_loss") is not None]
    best, held_out = trainer.best(), {}
    if evaluated:
        result |= {"first_eval_loss": evaluated[0], "last_eval_loss": evaluated[-1]}
        held_out["held out"] = f"loss {evaluated[0]:.4f} -> {evaluated[-1]:.4f}, lowest {min(evaluated):.4f}"
    if best is not None:
        result["best"] = {"step": best[0], "eval_loss": best[1], "checkpoint": f"checkpoint-{best[0]}"}
        held_out["best saved"] = f"checkpoint-{best[0]}, with {best[1]:.4f}" + (
            "; it is what was saved as the result" if trainer.args.load_best_model_at_end else ""
        )
    deepspeed_config = trainer.args.hf_deepspeed_config.config if trainer.args.deepspeed else None
    ending = {"completed": True, "starts": run_json.ended(output_dir, "complete")}
    run_json.update_run_json(output_dir, {"deepspeed": deepspeed_config, "result": result, **ending})
    console.say_summary(
        loss_curve([entry["step"] for entry in logged], losses, console.width()),
        {
            "saved": f"{output_dir} ({'adapter' if is_adapter else 'full model'})",
            "checked": seen,
            "loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not logged: see --logging_steps",
            **held_out,
            "steps": f"{trainer.state.global_step:,}, each in {output_dir / run_json.METRICS_FILE}",
            "run": str(output_dir / run_json.RUN_FILE),
        },
        next_command(output_dir),
    )


def next_command(output_dir: Path) -> str:
    """A line that shows the result at work, as it can be typed where the run was started."""
    script = Path(sys.executable).with_name("finetune")
    if shutil.which("finetune") == str(script):
        program = "finetune"
    elif script.is_file():
        program = os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
    else:
        return f"{shlex.quote(sys.executable)} -m finetune chat {shlex.quote(str(output_dir))}"
    return f"{shlex.quote(program)} chat {shlex.quote(str(output_dir))}"
