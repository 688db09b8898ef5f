"""A small checkpoint folder with its manifest."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune import checkpoint
from finetune.checkpoint import Manifest

MANIFEST = Manifest(
    run_id="20260101-000000-abcdef01",
    step=4,
    world_size=2,
    step_rows=8,
    position={"epoch": 1, "step": 1},
    last_logged=3,
    loss_since_log=[0.1, 1 / 3],
    facts={"--seed": 42, "ZeRO stage": 2},
    trained={"layer.weight": [2, 3]},
    versions={"torch": "2.13.0"},
    disks=[[0, 1]],
    written="2026-01-01T00:00:00+0000",
)


def sealed(output_dir: Path, step: int, run_id: str = MANIFEST.run_id) -> Path:
    """A checkpoint of every kind of file, written as a run writes it."""
    folder = checkpoint.checkpoint_folder(output_dir, step)
    checkpoint.mark_as_unfinished(folder, run_id, step)
    shard = folder / f"global_step{step}"
    shard.mkdir()
    torch.save({"moments": torch.arange(500.0)}, shard / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"python": (3, (1, 2), None)}, folder / "rng_state_0.pth")
    save_file({"weight": torch.arange(300.0)}, folder / "model.safetensors")
    (folder / "latest").write_text(f"global_step{step}")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    files = checkpoint.fsync_and_hash(folder, checkpoint.file_names(folder), None)
    checkpoint.write_manifest(folder, replace(MANIFEST, step=step, run_id=run_id, files=files))
    return folder


def newest_verified(output_dir: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written."""
    folders = (checkpoint.checkpoint_folder(output_dir, step) for step in checkpoint.steps_in(output_dir))
    return next((folder for folder in folders if not checkpoint.verify_checkpoint(folder)), None)
