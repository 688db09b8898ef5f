"""What a file of torch may name, and that only the bytes which were verified are loaded."""

import collections
import io
import os
import pickle
import pickletools
import random
import zipfile
from pathlib import Path

import pytest
import torch

from finetune import checkpoint
from finetune.utils.errors import CheckpointError
from tests.helpers.checkpoint_files import sealed


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def zipped(path: Path, data: bytes, name: str = "archive/data.pkl", more: tuple = ()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("archive/version", "3")
        for other, content in more:
            archive.writestr(other, content)


def hidden_name() -> bytes:
    """`os.system` put together on the stack, the two halves through the memo."""
    return (
        b"".join(
            [b"\x80\x02", b"\x8c\x02os", b"\x94", b"0", b"\x8c\x06system", b"\x94", b"0", b"h\x00", b"h\x01", b"\x93"]
        )
        + b"\x8c\x04true\x85R."
    )


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, open, __import__, torch.load, pickle.loads, collections.Counter.update]
)
def test_a_pickle_that_names_a_function_is_refused_unseen(tmp_path, function, protocol):
    target = tmp_path / "touched"
    path = tmp_path / "shard.pt"
    data = {"step": 1, "deep": [{"x": Payload(function, f"touch {target}")}]}
    zipped(path, pickle.dumps(data, protocol=protocol))
    fault = checkpoint.pickle_fault(path)
    assert fault and str(path) in fault and not target.exists()


def test_names_put_together_on_the_stack_are_refused_too(tmp_path):
    zipped(tmp_path / "a.pt", hidden_name())
    pickletools.dis(hidden_name(), out=io.StringIO())  # it is a pickle
    assert "Unsupported operand" in checkpoint.pickle_fault(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("data", "name", "more", "said"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "archive/data.pkl", (), "names os.system"),
        (b"ctorch\nload\n(S'x'\ntR.", "archive/data.pkl", (), "names torch.load"),
        (b"cevil\nByteStorage\n(tR.", "archive/data.pkl", (), "names evil.ByteStorage"),
        (pickle.dumps({}, protocol=2), "archive/data.pkl", (("other/data.pkl", b"x"),), "not in a subdirectory"),
        (pickle.dumps({}, protocol=2), "archive/data.pkl", (("archive/constants.pkl", b"x"),), "TorchScript"),
        (pickle.dumps({}, protocol=2), "archive/other", (), "failed locating file data.pkl"),
        (b"garbage", "archive/data.pkl", (), "Unsupported operand"),
    ],
)
def test_archives_that_torch_save_does_not_write_are_refused(tmp_path, data, name, more, said):
    zipped(tmp_path / "a.pt", data, name, more)
    assert said in checkpoint.pickle_fault(tmp_path / "a.pt")


def test_an_archive_that_no_program_wrote_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    zipped(path, pickle.dumps({"step": 1}))
    whole = path.read_bytes()
    central = whole.index(b"PK\x01\x02")
    for place, value in ((central + 8, 1), (central + 10, 8), (central + 10, 99)):  # encrypted, deflated, unknown
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        assert str(path) in (checkpoint.pickle_fault(path) or "")


def test_a_pickle_in_front_of_a_good_archive_is_refused_and_one_behind_it_is_never_read(tmp_path):
    """zipfile looks from the end, torch at the first bytes."""
    torch.save({"x": torch.ones(2)}, tmp_path / "good.pt")
    good, target = (tmp_path / "good.pt").read_bytes(), tmp_path / "touched"
    evil = pickle.dumps(Payload(os.mkdir, str(target)), protocol=2)
    (tmp_path / "front.pt").write_bytes(evil + good)
    (tmp_path / "behind.pt").write_bytes(good + evil)
    assert "in front of its zip" in checkpoint.pickle_fault(tmp_path / "front.pt")
    assert checkpoint.pickle_fault(tmp_path / "behind.pt") is None
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed" in checkpoint.pickle_fault(tmp_path / "bomb.pt")
    assert not target.exists()


def test_a_file_that_is_replaced_after_it_was_verified_is_not_loaded(tmp_path):
    folder, target = sealed(tmp_path, 4), tmp_path / "touched"
    files = checkpoint.read_manifest(folder).files
    assert checkpoint.verify_checkpoint(folder) == []
    evil = pickle.dumps(Payload(os.mkdir, str(target)), protocol=2)
    zipped(folder / "rng_state_0.pth", evil)
    zipped(folder / "global_step4/scaler.pt", evil)
    zipped(tmp_path / "outside.pt", evil)
    shard = folder / "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with checkpoint.verified_loads(folder, files):
        for path in (folder / "rng_state_0.pth", folder / "global_step4/scaler.pt", tmp_path / "outside.pt"):
            with pytest.raises(CheckpointError, match=path.name):
                torch.load(path, weights_only=False)
        assert torch.load(str(shard), weights_only=False)["moments"].sum() == 500 * 499 / 2
        shard.rename(tmp_path / "moved.pt")
        shard.symlink_to(tmp_path / "moved.pt")
        with pytest.raises(CheckpointError, match="is a link"):
            torch.load(shard, mmap=True, weights_only=False)
    assert not target.exists()
    if "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ:
        torch.load(folder / "rng_state_0.pth", weights_only=False)
        assert target.exists()  # it was code


def test_a_pickle_outside_an_archive_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "not a zip archive" in checkpoint.pickle_fault(tmp_path / "old.pt")


def test_what_training_saves_is_let_through(tmp_path):
    layer = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    states = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "module": layer.state_dict(),
        "parameter": layer.weight,
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
        "shapes": [collections.OrderedDict(weight=torch.Size([3, 3]))],
        "types": (torch.float32, torch.device("cpu")),
        "arrays": [np.arange(3.0), np.array([True])],
        "fp16": (
            DynamicLossScaler(2**16, 2.0, 1000, 1.0, 1),
            LossScaler(1.0),
            ZeroStageEnum(2),
            fragment_address(3, 4),
        ),
    }
    from transformers.trainer_pt_utils import safe_globals

    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pt")
        assert checkpoint.pickle_fault(tmp_path / f"{name}.pt") is None, name
        with safe_globals():  # as the Trainer loads random states, and takes what it allows away again
            pass
    with checkpoint.verified_loads(tmp_path, {}, own=tmp_path):
        torch.load(tmp_path / "rng.pt")
