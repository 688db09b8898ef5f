"""The hubs of models and data sets: ModelScope, and Hugging Face, whose clients retry for minutes without a network."""

import importlib.util
import os
import re
import socket
import sys
import tempfile
from typing import Literal
from urllib.parse import urlparse

from finetune.utils.errors import FinetuneError, first_line

MODELSCOPE, MODELSCOPE_INSTALL = "modelscope:", "pip install 'modelscope>=1.18'"
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


def modelscope_folder(given: str, what: Literal["model", "data set"], error: type[FinetuneError]) -> str:
    """Download a model or a data set `modelscope:owner/name` unless it is there already; return its local folder.

    Raises:
        FinetuneError: of the class `error`: another name, no such package, nothing to download.
    """
    name = given.removeprefix(MODELSCOPE)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise error(f"{given}: expected modelscope:owner/name")
    if importlib.util.find_spec("modelscope") is None:
        raise error(f"{given}: {what}s on ModelScope need a package that is missing: {MODELSCOPE_INSTALL}")
    from filelock import FileLock
    from modelscope.hub import errors
    from modelscope.hub.snapshot_download import dataset_snapshot_download, snapshot_download

    download = snapshot_download if what == "model" else dataset_snapshot_download
    # not every version of the package has a common base class for its errors
    own = tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
    raised: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *own)
    lock = os.path.join(tempfile.gettempdir(), f"finetune-modelscope-{os.getuid()}-{name.replace('/', '--')}.lock")
    try:
        with FileLock(lock):  # one rank of a host downloads
            return download(name)
    except raised as problem:
        raise error(
            f"{given}: the {what} cannot be loaded from ModelScope: {first_line(problem)}: check the name and the "
            "connection, or download it elsewhere and name the local copy"
        ) from None
