"""The report of a run in progress: written again whenever its files change, and served to this host alone.

The page asks `now` for what has changed, a few kilobytes, so that zoom and scroll position stay. It shows rows of the
data, so only requests to this host under its own name are answered; from elsewhere, forward the port with ssh.
"""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.diagnostics import FAILURE_FILE
from finetune.report.report_page import render_report, render_state, write_report
from finetune.report.run_reader import RunRecord, has_ended, read_run
from finetune.report.sample_answers import ANSWERS_FILE
from finetune.run_dir import output_dir_lock, run_json
from finetune.utils.errors import ConfigError
from finetune.utils.web_requests import is_own_request

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
WATCHED = (run_json.RUN_FILE, run_json.METRICS_FILE, run_json.COMPLETE_FILE, FAILURE_FILE, ANSWERS_FILE)
SECONDS_FOR_LAST_REQUESTS = 2.0
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
Folders = Sequence[tuple[Path, str]]


class Snapshot:
    """The runs at one moment: the whole page, and the part that changes, each rendered when it is asked for."""

    def __init__(self, runs: Sequence[RunRecord], *, every: float, ended: bool) -> None:
        self.runs, self.every, self.ended = runs, every, ended

    @cached_property
    def page(self) -> bytes:
        """The whole page, compressed."""
        return gzip.compress(render_report(self.runs, every=self.every).encode("utf-8", "backslashreplace"))

    @cached_property
    def now(self) -> bytes:
        """Parts and numbers as JSON, compressed."""
        parts, numbers = render_state(self.runs)
        state = {"parts": parts, "numbers": numbers, "ended": self.ended}
        return gzip.compress(json.dumps(state, allow_nan=False).encode())


class _Handler(BaseHTTPRequestHandler):
    """GET of `/` and `/now`, nothing else."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, snapshot = urlsplit(self.path).path, self.server.snapshot
        if not is_own_request(self.headers.get("Host", ""), self.headers.get("Origin")):
            self._answer(403)
        elif path == "/":
            self._answer(200, snapshot.page, "text/html; charset=utf-8")
        elif path == "/now":
            self._answer(200, snapshot.now, "application/json")
        else:
            self._answer(404)

    def _answer(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        own = {"Content-Type": kind, "Content-Length": str(len(content))}
        own |= {"Content-Encoding": "gzip"} if content else {}
        for name, value in (HEADERS | own).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    snapshot: Snapshot

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that closes the connection early."""


def watch(folders: Folders, path: Path, *, every: float, port: int) -> None:
    """Keep the report in `path` up to date, and serve it, until the runs have ended.

    Args:
        folders: output folders, and the names of their runs; one that holds no run yet is waited for.
        every: seconds between two looks at the files.
        port: on this host; 0: any that is free.
    """
    missing = [folder for folder, _ in folders if not (folder / run_json.RUN_FILE).is_file()]
    if missing:
        logger.info(f"{missing[0]}: holds no run yet: waiting for it")
    while not all((folder / run_json.RUN_FILE).is_file() for folder, _ in folders):
        time.sleep(min(every, 1.0))
    if _have_ended(folders):
        _write(folders, path, every, ended=True)
    else:
        with _serving(port) as server:
            server.snapshot = _write(folders, path, every)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            own = server.server_port
            logger.info(f"{path} is updated every {every:g} s; Ctrl-C stops this")
            logger.info(
                f"on this host: http://{HOST}:{own}; from elsewhere the same after ssh -L {own}:{HOST}:{own} THIS_HOST"
            )
            before = _state_of(folders)
            while not server.snapshot.ended:
                time.sleep(every)
                ended, state = _have_ended(folders), _state_of(folders)
                if ended or state != before:
                    before = state
                    server.snapshot = _write(folders, path, every, ended=ended)
            time.sleep(every + SECONDS_FOR_LAST_REQUESTS)  # open pages ask once more
            server.shutdown()
    logger.info(f"{path}: the run has ended")


def _serving(port: int) -> _Server:
    try:
        return _Server((HOST, port), _Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--port {port}: {reason}: name another, or 0 for any that is free") from None


def _have_ended(folders: Folders) -> bool:
    return all(has_ended(folder) for folder, _ in folders)


def _state_of(folders: Folders) -> list[Any]:
    """Return what differs after a change: whether the runs are active, time and size of their files."""
    state: list[Any] = [output_dir_lock.is_locked(folder) for folder, _ in folders]
    for path in (folder / name for folder, _ in folders for name in WATCHED):
        try:
            status = path.stat()
            state.append((status.st_mtime_ns, status.st_size))
        except OSError:
            state.append(None)
    return state


def _write(folders: Folders, path: Path, every: float, *, ended: bool = False) -> Snapshot:
    runs = [read_run(folder, name) for folder, name in folders]
    write_report(runs, path)
    return Snapshot(runs, every=every, ended=ended)
