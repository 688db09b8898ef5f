"""What a host has, told by itself: this file's text is sent to its Python, so it uses the standard library alone."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers", "datasets", "flash-attn")
WHOLE_BYTES = 64 << 20  # larger files are compared by their size and by samples
SAMPLES, SAMPLE_BYTES = 64, 64 << 10


def probe(order: dict) -> dict:
    """Facts of this host.

    `order` names the `folder` to work in, the `code` that must be there, `words` of the command line (those that are
    files or folders here come back with a fingerprint), and the port that is `wanted`, if any.
    """
    facts = {
        "name": socket.gethostname(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "gpus": _gpus(),
        "port": free_port(),
        "wanted_is_taken": bool(order.get("wanted")) and is_taken(order["wanted"]),
        "route": os.environ.get("SSH_CONNECTION", "").split()[::2],
        "folder": os.path.isdir(order["folder"]),
        "code": code_digest(Path(order["code"])),
        "files": {},
    }
    if facts["folder"]:
        os.chdir(order["folder"])
        for word in order["words"]:
            fingerprint = _fingerprint(Path(word).expanduser())
            if fingerprint:
                facts["files"][word] = fingerprint
    return facts


def versions() -> dict:
    """Of every library that shapes a result; what is not installed is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=8)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("", 0))
        return probing.getsockname()[1]


def is_taken(port: int) -> bool:
    """Whether somebody listens there, so that a rank cannot."""
    with socket.socket() as probing:
        probing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probing.bind(("", port))
        except OSError:
            return True
    return False


def machine() -> str:
    """The same for two names of one machine, and for nothing else: name, boot, and what tells containers apart."""
    found = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", _line_of), ("/proc/self/ns/net", os.readlink)):
        try:
            found.append(read(path))
        except OSError:
            continue
    return " ".join(found)


def _line_of(path: str) -> str:
    return Path(path).read_text().strip()


def code_digest(folder: Path) -> str | None:
    """Of the Python files in a folder, and of their names; None where there are none."""
    files = sorted(folder.rglob("*.py"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(path: Path) -> str | None:
    try:
        if path.is_dir():
            parts = [(one.name, one) for one in sorted(path.iterdir()) if one.is_file()][:1000]
        elif path.is_file():
            parts = [("", path)]
        else:
            return None
        digest = hashlib.sha256()
        for name, one in parts:
            digest.update(f"{name} {one.stat().st_size}\n".encode())
            _add_content(digest, one)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16]


def _add_content(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
