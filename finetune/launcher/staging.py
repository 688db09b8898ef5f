"""Copy code, interpreter, data and model to hosts that lack them: rsync over the same ssh as the run."""

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

from finetune.launcher.ssh import Answers, SshShell, in_brackets, is_here
from finetune.utils.errors import ConfigError, FinetuneError, StorageError, lines_of, raise_faults
from finetune.utils.proc import ROOT

logger = logging.getLogger(__name__)

# What a clone generates by itself, or holds for its owner alone.
NOT_CODE = (".git", "/output*", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info", "/.models",
            "/.venv")  # fmt: skip


@dataclass(frozen=True)
class StagedFolder:
    """A file or folder to copy to the same absolute path on a host, and the reason."""

    host: str
    path: Path
    why: str
    without: tuple[str, ...] = ()


def folders_to_stage(answers: Answers, here: Mapping[str, Any]) -> list[StagedFolder]:
    """Return what hosts need to be like this machine, by comparing their facts with its own.

    A host whose Python did not answer gets the environment of the interpreter, the code and all files.
    """
    staged = []
    for host, answer in answers.items():
        if is_here(host):
            continue
        facts = answer if isinstance(answer, dict) else {"code": None, "folder": False, "files": {}}
        if isinstance(answer, str) and Path(sys.prefix) != Path(sys.base_prefix):
            staged.append(StagedFolder(host, Path(sys.prefix), "its Python does not answer"))
        if facts["code"] != here["code"]:
            why = "it has none" if facts["code"] is None else "it differs"
            staged.append(StagedFolder(host, ROOT, why, NOT_CODE))
        for word, fingerprint in here["files"].items():
            path = Path(os.path.abspath(Path(word).expanduser()))
            if path == ROOT or ROOT / "finetune" in (path, *path.parents):
                continue
            if facts["files"].get(word) != fingerprint:
                staged.append(StagedFolder(host, path, "it has none" if word not in facts["files"] else "it differs"))
    return staged


def send_folders(folders: Sequence[StagedFolder], shell: SshShell, work_folder: Path) -> None:
    """Copy all to all hosts at once, one after the other for each; `work_folder` is made there.

    A file that differs there is kept in a folder `.replaced-TIME` beside the new one.
    """
    if shutil.which("rsync") is None:
        raise ConfigError("--stage: rsync is not on this machine: apt-get install rsync (and on the hosts)")
    stamp = time.strftime(".replaced-%Y%m%d-%H%M%S")
    hosts = dict.fromkeys(folder.host for folder in folders)

    def send_to(host: str) -> str | None:
        try:
            _make_folder(host, work_folder, shell)
            for folder in (folder for folder in folders if folder.host == host):
                began = time.monotonic()
                logger.info(f"{host}: {folder.path} ({folder.why}) ...")
                _make_folder(host, folder.path.parent, shell)
                _copy(folder, shell, stamp)
                logger.info(f"{host}: {folder.path} is there after {time.monotonic() - began:.1f} s")
        except FinetuneError as error:
            return f"{host}: {error}"
        return None

    with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
        raise_faults(filter(None, pool.map(send_to, hosts)), StorageError)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def _make_folder(host: str, folder: Path, shell: SshShell) -> None:
    done = _run(shell.command(host, ["mkdir", "-p", str(folder)], with_venv=False))
    if done.returncode:
        raise StorageError(f"{folder}: {lines_of(done.stderr, 'mkdir failed')[-1]}")


def _copy(folder: StagedFolder, shell: SshShell, stamp: str) -> None:
    command = ["rsync", "--archive", "--partial", "--backup", f"--backup-dir={stamp}", f"--exclude={stamp}"]
    command += [f"--exclude={pattern}" for pattern in folder.without]
    command += ["--rsh", shlex.join(["ssh", *shell.options()])]
    path = folder.path
    source, into = (f"{path}/", path) if path.is_dir() else (str(path), path.parent)
    target = f"{in_brackets(folder.host)}:{into}/"
    done = _run([*command, source, target])
    if done.returncode:
        lines = lines_of(done.stderr, f"rsync ended with status {done.returncode}")
        telling = next((line for line in lines if "not found" in line or "No space" in line), lines[0])
        hint = ": apt-get install rsync there" if "not found" in telling else ""
        raise StorageError(f"{path}: {telling}{hint}")
