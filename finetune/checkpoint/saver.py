"""Checkpoints as all ranks write them: room is made sure of, errors wait for each other, the seal comes last.

begin      every disk has room, old remains are gone, the folder stands, marked as unfinished
recording  what a rank writes; where the disk refuses, the rank goes on to where the others wait for it
seal       all files are on the disks and hashed -> all ranks agree -> manifests -> older checkpoints go
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint.checkpoint_size import MODEL, ParameterSizes, checkpoint_parts
from finetune.checkpoint.manifest import FileRecord, Manifest
from finetune.distributed.collectives import StorageGroup, all_gather_object, get_rank, run_on_all_ranks
from finetune.utils.errors import CheckpointError, FinetuneError, StorageError

logger = logging.getLogger(__name__)

ROOM_TO_SPARE = 1.05  # of what the last checkpoint took
BYTES_TO_SPARE = 8 << 20
# In errors of torch's zip writer and of safetensors, which have types of their own.
SIGNS_OF_A_DISK = ("iostream error", "unexpected pos", "PytorchStreamWriter", "No space left", "I/O error")


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is.

    Attributes:
        run_id: drawn at its start; that of the checkpoint for a run that goes on.
        facts: what must be the same for a resumed run to be the uninterrupted one.
        step_rows: rows or groups of a full step, over all ranks.
        disk: who keeps files where this rank does.
        manifest: of the checkpoint that it goes on from, and `folder` where that lies.
    """

    run_id: str
    facts: dict[str, Any]
    step_rows: int
    disk: StorageGroup
    manifest: Manifest | None = None
    folder: Path | None = None

    def check_trained(self, shapes: dict[str, list[int]]) -> None:
        """Compare the parameters to be trained with those of the checkpoint.

        Raises:
            CheckpointError: they have other names or shapes.
        """
        if self.manifest is None or self.manifest.trained == shapes:
            return
        old = self.manifest.trained
        name = next(name for name in (*old, *shapes) if old.get(name) != shapes.get(name))
        raise CheckpointError(
            f"the checkpoint of step {self.manifest.step} has other trained parameters: {name} is "
            f"{old.get(name, 'not there')}, now {shapes.get(name, 'not there')}"
        )


def trained_shapes(model: Any) -> dict[str, list[int]]:
    """Names and whole shapes of all trained parameters, partitioned ones (ZeRO-3) too."""
    return {
        name: list(getattr(one, "ds_shape", one.shape)) for name, one in model.named_parameters() if one.requires_grad
    }


def checkpoint_bytes(
    model: Any, trained: Mapping[str, list[int]], *, stage: int | None, share: float, only_model: bool
) -> int:
    """Estimate the bytes that a checkpoint takes on this disk.

    Args:
        trained: whole shapes by name.
        stage: of ZeRO, None without DeepSpeed.
        share: of the ranks whose files lie on this disk.
        only_model: without the state of the optimizer.
    """
    total = _size(model.parameters())
    sizes = ParameterSizes(
        total=total,
        trained=_size(one for one in model.parameters() if one.requires_grad),
        num_trained=sum(math.prod(shape) for shape in trained.values()),
        tied=_size(one for _, one in model.named_parameters(remove_duplicate=False)) - total,
        has_adapter=hasattr(model, "peft_config"),
    )
    parts = checkpoint_parts(sizes, stage, only_model=only_model)
    return int(parts[MODEL] + share * (sum(parts.values()) - parts[MODEL]))


def _size(parameters: Iterable[Any]) -> int:
    """Bytes of whole parameters, partitioned ones (ZeRO-3) too."""
    return sum(getattr(one, "ds_numel", one.numel()) * one.element_size() for one in parameters)


