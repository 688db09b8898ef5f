"""Whether the Hugging Face hub can be reached; its clients retry for minutes before they look in their cache."""

from __future__ import annotations

import os
import socket
import sys
from urllib.parse import urlparse

TIMEOUT_SECONDS = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def use_cache_if_hub_unreachable() -> None:
    """Make the hub clients of this process use their cache alone where the hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not _is_reachable(constants.ENDPOINT):
        use_cache()


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's clients raise: no network, no such file or repository, no permission."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))


def use_cache() -> None:
    """Make the hub clients of this process use their cache alone."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries imported later
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _is_reachable(endpoint: str) -> bool:
    """Whether the endpoint accepts a connection, or a proxy stands in between."""
    if any(os.environ.get(variable) for variable in PROXIES):
        return True
    address = urlparse(endpoint)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), TIMEOUT_SECONDS):
            return True
    except (OSError, ValueError):
        return False
