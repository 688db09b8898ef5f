"""Convert a checkpoint for another world size to DeepSpeed's universal form, and verify it before use.

Universal form (https://www.deepspeed.ai/tutorials/universal-checkpointing/): for every parameter a folder
`zero/<name>/` with its whole float32 value and its whole optimizer moments, which any number of ranks can divide.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.checkpoint.integrity import file_names, fsync_and_hash, zero_tag
from finetune.checkpoint.manifest import FileRecord, Manifest, read_manifest
from finetune.checkpoint.torch_files import load_data, verified_loads
from finetune.utils.errors import CheckpointError, StorageError, lines_of, storage_errors
from finetune.utils.proc import command_calling

MOMENTS = ("exp_avg", "exp_avg_sq")
OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def universal_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of the converted form while it is loaded."""
    return output_dir / f".universal-{step}"


def remove_universal(output_dir: Path) -> None:
    """Remove converted forms; they are created again when needed."""
    for folder in output_dir.glob(".universal-*"):
        shutil.rmtree(folder, ignore_errors=True)


def convert_to_universal(folder: Path, manifest: Manifest, target: Path) -> dict[str, FileRecord]:
    """Write the universal form of a verified ZeRO checkpoint to `target`, beside the files the Trainer reads.

    Returns:
        Its files, as the loader must find them.

    Raises:
        CheckpointError: DeepSpeed cannot convert it, or what came out lacks a parameter or has another shape.
        StorageError: there is no space for it.
    """
    shutil.rmtree(target, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < manifest.size:
        raise StorageError(
            f"{target}: converting {folder.name} takes {manifest.size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        )
    tag = zero_tag(folder, manifest)
    if tag is None:
        raise CheckpointError(f"{folder}: holds no ZeRO checkpoint: there is no file `latest`")
    converted = target / f"{tag}_universal"
    converted.mkdir(parents=True)
    stage = manifest.facts["ZeRO stage"]
    command = command_calling(run_converter)
    command += ["--input_folder", str(folder / tag), "--output_folder", str(converted)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--inject_missing_state"] if stage != 3 else []
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_LAUNCHER}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = lines_of(done.stderr or done.stdout)[-1]
        raise CheckpointError(f"{folder}: DeepSpeed could not convert it for another number of ranks: {reason}")
    with storage_errors(target, f"{target}, which is to hold {folder.name} for another number of ranks"):
        for name in manifest.files:
            if "/" not in name and not name.endswith(".safetensors"):
                shutil.copyfile(folder / name, target / name, follow_symlinks=False)
    _check(converted, manifest)
    return fsync_and_hash(target, file_names(target), None)


def run_converter() -> None:
    """Run DeepSpeed's converter, which may load files of the checkpoint and what it writes itself. (DeepSpeed 0.19)"""
    import torch
    from deepspeed.checkpoint import ds_to_universal

    args = ds_to_universal.parse_arguments()
    folder, target = Path(args.input_folder).parent, Path(args.output_folder).resolve()

    def inside(write: Callable[..., None], place: int) -> Callable[..., None]:
        def checked(*args: Any, **options: Any) -> None:
            if not Path(args[place]).resolve().is_relative_to(target):  # names of parameters are parts of paths
                raise CheckpointError(f"{args[place]} is not written: it lies outside of {target}")
            write(*args, **options)

        return checked

    torch.save, os.makedirs = inside(torch.save, 1), inside(os.makedirs, 0)
    with verified_loads(folder, read_manifest(folder).files, own=target):
        ds_to_universal.main(args)


def _check(converted: Path, manifest: Manifest) -> None:
    for name, shape in manifest.trained.items():
        files = {path.stem: path for path in (converted / "zero" / name).glob("*.pt")}
        if "fp32" not in files:
            raise CheckpointError(f"{converted}: the conversion has lost {name}")
        for kind in ("fp32", *MOMENTS):
            if kind not in files:
                continue
            values = load_data(files[kind], mmap=True)
            values = values["param"] if isinstance(values, dict) else values
            if values.numel() != math.prod(shape):
                raise CheckpointError(f"{files[kind]}: {list(values.shape)}, expected {shape}")