@dataclass
class Saver:
    """Writes the checkpoints of a run.

    Args:
        output_dir: in which they lie.
        disk: who keeps files where this rank does.
        keep: how many sealed ones stay; None: all.
        first_size: bytes of a checkpoint on this disk, as far as they can be told before there is one.
        describe: (step) -> the manifest without its files; called by every rank, it may ask the others.
    """

    output_dir: Path
    disk: StorageGroup
    keep: int | None
    first_size: int
    describe: Callable[[int], Manifest]
    last_size: int | None = None
    newest: Path | None = None
    failures: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    @property
    def needed(self) -> int:
        """Bytes that the next checkpoint takes on this disk."""
        size = self.first_size if self.last_size is None else int(self.last_size * ROOM_TO_SPARE)
        return size + BYTES_TO_SPARE

    def begin(self, step: int, run_id: str) -> Path:
        """Make room and the folder; all ranks.

        Raises:
            StorageError: too little space, or the folder cannot be made.
        """
        folder = checkpoint.checkpoint_folder(self.output_dir, step)
        self.failures, self.written = [], set()

        def make() -> None:
            if not self.disk.is_writer:
                return
            self._remove_older(checkpoint.remove_unfinished)
            try:
                if folder.exists() or folder.is_symlink():
                    aside = checkpoint.quarantine(folder, "before")
                    logger.info(f"{folder} was there before this run came to it: renamed to {aside.name}")
                free = self._free()
                if free < self.needed:
                    raise StorageError(self._no_space(step, free))
                checkpoint.mark_as_unfinished(folder, run_id, step)
            except OSError as error:
                raise StorageError(f"{folder}{self._where()}: {error.strerror}") from None

        run_on_all_ranks(make)
        return folder

    @contextmanager
    def recording(self, what: Path) -> Iterator[None]:
        """Keep what goes wrong while `what` is written until `seal`, where all ranks hear of it.

        Other ranks wait for this one in the next collective of the save: it has to get there.
        """
        try:
            yield
        except FinetuneError as error:
            self.failures.append(str(error))
        except Exception as error:  # torch and safetensors say that a disk is full in types of their own
            if not _is_of_writing(error):
                raise
            self.failures.append(f"{what}: {str(error).splitlines()[0]}")

    def claim(self, path: Path) -> None:
        """This rank has written `path`; what nobody claims is the writer's."""
        self.written.add(str(path))

    def seal(self, folder: Path, step: int, keep_also: tuple[int, ...] = ()) -> Manifest:
        """Make the checkpoint count, then remove older ones; all ranks.

        Raises:
            StorageError: some rank could not write; what it left is removed, older checkpoints are untouched.
        """
        mine, common = {}, {}
        claimed = all_gather_object({str(Path(one).relative_to(folder)) for one in self.written})
        if not self.failures:
            with self.recording(folder):
                mine = checkpoint.fsync_and_hash(folder, sorted(claimed[get_rank()]), get_rank())
                if self.disk.is_writer:
                    others = set().union(*(claimed[rank] for rank in self.disk.ranks))
                    common = checkpoint.fsync_and_hash(folder, sorted({*checkpoint.file_names(folder)} - others), None)
        outcomes = all_gather_object((self.failures, mine, common))
        if any(failures for failures, _, _ in outcomes):
            self._give_up(folder, step)
        files: dict[str, FileRecord] = dict(outcomes[self.disk.writer][2])
        for _, own, _ in outcomes:
            files |= own
        manifest = replace(self.describe(step), files=dict(sorted(files.items())))
        run_on_all_ranks(lambda: self._finish(folder, manifest))
        self.last_size = sum(files[name].size for name in manifest.names_for(self.disk.ranks))
        self.newest = folder
        if self.disk.is_writer:
            options = {"run_id": manifest.run_id, "keep": self.keep, "keep_also": (step, *keep_also)}
            self._remove_older(checkpoint.rotate, **options)
        return manifest

    @contextmanager
    def saving_result(self) -> Iterator[None]:
        """What is written into `output_dir` itself inside the block is on the disk behind it; all ranks.

        Raises:
            StorageError: some rank could not write; what came new is removed on every disk.
        """
        self.failures = []
        before = set(self._files_of_result())
        yield
        if self.disk.is_writer and not self.failures:
            with self.recording(self.output_dir):
                checkpoint.fsync_and_hash(self.output_dir, self._files_of_result(), None)
        where = self._first_failure()
        if where is None:
            return
        if self.disk.is_writer:
            for name in set(self._files_of_result()) - before:
                (self.output_dir / name).unlink(missing_ok=True)
        reason, host, free = where
        kept = f": the trained weights are in {self.newest}" if self.newest else ""
        raise StorageError(
            f"{reason}: the result was not saved in {self.output_dir}{host}, {free / 1e6:,.0f} MB were free{kept}; "
            "what it had written was removed"
        )

    def _first_failure(self) -> tuple[str, str, int] | None:
        """What the lowest rank that failed says, on which host, and how many bytes were free there; all ranks."""
        free = self._free()
        everyone = all_gather_object((self.failures, self._where(), free))
        return next(((failures[0], host, free) for failures, host, free in everyone if failures), None)

    def _files_of_result(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.iterdir() if path.is_file()) if self.disk.is_writer else []

    def _finish(self, folder: Path, manifest: Manifest) -> None:
        if not self.disk.is_writer:
            return
        try:
            checkpoint.write_manifest(folder, manifest)
        except OSError as error:
            raise StorageError(f"{folder}{self._where()}: {error.strerror}: it is not a checkpoint") from None

    def _remove_older(self, remove: Callable[..., Any], **options: Any) -> None:
        """Whether there is room is another question: what cannot be removed now, because somebody reads it over NFS,
        can be at the next save."""
        try:
            remove(self.output_dir, **options)
        except OSError as error:
            logger.warning(f"an older checkpoint in {self.output_dir}{self._where()} could not be removed: {error}")

    def _give_up(self, folder: Path, step: int) -> None:
        reason, host, _ = self._first_failure() or ("", "", 0)
        if self.disk.is_writer and checkpoint.is_unfinished(folder):
            try:
                checkpoint.remove_checkpoint(folder)
            except OSError as error:
                logger.warning(f"{folder}{self._where()} is not whole and could not be removed: {error.strerror}")
        free = min(all_gather_object(self._free()))
        raise StorageError(f"{reason}{host}: {self._no_space(step, free)}; what it had written was removed")

    def _free(self) -> int:
        """Bytes; 0 where the disk does not answer: the others wait for this rank's word."""
        try:
            return shutil.disk_usage(self.output_dir).free
        except OSError:
            return 0

    def _no_space(self, step: int, free: int) -> str:
        kept = f"the newest checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"
        missing = max(self.needed - free, 0)
        short = f", {missing / 1e6:,.0f} MB are missing" if missing else ""
        return (
            f"checkpoint-{step} was not saved in {self.output_dir}{self._where()}: it needs about "
            f"{self.needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free{short}; {kept}"
        )

    def _where(self) -> str:
        return f" on {os.uname().nodename}" if not self.disk.is_shared else ""


