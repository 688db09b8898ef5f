"""What a host has, told by itself: this file's text is sent to its Python, so it uses the standard library alone."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers", "datasets", "flash-attn")
WHOLE_BYTES = 64 << 20  # larger files are compared by their size and by samples, unless all bytes are asked for
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
GPU_FACTS = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
SECONDS_FOR_A_PROGRAM = 8
SECONDS_BETWEEN_TRIES = 0.3
PORTS, TRIES = range(10_000, 20_000), 50  # guards meet above them


def collect_host_facts(order: dict) -> dict:
    """Facts of this host.

    `order` names the `folder` to work in, the `code` that must be there, and `words` of the command line: those that
    are files or folders here come back with a fingerprint, over all their bytes where `full` is set. It is said whether
    the port that is `wanted`, if any, is taken. With `places`, name -> folder, a host is examined more closely: what
    `_closely` returns is added.
    """
    facts = {
        "name": socket.gethostname(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "gpus": count_gpus(),
        "port": free_port(),
        "wanted_is_taken": bool(order.get("wanted")) and is_taken(order["wanted"]),
        "interfaces": interfaces(),
        "route": os.environ.get("SSH_CONNECTION", "").split()[::2],
        "folder": os.path.isdir(order["folder"]),
        "code": code_digest(Path(order["code"])),
        "files": {},
    }
    if facts["folder"]:
        os.chdir(order["folder"])
        whole_bytes = sys.maxsize if order.get("full") else WHOLE_BYTES
        for word in order["words"]:
            fingerprint = _fingerprint(Path(word).expanduser(), whole_bytes)
            if fingerprint:
                facts["files"][word] = fingerprint
    if "places" in order:
        facts.update(_closely(order))
    return facts


def _closely(order: dict) -> dict:
    """What decides whether a run fits on a host and can meet the others; sizes in bytes, the time in seconds.

    `places` of the order become the free space of the file system that each would be written to.
    """
    return {
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "gpu_facts": gpu_facts(),
        "space": {name: disk_space(Path(folder).expanduser()) for name, folder in order["places"].items()},
        "programs": {name: shutil.which(name) is not None for name in ("c++", "g++", "nvcc", "pdsh", "rsync", "ninja")},
        "deepspeed": Path(sys.executable).with_name("deepspeed").exists(),
        "locks": locks(Path(order["extensions"])),
    }


def _memory() -> dict:
    """Of the machine: `total` and what could be had now."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return {"total": int(found["MemTotal"]) << 10, "available": int(found["MemAvailable"]) << 10}


def disk_space(folder: Path) -> dict:
    """Where `folder` is or would be made: its nearest parent that exists, free bytes there, whether one may write."""
    folder = Path(os.path.abspath(folder))
    there = next(one for one in (folder, *folder.parents) if os.path.exists(one))  # False, too, where none may look
    return {"at": str(there), "free": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK)}


def interfaces() -> dict:
    """Name -> IPv4 address of every network interface that has one and is up."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            packed = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack("16xh", fcntl.ioctl(asking, 0x8913, packed)[:18])[0]  # SIOCGIFFLAGS
                address = socket.inet_ntoa(fcntl.ioctl(asking, 0x8915, packed)[20:24])  # SIOCGIFADDR
            except OSError:  # it has none
                continue
            if flags & 1:
                found[name] = address
    return found


def locks(folder: Path) -> list:
    """Files that make torch wait for a build of an operator: (path, age in seconds)."""
    found = []
    for path in folder.glob("**/lock"):
        with suppress(FileNotFoundError):  # the build is done
            found.append((str(path), time.time() - path.stat().st_mtime))
    return found


def remove(order: dict) -> dict:
    """Remove the folder `path`, which was made for a trial."""
    shutil.rmtree(order["path"], ignore_errors=True)
    return {"path": order["path"]}


def await_greetings(order: dict) -> dict:
    """Stand where ranks would meet, until `guests` have come or `seconds` are over: who came, by name.

    `port`, and a `key` that guests must know.
    """
    try:
        door = _door(order["port"])
    except OSError as error:
        return {"error": os.strerror(error.errno), "came": []}
    with door:
        came, deadline = [], time.monotonic() + order["seconds"]
        while len(came) < order["guests"] and (left := deadline - time.monotonic()) > 0:
            door.settimeout(left)
            try:
                guest, _ = door.accept()
            except TimeoutError:
                break
            with guest:
                guest.settimeout(2)
                try:
                    key, _, name = guest.recv(1024).decode(errors="replace").partition(" ")
                    if key == order["key"]:
                        guest.sendall(key.encode())
                        came.append(name)
                except OSError:  # somebody else's knock
                    continue
    return {"came": came}


def _door(port: int) -> socket.socket:
    """A listening socket for both kinds of addresses, as the ranks' own is; for IPv4 alone where there is no other."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # that one: IPv6 is switched off
                raise
    return socket.create_server(("", port), backlog=128)


def greet(order: dict) -> dict:
    """Come to where ranks would meet: `address`, `port`, `key`, own `name`; tries for `seconds`.

    Returns seconds of a round trip and the interface that leads there, or an `error`.
    """
    deadline, error = time.monotonic() + order["seconds"], "no try"
    while time.monotonic() < deadline:
        began = time.monotonic()
        try:
            with socket.create_connection((order["address"], order["port"]), timeout=2) as door:
                door.sendall(f"{order['key']} {order['name']}".encode())
                if door.recv(64).decode() != order["key"]:
                    raise OSError("somebody else answers there")
                mine = door.getsockname()[0]
        except OSError as failure:
            error = failure.strerror or str(failure)
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        names = [name for name, address in interfaces().items() if address == mine]
        return {"seconds": time.monotonic() - began, "interface": names[0] if names else None}
    return {"error": error}


def versions() -> dict:
    """Of every library that shapes a result; what is not installed is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def count_gpus() -> int:
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


def gpu_facts() -> list:
    """Name, memory (bytes), compute capability and driver of each NVIDIA GPU; none where its tool is too old to say."""
    found = []
    for line in _nvidia_smi(f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits"):
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(GPU_FACTS):
            name, total, used, capability, driver = values
            sizes = {"memory": _mebibytes(total), "used": _mebibytes(used)}
            found.append({"name": name, **sizes, "capability": capability, "driver": driver})
    return found


def _nvidia_smi(*words: str) -> list:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=SECONDS_FOR_A_PROGRAM)
    except subprocess.TimeoutExpired:  # a GPU that hangs; the caller says that none was found
        return []
    return done.stdout.splitlines()


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0


def free_port() -> int:
    """A port that nobody listens on; mostly below those that a system hands to connections of its own, one of which
    could have it before a rank does."""
    for port in random.sample(PORTS, TRIES):
        if not is_taken(port):
            return port
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


def _fingerprint(path: Path, whole_bytes: int) -> str | None:
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
            _add_content(digest, one, whole_bytes)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16]


def _add_content(digest: hashlib._Hash, path: Path, whole_bytes: int) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= whole_bytes:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
