"""Which requests the pages of this machine answer: those to an own name, from pages of their own."""

import socket
from collections.abc import Collection, Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
LAST_PORT = 65_535


def is_own_request(host: str, origin: str | None, listens_on: str = LOCAL_NAMES[0]) -> bool:
    """Whether a request is to a name of this server (no DNS rebinding) and not from a page of another site.

    Args:
        host: The header `Host`.
        origin: The header `Origin`; None: there is none, as for what a user types.
        listens_on: Address or name that the server listens on.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return _is_own_name(name, listens_on) and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:
        return False


def port_faults(port: int, *, least: int = 0) -> Iterator[str]:
    """Yield a fault where a number is no port to listen on; 0 lets the system choose one."""
    if not least <= port <= LAST_PORT:
        yield f"--port {port}: expected {least} to {LAST_PORT}"


def _is_own_name(name: str, listens_on: str) -> bool:
    own: Collection[str] = (*LOCAL_NAMES, listens_on.lower())
    if listens_on not in ANY_ADDRESS:
        return name in own
    try:
        return bool(ip_address(name))  # of this machine, else the request were not here
    except ValueError:
        return name in (*own, socket.gethostname().lower(), socket.getfqdn().lower())