def _is_of_writing(error: Exception) -> bool:
    """Whether a disk refused: the system says so, torch's zip writer, or safetensors."""
    text = str(error)
    return isinstance(error, OSError) or any(sign in text for sign in SIGNS_OF_A_DISK)


def resume_point(newest: Path | None, identity: RunIdentity, output_dir: Path) -> tuple[str, str]:
    """Where a run that fails can resume, in words, and the value of `--resume_from_checkpoint`."""
    if newest is not None:
        return f"the newest checkpoint is {newest.name}", "auto"
    if identity.manifest is not None and identity.folder is not None:
        resume = "auto" if identity.folder.parent == output_dir else str(identity.folder)
        return f"the newest checkpoint is that of step {identity.manifest.step}", resume
    return "there is no checkpoint yet", "auto"


def new_run_id() -> str:
    """When it began, and a number that no other run has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def checkpoint_engine(saver: Saver) -> Any:
    """DeepSpeed's own writer of files, with a `Saver` that is told of each and keeps what goes wrong."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        """Its errors wait until all ranks can hear of them."""

        def save(self, state_dict: Any, path: str) -> None:
            saver.claim(Path(path))
            with saver.recording(Path(path)):
                super().save(state_dict, path)

    engine = RecordingCheckpointEngine()
    engine.zipfile_serialization = True
    return engine
