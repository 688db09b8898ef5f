"""Checkpoints that are complete or none: manifest written last, every byte verified, removed by rules.

Nothing here needs torch: a login node can verify a checkpoint.
"""

from finetune.checkpoint.checkpoint_dirs import (
    checkpoint_folder,
    is_complete,
    is_unfinished,
    mark_as_unfinished,
    quarantine,
    remove_checkpoint,
    remove_unfinished,
    rotate,
    step_of,
    steps_in,
    verify_checkpoint,
)
from finetune.checkpoint.integrity import file_names, find_damage, find_strangers, fsync_and_hash, partition_files
from finetune.checkpoint.manifest import (
    MANIFEST_FILE,
    SAVING_FILE,
    FileRecord,
    Manifest,
    key_of,
    read_manifest,
    write_manifest,
)
from finetune.checkpoint.torch_files import is_pickled, pickle_fault, verified_loads
from finetune.checkpoint.universal_checkpoint import convert_to_universal, remove_universal, universal_folder
from finetune.checkpoint.zero_to_fp32 import MasterWeights
