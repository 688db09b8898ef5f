"""`failure.json`: the first failure of a run, on the disk whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from finetune.diagnostics.causes import likely_cause
from finetune.diagnostics.failure_record import Failure, moment
from finetune.utils.atomic_io import fsync_dir

FILE = "failure.json"


def write(folder: str | os.PathLike, failure: Failure, *, replace: bool = False) -> Path | None:
    """Write `failure.json` with the likely cause and the next step filled in: whole or not at all, readable by all.

    A record of the same run that is earlier, or as early, stays as it is, unless `replace`: what comes later is
    mostly a consequence. Runs that have no id are never the same run. A run that goes on from a checkpoint keeps its
    id: whoever starts it removes what the attempt before left.

    Returns:
        Where a record of this run lies now; None where the disk refused, or there is no such folder.
    """
    path = Path(folder, FILE)
    cause = likely_cause(failure)
    values = {**failure.to_json(), "likely_cause": None if cause is None else asdict(cause)}
    text = json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    part = Path(folder, f".{FILE}.{os.uname().nodename}.{os.getpid()}")
    try:
        try:
            _write_through(part, text.encode())
            return _put(part, path, failure, replace)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        return None


def read(path: str | os.PathLike) -> Failure | None:
    """The failure in a file, None where there is no such file or it holds none."""
    try:
        return Failure.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _put(part: Path, path: Path, failure: Failure, replace: bool) -> Path:
    """Give the finished file its name; of two processes that do so at once the first wins.

    Raises:
        OSError: the folder refuses.
    """
    if not replace:
        try:
            os.link(part, path)  # fails where the name is taken, unlike a rename
        except OSError:  # taken, or a file system without hard links
            earlier = read(path)
            if earlier and earlier.run and earlier.run == failure.run and moment(earlier) <= moment(failure):
                return path
    os.replace(part, path)
    fsync_dir(path.parent)
    return path


def _write_through(path: Path, content: bytes) -> None:
    """Raises: OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)  # whatever the umask: whoever looks after the cluster reads it too
        file.write(content)
        file.flush()
        os.fsync(descriptor)
