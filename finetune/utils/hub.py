"""The hubs of models and data sets: ModelScope, and Hugging Face, whose clients retry for minutes without a network."""

import importlib.util
import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from finetune.utils.errors import ConfigError, FinetuneError, first_line, near_paths

MODELSCOPE, MODELSCOPE_INSTALL = "modelscope:", "pip install 'modelscope>=1.18'"
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
FILES_OF_ADAPTERS = ["adapter_*", "*token*", "*.jinja", "vocab.*", "merges.txt", "*.model", "run.json"]
TIMEOUT_SECONDS = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def use_cache_if_hub_unreachable() -> None:
    """Make the hub clients of this process use their cache alone where the hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not _is_reachable(constants.ENDPOINT):
        use_cache()


def hub_file(repo: str, name: str, revision: str | None = None) -> Path:
    """Return a small file of a model on the hub, from the cache or downloaded.

    Raises:
        ConfigError: no such model, revision or file; no access; no network, and not in the cache.
    """
    use_cache_if_hub_unreachable()
    from huggingface_hub import constants, errors, hf_hub_download

    flag, hub = f"--model_name_or_path {repo}", constants.ENDPOINT
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except errors.HFValidationError as error:
        reason = f"no such folder, and no name of a model: {first_line(error)}"
    except errors.LocalEntryNotFoundError:
        reason = (
            f"no such folder, not in the cache {constants.HF_HUB_CACHE}, and {hub} did not answer"
            f"{near_paths(Path(repo).expanduser()) or ':'} give the folder of a model, check the network and "
            "HTTPS_PROXY, or set HF_ENDPOINT to the https:// address of a mirror"
        )
    except errors.GatedRepoError:
        reason = f"ask for access at {hub}/{repo}, then run `hf auth login`, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"--model_revision {revision}: {hub}/{repo} has no such branch, tag or commit: see its page"
    except errors.EntryNotFoundError:
        reason = f"{hub}/{repo} holds no {name}: give a model that transformers loads"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder, and no such model at {hub}, or a private one: check the name, or run `hf auth login`"
    except hub_errors() as error:
        reason = f"{hub}: {first_line(error)}: try again later, or give the folder of a model"
    raise ConfigError(f"{flag}: {reason}")


def adapter_on_hub(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of an adapter `owner/name`, from the cache or downloaded; None of all else."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) or Path(repo).exists():
        return None
    from huggingface_hub import constants, file_exists, snapshot_download, try_to_load_from_cache

    files = (MODEL_CONFIG, ADAPTER_CONFIG)
    try:
        config, adapter = (try_to_load_from_cache(repo, name, revision=revision) for name in files)
        if not isinstance(adapter, str):
            if isinstance(config, str):
                return None
            use_cache_if_hub_unreachable()
            if constants.HF_HUB_OFFLINE or not file_exists(repo, ADAPTER_CONFIG, revision=revision):
                return None
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES_OF_ADAPTERS))
    except hub_errors():
        return None  # the loader reports the name


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's clients raise: no network, no such file, repository or name, no permission."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return OSError, HFValidationError, *(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))


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


def check_modelscope(given: str, what: str, error: type[FinetuneError]) -> str:
    """Return `owner/name` of `modelscope:owner/name`, or raise `error`: another name, or the package is missing."""
    name = given.removeprefix(MODELSCOPE)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise error(f"{given}: expected modelscope:owner/name")
    if importlib.util.find_spec("modelscope") is None:
        raise error(f"{given}: {what}s on ModelScope need a package that is missing: {MODELSCOPE_INSTALL}")
    return name


def modelscope_folder(given: str, what: Literal["model", "data set"], error: type[FinetuneError]) -> str:
    """Download a model or a data set `modelscope:owner/name` unless it is there already; return its local folder.

    Raises:
        FinetuneError: of the class `error`: another name, no such package, nothing to download.
    """
    name = check_modelscope(given, what, error)
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
