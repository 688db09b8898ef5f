"""Files on object stores and other remote file systems (`s3://`, `gs://`, `hf://`): fetched once through fsspec."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from finetune.utils.errors import DataError, first_line
from finetune.utils.proc import cache_folder

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def fetch(url: str) -> list[tuple[str, str]]:
    """(URL, local copy) of the file, of the files in the folder, or of those that match the glob, sorted.

    A copy is kept in the cache under the version of the file that the store names, and fetched again when that changes.

    Raises:
        DataError: the store cannot be reached or read, its package is missing, or there is no such file.
    """
    import fsspec

    check_address(url)
    try:
        store, path = fsspec.core.url_to_fs(url)
        paths = store.glob(path) if any(sign in path for sign in "*?[") else [path]
        if paths == [path] and store.isdir(path):
            paths = store.ls(path, detail=False)
        files = [file for file in sorted(paths) if store.isfile(file)]
        copies = [(store.unstrip_protocol(file), _copy(store, file)) for file in files]
    # Each store raises errors of its own: those of its client for credentials, names and connections.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{url}: cannot be fetched ({reason}): check the name, the credentials, the network") from error
    if not copies:
        raise DataError(f"{url}: there is no such file")
    return copies


def check_address(url: str) -> None:
    """Check the kind of an address, without the network.

    Raises:
        DataError: the page of a data set; no file system is known for this kind of address, or its package is missing.
    """
    from fsspec.registry import get_filesystem_class

    if page := re.fullmatch(r"https?://[^/]+/datasets/(\w[\w.-]*/\w[\w.-]*)/?", url):
        raise DataError(f"{url}: is the page of a data set: write its name, {page[1]}")
    scheme = url.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ValueError:
        raise DataError(f"{url}: {scheme}:// is no known kind of address, as https:// or s3:// is") from None
    except ImportError as error:
        package = PACKAGES.get(scheme)
        remedy = f": pip install {package}" if package else ""
        raise DataError(f"{url}: {scheme}:// needs a package that is missing{remedy} ({first_line(error)})") from None


def _copy(store: Any, file: str) -> str:
    version = f"{store.unstrip_protocol(file)} {store.ukey(file)}"
    folder = cache_folder("files") / hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    copy = folder / Path(file).name
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        try:
            store.get_file(file, part)
            os.replace(part, copy)
        finally:
            Path(part).unlink(missing_ok=True)
    return str(copy)
