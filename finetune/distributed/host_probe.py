"""Facts of a host. The text of this file is sent to the host's Python, so it uses the standard library alone.

Functions that `launcher.ssh.run_on_all_hosts` calls take and return a dictionary that JSON can hold.
"""

import errno
import fcntl
import functools
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
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers", "datasets", "flash-attn",
             "flash-attn-3", "flash-attn-4", "kernels")  # fmt: skip
WHOLE_BYTES = 64 << 20  # larger files are compared by size and samples, unless `full` is set
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
GPU_FACTS = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
SECONDS_FOR_A_PROGRAM = 8
SECONDS_BETWEEN_TRIES = 0.3
LARGE_BYTES = 32 << 10  # many full packets
LOST_LARGE_PACKETS = (
    "small packets arrive, large ones are lost: the MTU of an interface is larger than that of the way (`ip link`; "
    "`ping -M do -s 1472 HOST`)"
)
PORTS, TRIES = range(10_000, 20_000), 50  # the watchdogs' ports lie above


def collect_host_facts(order: dict) -> dict:
    """Collect the facts of this host.

    Args:
        order: `folder`, to work in; `code`, a folder that must exist; `words` of the command line, of which those that
            name files or folders get a fingerprint (over all bytes if `full` is set); `wanted`, a port that is tested,
            if any; `places`, name -> folder, for the facts of `_resource_facts`.
    """
    facts: dict = {
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
    if "places" in order:  # what decides whether a run fits; sizes in bytes, the time in seconds
        facts |= _resource_facts(order["places"])
    return facts


def _resource_facts(places: dict) -> dict:
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return {
        "time": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": {"total": int(memory["MemTotal"]) << 10, "available": int(memory["MemAvailable"]) << 10},
        "gpu_facts": gpu_facts(),
        "space": {name: disk_space(Path(folder).expanduser()) for name, folder in places.items()},
        "programs": {name: shutil.which(name) is not None for name in ("c++", "g++", "nvcc", "pdsh", "rsync", "ninja")},
        "deepspeed": Path(sys.executable).with_name("deepspeed").exists(),
    }


def disk_space(folder: Path) -> dict:
    """The nearest existing parent of `folder` (or itself), free bytes there, and whether it is writable."""
    folder = Path(os.path.abspath(folder))
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # False without permission, too
    return {"at": str(existing), "free": shutil.disk_usage(existing).free, "writable": os.access(existing, os.W_OK)}


def interfaces() -> dict:
    """Name -> addresses of every network interface that is up: its IPv4 one, and the IPv6 ones beyond the link."""
    addresses: dict = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            packed = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack("16xh", fcntl.ioctl(query, 0x8913, packed)[:18])[0]  # SIOCGIFFLAGS
                address = socket.inet_ntoa(fcntl.ioctl(query, 0x8915, packed)[20:24])  # SIOCGIFADDR
            except OSError:  # it has no address
                continue
            if flags & 1:
                addresses[name] = [address]
    with suppress(OSError):  # IPv6 is switched off
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed_address, _, _, scope, _, name = line.split()
            if scope in ("00", "10"):  # global, loopback
                text = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed_address))
                addresses.setdefault(name, []).append(text)
    return addresses


def remove(order: dict) -> dict:
    """Remove the folder `path`."""
    shutil.rmtree(order["path"], ignore_errors=True)
    return {"path": order["path"]}


def await_connections(order: dict) -> dict:
    """Listen at the rendezvous `port` until `clients` hosts have sent the `key`, or for `seconds`.

    Returns `connected`, the names of those hosts; with `error` if the port cannot be opened.
    """
    try:
        server = _listen(order["port"])
    except OSError as error:
        return {"error": os.strerror(error.errno or 0), "connected": []}
    connected: list = []
    with server:
        deadline = time.monotonic() + order["seconds"]
        while len(connected) < order["clients"] and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                client, _ = server.accept()
            except TimeoutError:
                break
            with client:
                client.settimeout(2)
                try:
                    key, _, name = client.recv(1024).decode(errors="replace").partition(" ")
                    if key == order["key"]:
                        client.sendall(key.encode())
                        left_bytes = LARGE_BYTES
                        while left_bytes and (chunk := client.recv(left_bytes)):
                            left_bytes -= len(chunk)
                        client.sendall(b"." * (not left_bytes))
                        connected.append(name)
                except OSError:  # some other program's connection
                    continue
    return {"connected": connected}


