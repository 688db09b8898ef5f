"""How guards find and talk to each other: lines of JSON over TCP, on ports of their own.

The guard of rank 0 listens; where, follows from the address and port that the launcher gave all ranks, so that nobody
needs to be told. A port may be taken by anything else: there are several candidates, and both sides show a key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import signal
import socket
from contextlib import suppress
from typing import Any

CANDIDATES = 8
FIRST_PORT, PORTS = 20_000, 9_000  # below the ports that systems hand out, beside DeepSpeed's 29500
MOST_UNSENT = 1 << 16
PRINT_STACKS = signal.SIGUSR2  # from a guard to its rank; `kill -USR2` does the same for anyone


def candidate_ports(address: str, port: str) -> list[int]:
    """Where the guard of rank 0 may listen, best first; a function of where the ranks meet."""
    digests = (hashlib.sha256(f"{address} {port} {number}".encode()).digest() for number in range(CANDIDATES))
    return [FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS for digest in digests]


def listen(address: str, ports: list[int]) -> socket.socket | None:
    """A listening socket on the first of `ports` that is free; None where none is."""
    for port in ports:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address if is_loopback(address) else "", port))
            listening.listen(1024)
        except OSError:
            listening.close()
            continue
        listening.setblocking(False)
        return listening
    return None


def is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


class Connection:
    """One connection: whole messages in, whole messages out, never waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.is_open = connection, True
        self._unread, self._unsent = b"", b""

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send, or keep for the next `flush`; what a dead peer leaves unsent closes the connection."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left."""
        try:
            while self._unsent and self.is_open:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > MOST_UNSENT:
                self.close()
        except OSError:
            self.close()

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived; a connection that ended, or talks nonsense, is closed."""
        self._read()
        *lines, self._unread = self._unread.split(b"\n")
        try:
            return [message for message in map(json.loads, lines) if isinstance(message, dict)]
        except (ValueError, RecursionError):
            self.close()
            return []

    def _read(self) -> None:
        """All that is there; closes where nothing more can come."""
        is_over = True
        try:
            while chunk := self.connection.recv(1 << 16):
                self._unread += chunk
        except OSError as error:
            is_over = not isinstance(error, BlockingIOError)
        if is_over:
            self.close()

    def close(self) -> None:
        """End the connection."""
        self.is_open = False
        self.connection.close()
