"""Bring code, interpreter, data and model to hosts that lack them: rsync over the ssh that the run itself uses."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.launcher.ssh import SshShell, in_brackets, is_here
from finetune.utils.errors import ConfigError, FinetuneError, StorageError, format_faults
from finetune.utils.proc import ROOT

logger = logging.getLogger(__name__)

# What a clone makes by itself, or holds for its owner alone.
NOT_CODE = (".git", "/output*", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info", "/.models",
            "/.venv")  # fmt: skip


@dataclass(frozen=True)
class StagedFolder:
    """Something that a host gets: an absolute path, the same there as here; `why` it is sent."""

    host: str
    path: Path
    why: str
    without: tuple[str, ...] = ()


def folders_to_stage(answers: Mapping[str, dict[str, Any] | str], here: Mapping[str, Any]) -> list[StagedFolder]:
    """What hosts need to be like this machine, from what they and it say of themselves.

    A host whose Python did not answer gets the interpreter's environment, code and all files.
    """
    found = []
    for host, answer in answers.items():
        if is_here(host):
            continue
        knows = answer if isinstance(answer, dict) else {"code": None, "folder": False, "files": {}}
        if isinstance(answer, str) and Path(sys.prefix) != Path(sys.base_prefix):
            found.append(StagedFolder(host, Path(sys.prefix), "its Python does not answer"))
        if knows["code"] != here["code"]:
            why = "it has none" if knows["code"] is None else "it differs"
            found.append(StagedFolder(host, ROOT, why, NOT_CODE))
        for word, fingerprint in here["files"].items():
            path = Path(os.path.abspath(Path(word).expanduser()))
            if path == ROOT or ROOT / "finetune" in (path, *path.parents):
                continue
            if knows["files"].get(word) != fingerprint:
                found.append(StagedFolder(host, path, "it has none" if word not in knows["files"] else "it differs"))
    return found


def send_folders(wanted: Sequence[StagedFolder], shell: SshShell, work_folder: Path) -> None:
    """Send all, to all hosts at once, one thing after the other to each; `work_folder` is made there.

    A file that differs there is kept in a folder `.replaced-TIME` beside what takes its place.

    Raises:
        ConfigError: no rsync here.
        StorageError: what did not arrive, by host.
    """
    if shutil.which("rsync") is None:
        raise ConfigError("--stage: rsync is not on this machine: apt-get install rsync (and on the hosts)")
    stamp = time.strftime(".replaced-%Y%m%d-%H%M%S")
    hosts = dict.fromkeys(parcel.host for parcel in wanted)

    def all_of(host: str) -> str | None:
        try:
            _make_folder(host, work_folder, shell)
            for parcel in (one for one in wanted if one.host == host):
                began = time.monotonic()
                logger.info(f"{host}: {parcel.path} ({parcel.why}) ...")
                _make_folder(host, parcel.path.parent, shell)
                _copy(parcel, shell, stamp)
                logger.info(f"{host}: {parcel.path} is there after {time.monotonic() - began:.1f} s")
        except FinetuneError as error:
            return f"{host}: {error}"
        return None

    with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
        faults = [fault for fault in pool.map(all_of, hosts) if fault]
    if faults:
        raise StorageError(format_faults(faults, "fault"))


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def _make_folder(host: str, folder: Path, shell: SshShell) -> None:
    done = _run(shell.command(host, ["mkdir", "-p", str(folder)], sources=False))
    if done.returncode:
        raise StorageError(f"{folder}: {(done.stderr.strip().splitlines() or ['mkdir failed'])[-1]}")


def _copy(parcel: StagedFolder, shell: SshShell, stamp: str) -> None:
    command = ["rsync", "--archive", "--partial", "--backup", f"--backup-dir={stamp}", f"--exclude={stamp}"]
    command += [f"--exclude={pattern}" for pattern in parcel.without]
    command += ["--rsh", shlex.join(["ssh", *shell.options()])]
    is_folder = parcel.path.is_dir()
    source = f"{parcel.path}/" if is_folder else str(parcel.path)
    target = f"{in_brackets(parcel.host)}:{parcel.path if is_folder else parcel.path.parent}/"
    done = _run([*command, source, target])
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"rsync ended with status {done.returncode}"]
        telling = next((line for line in lines if "not found" in line or "No space" in line), lines[0])
        hint = ": apt-get install rsync there" if "not found" in telling else ""
        raise StorageError(f"{parcel.path}: {telling}{hint}")