def _listen(port: int) -> socket.socket:
    """A listening socket for IPv6 and IPv4, as that of the ranks; for IPv4 alone if the host has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # which means that IPv6 is switched off
                raise
    return socket.create_server(("", port), backlog=128)


def connect(order: dict) -> dict:
    """Connect to the rendezvous at `address` and `port`, trying for `seconds`; send `key` and this host's `name`.

    Returns `seconds` of a round trip and the `interface` that leads there; or an `error`.
    """
    deadline, error = time.monotonic() + order["seconds"], "not tried"
    while time.monotonic() < deadline:
        began = time.monotonic()
        try:
            with socket.create_connection((order["address"], order["port"]), timeout=2) as connection:
                connection.sendall(f"{order['key']} {order['name']}".encode())
                if connection.recv(64).decode() != order["key"]:
                    raise OSError("another program answers there")
                own_address = connection.getsockname()[0]
                error = LOST_LARGE_PACKETS
                connection.sendall(bytes(LARGE_BYTES))
                connection.recv(1)
                error = "not tried"
        except OSError as failure:
            error = error if error == LOST_LARGE_PACKETS else failure.strerror or str(failure)
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        names = [name for name, addresses in interfaces().items() if own_address in addresses]
        return {"seconds": time.monotonic() - began, "interface": names[0] if names else None}
    return {"error": error}


@functools.cache
def versions() -> dict:
    """The versions of the installed libraries that affect a result."""
    installed = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def count_gpus() -> int:
    """The number of NVIDIA GPUs, by nvidia-smi."""
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


def has_unlisted_gpus() -> bool:
    """Whether nvidia-smi may not list all GPUs: those of AMD, and those of a container without the program."""
    return os.path.exists("/dev/kfd") or (os.path.exists("/dev/nvidiactl") and not count_gpus())


def gpu_facts() -> list:
    """Name, memory (bytes), compute capability and driver of each NVIDIA GPU; empty if nvidia-smi is too old."""
    gpus = []
    for line in _nvidia_smi(f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits"):
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(GPU_FACTS):
            name, total, used, capability, driver = values
            sizes = {"memory": _mebibytes(total), "used": _mebibytes(used)}
            gpus.append({"name": name, **sizes, "capability": capability, "driver": driver})
    return gpus


def _nvidia_smi(*words: str) -> list:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, errors="replace", timeout=SECONDS_FOR_A_PROGRAM
        )
    except subprocess.TimeoutExpired:  # a GPU hangs; the caller reports that there is none
        return []
    return done.stdout.splitlines()


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0


def free_port() -> int:
    """Find a port on which nobody listens, below the system's ephemeral ports if possible, so that no outgoing
    connection takes it before a rank does."""
    for port in random.sample(PORTS, TRIES):
        if not is_taken(port):
            return port
    with socket.socket() as trial:
        trial.bind(("", 0))
        return trial.getsockname()[1]


def is_taken(port: int) -> bool:
    """Whether the port is in use, so that no rank can listen on it."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return True
    return False


def machine() -> str:
    """An identity of the machine whatever name it was reached by: host name, boot and network namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def code_digest(folder: Path) -> str | None:
    """A digest of the Python files in a folder and of their names; None if there are none."""
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
            parts = [(file.name, file) for file in sorted(path.iterdir()) if file.is_file()][:1000]
        elif path.is_file():
            parts = [("", path)]
        else:
            return None
        digest = hashlib.sha256()
        for name, file in parts:
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            for chunk in _content(file, whole_bytes):
                digest.update(chunk)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16]


def _content(path: Path, whole_bytes: int) -> Iterator[bytes]:
    """The bytes of a file; of a large one, samples."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= whole_bytes:
            yield from iter(lambda: file.read(1 << 20), b"")
            return
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
