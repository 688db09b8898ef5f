"""Write checkpoints from all ranks: check free space, collect errors from all ranks before raising, manifest last.

begin            every file system has space, remains of interrupted saves are removed, the folder exists and is marked
collect_errors   what a rank writes; where its disk refuses, the rank continues to the next collective
commit           all files synced and hashed -> errors of all ranks -> manifests -> older checkpoints removed
"""

import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint.checkpoint_size import MODEL, ParameterSizes, checkpoint_parts
from finetune.checkpoint.manifest import FileRecord, Manifest
from finetune.distributed.collectives import StorageGroup, all_gather_object, get_rank
from finetune.utils.errors import (
    CheckpointError,
    FinetuneError,
    StorageError,
    as_os_error,
    first_line,
    os_reason,
    storage_errors,
)

logger = logging.getLogger(__name__)

SIZE_MARGIN = 1.05  # of what the last checkpoint took
BYTES_MARGIN = 8 << 20
GONE = "Parent directory"
DISK_ERRORS = ("iostream error", "unexpected pos", "PytorchStreamWriter", GONE)  # of torch's zip writer


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is."""

    run_id: str  # drawn at its start; a resumed run keeps that of its checkpoint
    facts: dict[str, Any]  # what a resumed run must have in common to equal the uninterrupted one
    step_rows: int  # rows or groups of a full step, over all ranks
    storage: StorageGroup  # which ranks share a file system with this one
    manifest: Manifest | None = None  # of the checkpoint to resume from
    folder: Path | None = None  # that checkpoint, or its universal form
    verify_key: str | None = None  # the environment variable with the key of the manifests

    def check_trained(self, shapes: dict[str, list[int]]) -> None:
        """Check that the trained parameters have the names and shapes of those in the checkpoint."""
        if self.manifest is None or self.manifest.trained == shapes:
            return
        old = self.manifest.trained
        name = next(name for name in (*old, *shapes) if old.get(name) != shapes.get(name))
        raise CheckpointError(
            f"the checkpoint of step {self.manifest.step} has other trained parameters: {name} is "
            f"{old.get(name, 'not there')}, now {shapes.get(name, 'not there')}"
        )


def trained_shapes(model: Any) -> dict[str, list[int]]:
    """Return names and whole shapes of all trained parameters, partitioned ones (ZeRO-3) too."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def checkpoint_bytes(
    model: Any, trained: Mapping[str, list[int]], *, stage: int | None, share: float, only_model: bool
) -> int:
    """Estimate the bytes that a checkpoint takes on this disk, where the files of a `share` of the ranks lie."""
    total = _size(model.parameters())
    sizes = ParameterSizes(
        total=total,
        trained=_size(weight for weight in model.parameters() if weight.requires_grad),
        num_trained=sum(math.prod(shape) for shape in trained.values()),
        tied=_size(weight for _, weight in model.named_parameters(remove_duplicate=False)) - total,
        has_adapter=hasattr(model, "peft_config"),
    )
    parts = checkpoint_parts(sizes, stage, only_model=only_model)
    return int(parts[MODEL] + share * (sum(parts.values()) - parts[MODEL]))


def _size(parameters: Iterable[Any]) -> int:
    """Bytes of whole parameters, partitioned ones (ZeRO-3) too."""
    return sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in parameters)


