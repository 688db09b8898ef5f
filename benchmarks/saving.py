"""Cost of a checkpoint with manifest, against the Trainer's own save and a `sync`, alternating within one run.

    python benchmarks/saving.py                        four layers, all parameters, ZeRO-2, one rank
    python benchmarks/saving.py --layers 30 --rounds 3

Both save the same state of the same engine. Ours is synced, hashed and in a manifest when it is complete; the Trainer's
is on the disk once `sync` has returned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from environments import ROOT, machine
from throughput import make_model

sys.path.insert(0, str(ROOT))
DATA = ROOT / "data" / "identity.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Saving a checkpoint, against the Trainer's own save and a sync.")
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M-Instruct, which has 30")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind that count")
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--work", type=Path, help="where model and checkpoints lie (default: the system's)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saving-", dir=given.work) as folder:
        make_model(Path(folder) / "model", given.layers)
        seconds = _train_and_save(given, Path(folder))
    ours, stock = (median(seconds[name]) for name in ("ours", "stock"))
    print(f"{given.layers} layers, {given.deepspeed}; {machine()}, {time.strftime('%Y-%m-%d %H:%M')}")
    for name, taken in seconds.items():
        print(f"{name}: {', '.join(f'{one:.2f}' for one in taken)} s")
    print(f"with manifest {ours:.2f} s, the Trainer's save and sync {stock:.2f} s: {ours / stock:.2f}")


def _train_and_save(given: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of the saves of each kind, the first of each left out."""
    from transformers import Trainer

    from finetune import train
    from finetune.training.checkpoint_trainer import CheckpointTrainer

    ours, stock = CheckpointTrainer, {}
    names = ("_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_save")
    own = {name: ours.__dict__[name] for name in names}
    stock = {name: Trainer.__dict__[name] for name in names}
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}

    def save(self: Any, model: Any, trial: Any) -> None:
        kind = "ours" if self.state.global_step % 2 else "stock"
        os.sync()
        for name, method in (own if kind == "ours" else stock).items():
            setattr(ours, name, method)
        if kind == "stock" and hasattr(self.model_wrapped, "checkpoint_engine"):
            from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

            self.model_wrapped.checkpoint_engine = TorchCheckpointEngine()
            self.model_wrapped.checkpoint_engine.zipfile_serialization = True
        began = time.perf_counter()
        ours._save_checkpoint(self, model, trial)
        if kind == "stock":
            os.sync()
        seconds[kind].append(time.perf_counter() - began)
        ours._save_checkpoint = save
        for step in range(self.state.global_step):  # the disk stays as empty for every save
            shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{step}", ignore_errors=True)

    ours._save_checkpoint = save
    named = ["--model_name_or_path", folder / "model", "--data_path", DATA, "--output_dir", folder / "output"]
    flags = "--per_device_train_batch_size 1 --save_strategy steps --save_steps 1 --logging_steps 1000".split()
    steps = ["--max_steps", 2 * (given.rounds + 1), "--save_total_limit", 0, "--deepspeed", given.deepspeed]
    train.main([str(word) for word in (*named, *flags, *steps)])
    return {kind: taken[1:] for kind, taken in seconds.items()}


if __name__ == "__main__":
    main()
