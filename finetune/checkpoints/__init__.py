"""Checkpoints that are either whole or not one: sealed last, verified byte by byte, removed by rules.

Nothing here needs torch: a login node can verify a checkpoint.
"""

from __future__ import annotations

from finetune.checkpoints.files import checksum, faults, names_in, settled, shared_out
from finetune.checkpoints.folders import (
    checkpoint_folder,
    is_sealed,
    is_unfinished,
    latest_complete,
    mark_as_unfinished,
    remove_checkpoint,
    remove_unfinished,
    rotate,
    set_aside,
    step_of,
    steps_in,
    verify,
)
from finetune.checkpoints.manifest import (
    MANIFEST_FILE,
    SAVING_FILE,
    FileRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from finetune.checkpoints.masters import MasterWeights
from finetune.checkpoints.pickles import is_pickled, pickle_fault
from finetune.checkpoints.universal import convert, remove_universal, universal_folder

__all__ = [
    "MANIFEST_FILE",
    "SAVING_FILE",
    "FileRecord",
    "Manifest",
    "MasterWeights",
    "checkpoint_folder",
    "checksum",
    "convert",
    "faults",
    "is_pickled",
    "is_sealed",
    "is_unfinished",
    "latest_complete",
    "mark_as_unfinished",
    "names_in",
    "pickle_fault",
    "read_manifest",
    "remove_checkpoint",
    "remove_unfinished",
    "remove_universal",
    "rotate",
    "set_aside",
    "settled",
    "shared_out",
    "step_of",
    "steps_in",
    "universal_folder",
    "verify",
    "write_manifest",
]
