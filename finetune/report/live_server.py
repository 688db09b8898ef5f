"""A run in progress, watched: its report is written anew whenever its files change, and served on this host alone.

The page asks `now` for what has changed, a few kilobytes, so that a zoom and the place on the page stay. Only this
host may ask, under its own name, for rows of the data stand on the page: from elsewhere, ssh carries the port over.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune import diagnostics
from finetune.report.curves import drawn
from finetune.report.report_file import write_report
from finetune.report.report_page import render_parts, render_report
from finetune.report.run_reader import RunRecord, has_ended, read_run
from finetune.report.sample_answers import ANSWERS_FILE as ANSWERS_FILE
from finetune.run_dir import output_dir_lock, run_json
from finetune.utils.errors import ConfigError

HOST, NAMES = "127.0.0.1", ("127.0.0.1", "localhost")
WATCHED = (run_json.RUN_FILE, run_json.METRICS_FILE, run_json.COMPLETE_FILE, diagnostics.FAILURE_FILE, ANSWERS_FILE)
SECONDS_FOR_LAST_LOOKS = 2.0


class Shown:
    """What the page shows at one moment: all of it, and the part that changes; made when it is asked for."""

    def __init__(self, runs: Sequence[RunRecord], *, every: float, ended: bool) -> None:
        self.runs, self.every, self.ended = runs, every, ended

    @cached_property
    def page(self) -> bytes:
        """The whole page, compressed."""
        html = render_report(self.runs, every=self.every, served=True)
        return gzip.compress(html.encode("utf-8", "backslashreplace"), 6, mtime=0)

    @cached_property
    def now(self) -> bytes:
        """The parts and numbers as JSON, compressed."""
        news = {"parts": render_parts(self.runs), "numbers": drawn(self.runs), "ended": self.ended}
        return gzip.compress(json.dumps(news, allow_nan=False).encode(), 6, mtime=0)

    @cached_property
    def tag(self) -> str:
        """A name for this state of `now`."""
        return f'"{hashlib.blake2b(self.now, digest_size=12).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `/` and `/now`; nothing else is there."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, shown = urlsplit(self.path).path, self.server.shown
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in NAMES:  # a page elsewhere whose name was made to point here
            self._answer(403, b"", "text/plain")
        elif path == "/now":
            if self.headers.get("If-None-Match") == shown.tag:
                self._answer(304, b"", "application/json")
            else:
                self._answer(200, shown.now, "application/json", tag=shown.tag)
        elif path == "/":
            self._answer(200, shown.page, "text/html; charset=utf-8")
        else:
            self._answer(404, b"", "text/plain")

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, kind: str, *, tag: str | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "ETag": tag,
            "Content-Encoding": "gzip" if content else None,
        }
        for name, value in headers.items():
            if value is not None and not (status == 304 and name.startswith("Content")):
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Who looks is not news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    shown: Shown

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone in the middle of an answer."""


def watch(
    folders: Sequence[tuple[Path, str]], path: Path, *, every: float, port: int, say: Callable[[str], None]
) -> None:
    """Keep the report in `path` up to date, and serve it, until the runs have ended.

    Args:
        folders: output folders, and how their runs are called; one that holds no run yet is waited for.
        every: seconds between two looks.
        port: on this host; 0: any that is free.

    Raises:
        ConfigError: the port is taken, or a folder's run.json cannot be read.
        StorageError: the report cannot be written.
    """
    missing = [folder for folder, _ in folders if not (folder / run_json.RUN_FILE).is_file()]
    if missing:
        say(f"{missing[0]}: holds no run yet: waiting for it")
    while not all((folder / run_json.RUN_FILE).is_file() for folder, _ in folders):
        time.sleep(min(every, 1.0))
    if _have_ended(folders):
        _write(folders, path, every=None)
        say(f"{path}: the run has ended")
        return
    with _serving(port) as server:
        server.shown = _write(folders, path, every=every)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = server.server_port
        say(f"{path} is kept up to date, every {every:g} s; Ctrl-C ends this")
        say(f"on this host: http://{HOST}:{own}; from elsewhere the same, behind ssh -L {own}:{HOST}:{own} THIS_HOST")
        _follow(folders, path, server, every)
        time.sleep(every + SECONDS_FOR_LAST_LOOKS)  # open pages come once more
        server.shutdown()
    say(f"{path}: the run has ended")


def _serving(port: int) -> _Server:
    try:
        return _Server((HOST, port), _Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port}: {getattr(error, 'strerror', None) or error}: name another, or 0 for any that is free"
        ) from None


def _follow(folders: Sequence[tuple[Path, str]], path: Path, server: _Server, every: float) -> None:
    """Until the runs have ended; then the report is written as it stays."""
    seen = _state_of(folders)
    while True:
        time.sleep(every)
        ended = _have_ended(folders)
        state = _state_of(folders)
        if ended or state != seen:
            seen = state
            server.shown = _write(folders, path, every=None if ended else every)
        if ended:
            return


def _have_ended(folders: Sequence[tuple[Path, str]]) -> bool:
    return all(has_ended(folder) for folder, _ in folders)


def _state_of(folders: Sequence[tuple[Path, str]]) -> list[Any]:
    """What changes when there is news."""
    state: list[Any] = []
    for folder, _ in folders:
        state.append(output_dir_lock.is_locked(folder))
        for name in WATCHED:
            try:
                found = (folder / name).stat()
                state.append((found.st_mtime_ns, found.st_size))
            except OSError:
                state.append(None)
    return state


def _write(folders: Sequence[tuple[Path, str]], path: Path, *, every: float | None) -> Shown:
    runs = [read_run(folder, name) for folder, name in folders]
    write_report(runs, path, every=every)
    return Shown(runs, every=every or 1.0, ended=every is None)
