"""Files of torch are data: whatever names anything but tensors and what DeepSpeed puts beside them is not loaded.

The gate is torch's unpickler for `weights_only=True`
(https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only). `force_data_only` in
`distributed.process_setup` makes each `torch.load` use it, those of DeepSpeed included.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.checkpoint.integrity import open_verified
from finetune.checkpoint.manifest import FileRecord
from finetune.utils.errors import CheckpointError

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
ZIP_HEADER = b"PK\x03\x04"
# In messages of torch's unpickler, which otherwise advise to load such a file in spite of all.
FOREIGN = re.compile(r"GLOBAL (\S+)")
REASON = re.compile(r"(?:WeightsUnpickler error:\s*|\A)(.+?)(?=\.? (?:This is|In PyTorch)|\n|\Z)")


def is_pickled(path: Path) -> bool:
    """Whether loading a file of this name would unpickle it."""
    return path.suffix.lower() in PICKLED_SUFFIXES


def allow_known_classes() -> None:
    """Let torch's unpickler build what DeepSpeed's ZeRO (0.19) and random states contain beside tensors.

    Call it before each load: transformers takes the classes of random states away when it has loaded one.
    """
    import numpy as np
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from numpy._core.multiarray import _reconstruct

    known: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, np.ndarray, np.dtype]
    known += {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}  # booleans, integers, floats
    known += [(_reconstruct, "numpy.core.multiarray._reconstruct"), _reconstruct]
    torch.serialization.add_safe_globals(known)


def load_data(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """Load a file that torch has written, on the CPU."""
    import torch

    allow_known_classes()
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def pickle_fault(path: Path) -> str | None:
    """Why a file must not be loaded; None where it is what `torch.save` writes, and data."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries, size = archive.infolist(), file.seek(0, os.SEEK_END)
            file.seek(0)
            if file.read(len(ZIP_HEADER)) != ZIP_HEADER:
                return f"{path} is not what torch.save writes: something stands in front of its zip archive"
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return f"{path} is not what torch.save writes: it is compressed"
        if len({entry.filename for entry in entries}) != len(entries) or sum(e.file_size for e in entries) > size:
            return f"{path} is not what torch.save writes: its entries overlap"
        load_data(path, mmap=True)
    except zipfile.BadZipFile:
        return f"{path} is not what torch.save writes: not a zip archive"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    except Exception as error:  # whatever parsers raise at content that no program wrote
        foreign = FOREIGN.search(str(error))
        if foreign:
            return f"{path} names {foreign[1]}: a checkpoint must not bring code, and it was not loaded"
        reason = REASON.findall(str(error)) or [type(error).__name__]
        return f"{path} is not what torch.save writes: {reason[-1]}"
    return None


@contextmanager
def verified_loads(folder: Path, files: Mapping[str, FileRecord], own: Path | None = None) -> Iterator[None]:
    """Let `torch.load` open files of a checkpoint only, and load the bytes that it has compared with their records.

    Args:
        own: a folder whose files this process has written itself.
    """
    import torch

    allow_known_classes()
    plain: Callable[..., Any] = torch.load

    def load(source: Any, *args: Any, **options: Any) -> Any:
        options |= {"weights_only": True}
        if not isinstance(source, str | os.PathLike) or (own and Path(source).resolve().is_relative_to(own)):
            return plain(source, *args, **options)
        name = os.path.relpath(os.path.abspath(source), os.path.abspath(folder))
        if name not in files:
            raise CheckpointError(f"{source} was not loaded: it is not a file of the checkpoint {folder}")
        with open_verified(folder, name, files[name]) as file:
            return plain(f"/proc/self/fd/{file.fileno()}" if options.get("mmap") else file, *args, **options)

    torch.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = plain
