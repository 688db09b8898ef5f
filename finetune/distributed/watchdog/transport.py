"""How watchdogs find and talk to each other: lines of JSON over TCP, on ports of their own.

The watchdog of rank 0 listens. Its port is a function of the address and port that the launcher gave all ranks, so
that nobody needs to be told. Another program may use a port: there are several candidates, and both sides show a key.
"""

import hashlib
import ipaddress
import json
import signal
import socket
from contextlib import suppress
from typing import Any

CANDIDATES = 8
FIRST_PORT, PORTS = 20_000, 9_000  # below the ports that systems hand out, beside DeepSpeed's 29500
MAX_UNSENT = 1 << 16
PRINT_STACKS = signal.SIGUSR2  # from a watchdog to its rank; `kill -USR2` does the same for a user


def candidate_ports(address: str, port: str) -> list[int]:
    """Return where the watchdog of rank 0 may listen, best first; a function of the rendezvous."""
    digests = (hashlib.sha256(f"{address} {port} {number}".encode()).digest() for number in range(CANDIDATES))
    return [FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS for digest in digests]


def listen(address: str, ports: list[int]) -> socket.socket | None:
    """Return a listening socket on the first of `ports` that is free; None if none is."""
    for port in ports:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address if is_loopback(address) else "", port))
            server.listen(1024)
        except OSError:
            server.close()
            continue
        server.setblocking(False)
        return server
    return None


def is_loopback(address: str) -> bool:
    """Return whether an address or name leads to this machine alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


class Connection:
    """A connection that sends and receives whole messages without blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.is_open = connection, True
        self._unread, self._unsent = b"", b""

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send, or keep for the next `flush`; too much unsent data closes the connection."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what was kept."""
        try:
            while self._unsent and self.is_open:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > MAX_UNSENT:
                self.close()
        except OSError:
            self.close()

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived; close a connection that ended or sends anything else."""
        has_ended = True
        try:
            while chunk := self.connection.recv(1 << 16):
                self._unread += chunk
        except OSError as error:
            has_ended = not isinstance(error, BlockingIOError)
        if has_ended:
            self.close()
        *lines, self._unread = self._unread.split(b"\n")
        try:
            return [message for message in map(json.loads, lines) if isinstance(message, dict)]
        except (ValueError, RecursionError):
            self.close()
            return []

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        self.connection.close()