@dataclass
class Saver:
    """Write the checkpoints of a run."""

    output_dir: Path
    storage: StorageGroup
    keep: int | None  # how many complete checkpoints stay; None: all
    first_size: int  # estimated bytes of a checkpoint on this file system
    describe: Callable[[int], Manifest]  # (step) -> the manifest without its files; all ranks
    key: bytes | None = field(default=None, repr=False)  # of the manifests' HMAC
    resumed: Path | None = None  # the checkpoint that the run began with
    last_size: int | None = None
    newest: Path | None = None
    failures: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    @property
    def needed(self) -> int:
        """Bytes that the next checkpoint takes on this file system."""
        size = self.first_size if self.last_size is None else int(self.last_size * SIZE_MARGIN)
        return size + BYTES_MARGIN

    def begin(self, step: int, run_id: str) -> Path:
        """Check the space and create the folder; a `StorageError` where one of both fails. All ranks."""
        folder = checkpoint.checkpoint_folder(self.output_dir, step)
        self.failures, self.written = [], set()

        def create() -> None:
            with storage_errors(folder, f"{folder}{self._where()}"):
                if not self.output_dir.is_dir():
                    raise FileNotFoundError
                self._remove_older(checkpoint.remove_unfinished)
                if folder.exists() or folder.is_symlink():
                    renamed = checkpoint.quarantine(folder, "before")
                    logger.info(f"{folder} existed before this step: renamed to {renamed.name}")
                free = self._free()
                if free < self.needed:
                    raise StorageError(self._no_space(step, free))
                checkpoint.mark_as_unfinished(folder, run_id, step)

        self.storage.run_on_writers(create)
        return folder

    @contextmanager
    def collect_errors(self, path: Path) -> Iterator[None]:
        """Keep errors of writing `path` until `commit`, which raises them on all ranks.

        The other ranks wait for this one in the next collective of the save.
        """
        try:
            yield
        except FinetuneError as error:
            self.failures.append(str(error))
        except Exception as error:
            of_system = FileNotFoundError() if GONE in str(error) else as_os_error(error)
            if of_system is None and not any(sign in str(error) for sign in DISK_ERRORS):
                raise
            reason = os_reason(of_system, path) if of_system else first_line(error)
            self.failures.append(f"{path}: {reason}")

    def record_written(self, path: Path) -> None:
        """Record that this rank has written `path`; files that no rank records are the writer's."""
        self.written.add(str(path))

    def commit(self, folder: Path, step: int, keep_also: tuple[int, ...] = ()) -> Manifest:
        """Complete the checkpoint with its manifest, then remove older ones. All ranks.

        Raises:
            StorageError: some rank could not write; its files are removed, older checkpoints are untouched.
        """
        own, common = {}, {}
        written = all_gather_object({str(Path(path).relative_to(folder)) for path in self.written})
        if not self.failures:
            with self.collect_errors(folder):
                hash_files = partial(checkpoint.fsync_and_hash, folder, with_sha256=self.key is not None)
                own = hash_files(sorted(written[get_rank()]), get_rank())
                if self.storage.is_writer:
                    of_ranks = set().union(*(written[rank] for rank in self.storage.ranks))
                    common = hash_files(sorted({*checkpoint.file_names(folder)} - of_ranks), None)
        outcomes = all_gather_object((self.failures, own, common))
        if any(failures for failures, _, _ in outcomes):
            self._abort(folder, step)
        files: dict[str, FileRecord] = dict(outcomes[self.storage.writer][2])
        for _, of_rank, _ in outcomes:
            files |= of_rank
        manifest = replace(self.describe(step), files=dict(sorted(files.items())))

        def write_manifest() -> None:
            with storage_errors(folder, f"{folder}{self._where()} is not a checkpoint"):
                checkpoint.write_manifest(folder, manifest, self.key)

        self.storage.run_on_writers(write_manifest)
        self.last_size = sum(files[name].size for name in manifest.names_for(self.storage.ranks))
        self.newest = folder
        if self.storage.is_writer:
            options = {"run_id": manifest.run_id, "keep": self.keep, "keep_also": (step, *keep_also)}
            self._remove_older(checkpoint.rotate, **options)
        return manifest

    @contextmanager
    def saving_result(self) -> Iterator[None]:
        """Sync what is written into `output_dir` itself inside the block. All ranks.

        Raises:
            StorageError: some rank could not write; new files are removed on every file system.
        """
        self.failures = []
        before = set(self._files_of_result())
        yield
        if self.storage.is_writer and not self.failures:
            with self.collect_errors(self.output_dir):
                checkpoint.fsync_and_hash(self.output_dir, self._files_of_result(), None)
        failure = self._first_failure()
        if failure is None:
            return
        if self.storage.is_writer:
            for name in set(self._files_of_result()) - before:
                (self.output_dir / name).unlink(missing_ok=True)
        reason, host, free = failure
        kept = f": the trained weights are in {self.newest}" if self.newest else ""
        raise StorageError(
            f"{reason}: the result was not saved in {self.output_dir}{host}, {free / 1e6:,.0f} MB were free{kept}; "
            "what it had written was removed"
        )

    def _first_failure(self) -> tuple[str, str, int] | None:
        """Return the error of the lowest rank that failed, its host, and the bytes free there. All ranks."""
        free = self._free()
        of_ranks = all_gather_object((self.failures, self._where(), free))
        return next(((failures[0], host, free) for failures, host, free in of_ranks if failures), None)

    def _files_of_result(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.iterdir() if self.storage.is_writer and path.is_file())

    def _remove_older(self, remove: Callable[..., Any], **options: Any) -> None:
        """Report what cannot be removed now, because somebody reads it over NFS: the next save tries again."""
        try:
            remove(self.output_dir, **options)
        except OSError as error:
            logger.warning(f"an older checkpoint in {self.output_dir}{self._where()} could not be removed: {error}")

    def _abort(self, folder: Path, step: int) -> None:
        reason, host, _ = self._first_failure() or ("", "", 0)
        if self.storage.is_writer and checkpoint.is_unfinished(folder):
            try:
                checkpoint.remove_checkpoint(folder)
            except OSError as error:
                logger.warning(f"{folder}{self._where()} is incomplete and could not be removed: {error.strerror}")
        free = min(all_gather_object(self._free()))
        raise StorageError(f"{reason}{host}: {self._no_space(step, free)}; what it had written was removed")

    def _free(self) -> int:
        """Return free bytes; 0 where the disk does not answer, because the other ranks wait for this one."""
        try:
            return shutil.disk_usage(self.output_dir).free
        except OSError:
            return 0

    def _no_space(self, step: int, free: int) -> str:
        newest = self.newest or self.resumed
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        missing = max(self.needed - free, 0)
        short = f", {missing / 1e6:,.0f} MB are missing" if missing else ""
        space = f": it needs about {self.needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free{short}" if short else ""
        if not self.output_dir.is_dir():
            space = ""
        return f"checkpoint-{step} was not saved in {self.output_dir}{self._where()}{space}; {kept}"

    def _where(self) -> str:
        return f" on {os.uname().nodename}" if not self.storage.is_shared else ""


