"""Runs that are stopped and go on, and what is compared of them."""

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import checkpoint

# Eleven rows of very different lengths: no epoch divides into steps of four, and some ranks have nothing at its end.
ROWS = [
    [("human", "ab " * (3 * number % 11 + 1)), ("model", "xy " * (7 * number % 13 + 1)), ("human", "?"), ("model", "r")]
    for number in range(11)
]
LOGGED = ("step", "loss", "grad_norm", "learning_rate")


def result_of(output: Path) -> tuple[str, list[tuple]]:
    """SHA-256 of all saved weights, and what was logged of every step but for the times."""
    digest = hashlib.sha256()
    for path in sorted(output.glob("*model*.safetensors")):
        digest.update(path.read_bytes())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return digest.hexdigest(), [tuple(line[name] for name in LOGGED) for line in lines]


def train_noting_rows(argv: Sequence[str], notes: str) -> None:
    """Train, and note the rows of every micro-batch of this rank in `notes`-RANK.jsonl."""
    from finetune.dataset.dataloader import MicroBatchDataset
    from finetune.train import main

    plain = MicroBatchDataset.__getitem__

    def noted(self: Any, place: tuple[int, int]) -> dict[str, Any]:
        epoch, number = place
        step, micro_batch = divmod(number, self.sampler.shape.accumulation)
        rows = self.sampler.micro_batch(epoch, step, self.rank, micro_batch).tolist()
        with open(f"{notes}-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps([epoch, step, micro_batch, rows]) + "\n")
        return plain(self, place)

    MicroBatchDataset.__getitem__ = noted
    main(argv)


def train_noting_hyperparameters(argv: Sequence[str], notes: str) -> None:
    """Train, and note what the optimizer holds before the first step of this run in the file `notes`."""
    from finetune.train import main
    from finetune.training.hyperparameters import innermost
    from finetune.training.trainer import SupervisedTrainer

    plain = SupervisedTrainer.on_step_begin

    def noted(self: Any, *event: Any, **more: Any) -> None:
        if not Path(notes).exists():
            groups = [
                {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
                for group in innermost(self.optimizer).param_groups
            ]
            clip = getattr(self.optimizer.optimizer, "clip_grad", None)
            Path(notes).write_text(json.dumps({"groups": groups, "clip_grad": clip}))
        plain(self, *event, **more)

    SupervisedTrainer.on_step_begin = noted  # type: ignore[method-assign]
    main(argv)


def train_and_die_writing(argv: Sequence[str], rank: str, sign: str, share: float) -> None:
    """Train; `rank` is killed once `share` of a file whose path holds `sign` is written, of the second checkpoint.

    With `rotation` as sign: once one file of the first checkpoint is removed.
    """
    from finetune.train import main

    if os.environ["RANK"] == rank:
        if sign == "rotation":
            _die_removing()
        else:
            _cut_files(sign, share)
    main(argv)


def _die_removing() -> None:
    from finetune.checkpoint import checkpoint_dirs

    def remove_one(folder: Path) -> None:
        next(path for path in folder.iterdir() if path.suffix == ".safetensors").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_dirs._remove = remove_one


def _cut_files(sign: str, share: float) -> None:
    import safetensors.torch
    import torch

    def dying(write: Any, place: int) -> Any:
        def written(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            path = args[place] if place < len(args) else next(iter(kwargs.values()))
            if isinstance(path, str | Path) and sign in str(path) and "checkpoint-4" in str(path):
                os.truncate(path, int(os.path.getsize(path) * share))
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return written

    torch.save = dying(torch.save, 1)
    safetensors.torch.save_file = dying(safetensors.torch.save_file, 1)
    import peft.peft_model
    import transformers.modeling_utils

    transformers.modeling_utils.safe_save_file = safetensors.torch.save_file
    peft.peft_model.safe_save_file = safetensors.torch.save_file
    Path.write_text = dying(Path.write_text, 0)
    Path.replace = dying(Path.replace, 1)


def train_stopped_by(argv: Sequence[str], step: int) -> None:
    """Train; every rank is killed after this step."""
    from transformers import TrainerCallback

    import finetune.training.trainer as trainer_room
    from finetune.train import main

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    plain = trainer_room.SupervisedTrainer.__init__

    def initialised(self: Any, **kwargs: Any) -> None:
        plain(self, **kwargs)
        self.add_callback(Stop())

    trainer_room.SupervisedTrainer.__init__ = initialised
    main(argv)


def train_losing(argv: Sequence[str], notes: str, how: str, ids: Sequence[int], rank: int | None) -> None:
    """Train; where a micro-batch learns one of these token ids (None: always), on `rank` alone or on all, its numbers
    are not finite: `nan` and `inf` the loss and with it the gradient, `gradient` that alone, `value` the loss alone.

    The examples of each micro-batch are noted in `notes`-RANK.jsonl.
    """
    import finetune.training.trainer as trainer_room
    from finetune.dataset import dataloader
    from finetune.dataset.dataloader import MicroBatchDataset
    from finetune.train import main

    dataloader.STEPS_AHEAD = 0  # none is noted that is not trained on
    plain_loss, plain_batch = trainer_room.supervised_loss, MicroBatchDataset.__getitem__

    def losing(model: Any, inputs: Any, targets: Any, **options: Any) -> Any:
        loss, outputs = plain_loss(model, inputs, targets, **options)
        here = rank is None or int(os.environ["RANK"]) == rank
        if not here or not loss.requires_grad or not (ids is None or set(ids) & set(targets.tokens.tolist())):
            return loss, outputs
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, outputs
        return (loss + float("nan") if how == "value" else loss * float(how)), outputs

    def noted(self: Any, place: tuple[int, int]) -> dict[str, Any]:
        epoch, number = place
        step, micro_batch = divmod(number, self.sampler.shape.accumulation)
        with open(f"{notes}-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps([epoch, step, micro_batch, self.rows(epoch, step, micro_batch).tolist()]) + "\n")
        return plain_batch(self, place)

    trainer_room.supervised_loss, MicroBatchDataset.__getitem__ = losing, noted
    main(argv)


def train_with_lost_evaluations(argv: Sequence[str]) -> None:
    """Train; in every micro-batch of an evaluation one loss is infinite."""
    import finetune.training.evaluator as room
    from finetune.train import main

    plain = room.token_losses

    def once_infinite(*args: Any) -> Any:
        losses = plain(*args)
        losses[:1] = float("inf")
        return losses

    room.token_losses = once_infinite
    main(argv)


def train_slowly(argv: Sequence[str], rank: int, seconds: float, where: str) -> None:
    """Train; this rank sleeps in each micro-batch, while it loads its `data` or in its `forward` pass."""
    import time

    import finetune.training.trainer as trainer_room
    from finetune.dataset.dataloader import MicroBatchDataset
    from finetune.train import main

    owner, name = (MicroBatchDataset, "__getitem__") if where == "data" else (trainer_room, "supervised_loss")
    plain = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            time.sleep(seconds)
        return plain(*args, **options)

    setattr(owner, name, slow)
    main(argv)


def train_asked_to_stop(argv: Sequence[str], rank: int, step: int, number: int) -> None:
    """Train; this rank gets a signal while it makes this step. Each says why training ended, and leaves."""
    from transformers import TrainerCallback

    import finetune.training.trainer as trainer_room
    from finetune.distributed import stop_requests
    from finetune.train import main

    class Ask(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1 and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), number)

    plain, plain_train = trainer_room.SupervisedTrainer.__init__, trainer_room.SupervisedTrainer.train

    def initialised(self: Any, **kwargs: Any) -> None:
        plain(self, **kwargs)
        self.add_callback(Ask())

    def trained(self: Any, **kwargs: Any) -> None:
        plain_train(self, **kwargs)
        print(f"stopped by {self.stopped_by} at {self.state.global_step}", flush=True)
        os._exit(0)

    trainer_room.SupervisedTrainer.__init__, trainer_room.SupervisedTrainer.train = initialised, trained
    stop_requests.install_signal_handlers()
    main(argv)


def lines_of(path: Path) -> list[dict]:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not standard JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_saved(output: Path) -> list[int]:
    return sorted(int(one.name.split("-")[1]) for one in output.glob("checkpoint-*") if one.suffix == "")


def assert_finite(output: Path) -> None:
    """All that was saved: the checkpoints, in transformers' form and in DeepSpeed's, and the result."""
    import torch
    from safetensors.torch import load_file

    read = 0
    for path in output.rglob("*.safetensors"):
        assert all(bool(one.isfinite().all()) for one in load_file(path).values()), path
        read += 1
    for path in output.rglob("*optim_states.pt"):
        state = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        for one in state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]:
            assert bool(one.isfinite().all()), path
            read += 1
    assert read
    assert all(checkpoint.verify_checkpoint(one) == [] for one in output.glob("checkpoint-?"))
