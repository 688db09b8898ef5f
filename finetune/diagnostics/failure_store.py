"""Read and write `failure.json`, the record of the first failure of a run."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from finetune.diagnostics.causes import likely_cause
from finetune.diagnostics.failure_record import Failure
from finetune.utils.atomic_io import fsync_dir

FAILURE_FILE = "failure.json"


def write_failure(folder: str | os.PathLike[str], failure: Failure) -> Path | None:
    """Write `failure.json` with the likely cause: completely or not at all, readable by all users.

    An earlier record of the same run is kept, because later failures mostly follow from it.
    Runs without an id are never the same run. A resumed run keeps its id: whoever starts it deletes the old record.
    Returns the path of the record of this run; None if the folder does not exist or the disk refused.
    """
    path = Path(folder, FAILURE_FILE)
    cause = likely_cause(failure)
    values = {**failure.to_json(), "likely_cause": None if cause is None else asdict(cause)}
    text = json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    partial = Path(folder, f".{FAILURE_FILE}.{os.uname().nodename}.{os.getpid()}")
    try:
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)  # whatever the umask: administrators of the cluster read it, too
                file.write(text.encode())
                file.flush()
                os.fsync(descriptor)
            if not _link_or_keep(partial, path, failure):
                os.replace(partial, path)
                fsync_dir(path.parent)
            return path
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return None


def read_failure(path: str | os.PathLike[str]) -> Failure | None:
    """Return the failure in a file, None if the file does not exist or holds no record."""
    try:
        return Failure.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _link_or_keep(partial: Path, path: Path, failure: Failure) -> bool:
    """Give a finished file its name, if no other has it; of two processes at once the first succeeds.

    Returns whether `path` now holds a record of this run that is no later than `failure`.
    """
    try:
        os.link(partial, path)  # fails if the name is taken, unlike a rename
    except OSError:  # taken, or a file system without hard links
        earlier = read_failure(path)
        if earlier is None or not earlier.run or earlier.run != failure.run:
            return False
        return earlier.timestamp() <= failure.timestamp()
    fsync_dir(path.parent)
    return True