def resume_advice(newest: Path | None, identity: RunIdentity, output_dir: Path, skipped_rows: Path | None) -> str:
    """Say where a run that fails can resume, and how; `skipped_rows` is the file of rows to leave out."""
    where, resume = "there is no checkpoint yet", "auto"
    if newest is not None:
        where = f"the newest checkpoint is {newest.name}"
    elif identity.manifest is not None and identity.folder is not None:
        where = f"the newest checkpoint is that of step {identity.manifest.step}"
        resume = "auto" if identity.folder.parent == output_dir else str(identity.folder)
    if skipped_rows is None:
        return f"{where}: --resume_from_checkpoint {resume} resumes there"
    return (
        f"The rows, with their text, are in {skipped_rows}, and {where}: to resume without them, give "
        f"--skip_rows {skipped_rows} --resume_from_checkpoint {resume}"
    )


def new_run_id() -> str:
    """Return a new id: the time of the start and a random number."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def checkpoint_engine(saver: Saver) -> Any:
    """Return DeepSpeed's checkpoint engine, whose files and errors go to a `Saver`."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        """Keep errors until all ranks can raise them."""

        def save(self, state_dict: Any, path: str) -> None:
            saver.record_written(Path(path))
            with saver.collect_errors(Path(path)):
                super().save(state_dict, path)

    engine = RecordingCheckpointEngine()
    engine.zipfile_serialization = True
    return engine
