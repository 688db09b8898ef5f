"""Check, prepare and lock an `output_dir` before anything is written to it."""

import os
import time
from pathlib import Path
from typing import Any

from finetune.diagnostics import FAILURE_FILE
from finetune.distributed.stop_requests import STOP_FILE
from finetune.run_dir.run_json import COMPLETE_FILE, METRICS_FILE, MODEL_CONFIGS, RUN_FILE
from finetune.utils.errors import ConfigError, StorageError, format_names, storage_errors

LOCK_FILE = ".in_use"
SECONDS_FOR_A_DYING_RUN = 15.0
# run.json alone is left by a run that never made a step: there is nothing in it to lose.
MARKS_OF_A_RUN = (METRICS_FILE, *MODEL_CONFIGS, "trainer_state.json")
# What may lie in a new output_dir: written by a shell, a scheduler or a tracker.
ALLOWED, LOGS = (STOP_FILE, "logs", "runs", "wandb", "lost+found"), (".log", ".txt", ".out", ".err", ".yaml", ".sbatch")
_locks: list[Any] = []


def check_output_dir(folder: Path, *, overwrite: bool, resume: bool) -> bool:
    """Return whether `folder` holds an earlier run that must be moved aside; change nothing."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder}: is a file: name a folder")
    check_writable(folder, f"--output_dir {folder}")
    if not contains_run(folder):
        foreign = foreign_files(folder)
        if foreign:
            raise ConfigError(
                f"--output_dir {folder}: is not a run's folder, it holds {format_names(foreign)}; nothing was changed: "
                "choose a new or empty folder"
            )
        return False
    if resume:
        return False
    if overwrite:
        return True
    is_resumable = not (folder / COMPLETE_FILE).exists() and any(folder.glob("checkpoint-*/manifest.json"))
    resuming = "resume it with --resume_from_checkpoint auto, " if is_resumable else ""
    raise ConfigError(
        f"--output_dir {folder}: already holds a run, nothing was changed: {resuming}choose another folder, or give "
        "--overwrite_output_dir True to move it aside"
    )


def check_writable(folder: Path, shown: str) -> None:
    """Check that a folder can be made, or be written to; change nothing."""
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise ConfigError(f"{shown}: {existing} is a file, not a folder")
    disk = os.statvfs(existing)
    if disk.f_flag & os.ST_RDONLY:
        raise StorageError(f"{shown}: the file system of {existing} is read-only: name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"{shown}: no permission to write in {existing}")
    if disk.f_blocks and not disk.f_bavail:
        raise StorageError(f"{shown}: no space is left on the disk of {existing}: free some, or name another folder")


def existing_parent(folder: Path) -> Path:
    """Return the folder itself, or the nearest above it that exists."""
    return next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path("/"))


def foreign_files(folder: Path) -> list[str]:
    """Return the files of a folder that are neither of a run nor logs, unless a run has started there."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if {RUN_FILE, LOCK_FILE, FAILURE_FILE} & set(names):
        return []
    return [name for name in names if not (name.startswith(".") or name in ALLOWED or name.endswith(LOGS))]


def in_use(folder: Path) -> str:
    """Return the error where another run holds the lock."""
    return (
        f"--output_dir {folder}: another run is writing there (it holds {folder / LOCK_FILE}): wait for it, end it, or "
        "choose another folder"
    )


def contains_run(folder: Path) -> bool:
    """Whether a training run has written files here."""
    return any((folder / name).exists() for name in MARKS_OF_A_RUN) or any(folder.glob("checkpoint-*"))


def prepare_output_dir(folder: Path, *, overwrite: bool, resume: bool) -> str | None:
    """Create the folder after renaming an earlier run in it; return a line for the user. One process may call this."""
    note = None
    with storage_errors(folder, f"--output_dir {folder}"):
        if check_output_dir(folder, overwrite=overwrite, resume=resume):
            aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            note = f"the earlier run was moved to {aside}"
        folder.mkdir(parents=True, exist_ok=True)
    return note


def acquire_lock(folder: Path) -> str | None:
    """Lock `folder` for this process until it ends: two runs in it would remove each other's files.

    Returns a line for the user where the file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_FILE)
    with storage_errors(folder, f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SECONDS_FOR_A_DYING_RUN)
        except Timeout:
            raise ConfigError(in_use(folder)) from None
        except NotImplementedError:
            return f"{folder} is on a file system without locks: a second run there would not be refused"
    _locks.append(lock)  # a lock without a reference is released
    return None


def release_lock() -> None:
    """Release the lock of this process."""
    while _locks:
        _locks.pop().release()


def is_locked(folder: Path) -> bool | None:
    """Whether a run holds the lock now; None where the file system cannot tell."""
    import fcntl

    try:
        with open(folder / LOCK_FILE, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return None
