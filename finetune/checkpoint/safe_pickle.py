"""A checkpoint is not code: what the pickles of its files name is found before any of them is loaded.

`torch.save` writes a zip archive whose `data.pkl` is a pickle; the numbers lie beside it. A pickle can name any
function and call it. Here it is read by the standard library's own unpickler, whose one door to names (`find_class`,
https://docs.python.org/3/library/pickle.html#restricting-globals) hands out inert stand-ins for the names on the list
below and stops at any other: nothing that is named is imported or called.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
# What torch.save and DeepSpeed's ZeRO put into their files (measured over stages 1 to 3, adapters, bf16 and fp16).
ALLOWED = frozenset(
    {
        "collections.OrderedDict",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.serialization._get_layout",
    }
)
ALLOWED_KINDS = ("Storage", "Tensor")  # torch.BFloat16Storage and the like
DTYPES = frozenset(
    f"torch.{name}"
    for name in ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")
)


def is_pickled(path: Path) -> bool:
    """Whether loading a file of this name would unpickle it."""
    return path.suffix in PICKLED_SUFFIXES


def pickle_fault(path: Path) -> str | None:
    """Why a file must not be loaded; None where it names nothing but tensors and what DeepSpeed puts beside them.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or len(set(names)) != len(names):
                return f"{path} is not what torch.save writes: {len(pickles)} data.pkl among {len(names)} entries"
            foreign = [name for name in names if name.endswith((".pkl", ".py")) and name not in pickles]
            if foreign:
                return f"{path} is not what torch.save writes: it holds {foreign[0]}"
            with archive.open(pickles[0]) as file:
                _Reader(file).load()
    except _Foreign as error:
        return f"{path} names {error}: a checkpoint must not bring code, and it was not loaded"
    except zipfile.BadZipFile:
        return f"{path} is not what torch.save writes: not a zip archive"
    except _UNREADABLE as error:
        return f"{path}: its pickle cannot be followed: {type(error).__name__}: {error}"
    return None


class _Foreign(Exception):
    """A name that is not on the list."""


# What `zipfile` and `pickle` raise at content that no program wrote; RuntimeError: encrypted, or nested too deeply.
_UNREADABLE = (
    pickle.UnpicklingError, zlib.error, EOFError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError,
    RuntimeError, MemoryError,
)  # fmt: skip


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED or full in DTYPES or (module == "torch" and name.endswith(ALLOWED_KINDS)):
            return _StandIn
        raise _Foreign(full)

    def persistent_load(self, key: Any) -> Any:
        """A storage: its numbers lie beside the pickle and are not looked at."""
        return _StandIn()


class _StandIn(dict):
    """Takes whatever a pickle does with an object, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, value: Any) -> None:
        """A list's."""

    def extend(self, values: Any) -> None:
        """A list's."""
