"""Unit tests start no process and open no connection: what would is an error here, and belongs to another folder."""

import sys
from collections.abc import Iterator

import pytest

FORBIDDEN = {"subprocess.Popen", "socket.connect", "os.fork", "os.posix_spawn", "os.system"}
_current_test: list[str] = []


def _refuse(event: str, arguments: tuple) -> None:
    if _current_test and event in FORBIDDEN:
        raise AssertionError(f"{event} in a unit test: {_current_test[-1]}")


sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    _current_test.append(request.node.nodeid)
    yield
    _current_test.pop()
