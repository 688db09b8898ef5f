"""`run.json` and the other files of an `output_dir`.

run.json            what ran: arguments, resolved DeepSpeed config, versions, world size, data, result
data_ledger.jsonl   every row that was not kept whole, with the reason
metrics.jsonl       one line per logged step
train.log           what the run said
samples.json        a few rows as the model read them
answers.json        answers of base and result
report.html         all of it on a page
trainer_state.json  the Trainer's own record
RUN_COMPLETE        the id of the run, written last
failure.json        how a run failed, instead
checkpoint-N/       what a run can resume from
adapter_model.safetensors, adapter_config.json   or   model*.safetensors, config.json
"""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

from finetune.diagnostics import FAILURE_FILE
from finetune.distributed.host_probe import versions
from finetune.distributed.stop_requests import STOP_FILE
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError, near_paths, storage_errors
from finetune.utils.user_files import read_json_object

RUN_FILE = "run.json"
LEDGER_FILE = "data_ledger.jsonl"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
COMPLETE_FILE = "RUN_COMPLETE"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIGS = (ADAPTER_CONFIG, "config.json")


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a saved model or adapter."""
    return any((folder / name).is_file() for name in MODEL_CONFIGS)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a saved adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        reason, near = ("is a file", "") if folder.exists() else ("there is no such folder", near_paths(folder))
        raise ConfigError(f"{folder}: {reason}{near or ': expected the output_dir of a training run'}")


def update_run_json(folder: Path, facts: dict[str, Any]) -> None:
    """Write or update `run.json`: keys given replace those there. The file is replaced whole."""
    text = json.dumps(_standard({**known(folder), **facts}), ensure_ascii=False, indent=2, allow_nan=False)
    write_text_atomically(folder / RUN_FILE, text + "\n")


def _standard(value: Any) -> Any:
    """Return the value with null for infinities and NaN, which standard JSON lacks."""
    if isinstance(value, dict):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_run_json(folder: Path) -> dict[str, Any]:
    """Read `run.json`; a `ConfigError` says that there is none, or that it is not a JSON object."""
    check_is_folder(folder)
    if not os.path.lexists(folder / RUN_FILE):
        raise ConfigError(f"{folder}: holds no {RUN_FILE}: expected the output_dir of a training run")
    return read_json_object(folder / RUN_FILE)


def known(folder: Path) -> dict[str, Any]:
    """Return run.json; empty where the folder holds none yet."""
    return load_run_json(folder) if (folder / RUN_FILE).is_file() else {}


def mark_complete(folder: Path, run: str) -> None:
    """Write the id of the run to a file of its own, the last one of a run."""
    write_text_atomically(folder / COMPLETE_FILE, run + "\n")


def clear_ending(folder: Path) -> None:
    """Remove what says how an earlier start ended: a run starts or resumes here."""
    for name in (COMPLETE_FILE, FAILURE_FILE, STOP_FILE):
        with storage_errors(folder / name):
            (folder / name).unlink(missing_ok=True)


def starts(folder: Path) -> list[dict[str, Any]]:
    """Return each start of the run in this folder; `ended` and `how` are None for one that is running or failed."""
    return known(folder).get("starts", [])


def new_start(step: int) -> dict[str, Any]:
    """Return the entry of a start that resumes from `step`; 0: of a new run."""
    return {"began": now(), "from_step": step, "ended": None, "how": None}


def restarted(earlier: list[dict[str, Any]], start: dict[str, Any], saved_at: float | None) -> list[dict[str, Any]]:
    """Return all starts; one by `--max_restarts` says why, and the seconds lost since the checkpoint (or the start)."""
    restart = json.loads(os.environ.get("FINETUNE_RESTART", "null"))
    if restart is None:
        return [*earlier, start]
    if earlier and earlier[-1]["ended"] is None:
        earlier = [*earlier[:-1], {**earlier[-1], "ended": restart["ended"], "how": f"failed: {restart['cause']}"}]
    if saved_at is None and earlier:
        saved_at = time.mktime(time.strptime(earlier[-1]["began"][:19], "%Y-%m-%dT%H:%M:%S"))
    lost = None if saved_at is None else round(time.time() - saved_at, 1)
    return [*earlier, {**start, "restarted_after": restart["cause"], "seconds_lost": lost}]


def ended(folder: Path, how: str) -> list[dict[str, Any]]:
    """Return the starts of the run in this folder, the last of which ends now."""
    *earlier, last = starts(folder) or [new_start(0)]
    return [*earlier, {**last, "ended": now(), "how": how}]


def now() -> str:
    """Return the time as in run.json: ISO 8601 to the second, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of every installed library that influences a result."""
    return {"python": platform.python_version(), **versions()}
