"""Signals that ask a rank to stop: which is the first, which a second wish."""

import os
import signal
import time

import pytest

from finetune.distributed import stop_requests


@pytest.fixture
def rank(monkeypatch):
    """A rank between two steps; it notes that it ends instead of ending."""
    former = {number: signal.getsignal(number) for number in stop_requests.SIGNALS}
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop_requests.reset()
    stop_requests.install_signal_handlers()
    stop_requests.watch_stop_file(None)
    yield ended
    stop_requests.reset()
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signals", "ended"),
    [
        ("SIGINT", []),
        ("SIGINT SIGTERM", []),  # Ctrl-C under deepspeed: the terminal's, and its launcher's
        ("SIGINT SIGTERM SIGTERM", [128 + 15]),
        ("SIGINT SIGINT", [128 + 2]),
        ("SIGTERM SIGTERM", [128 + 15]),
        ("SIGTERM SIGINT", [128 + 2]),
    ],
)
def test_the_launchers_signal_after_ctrl_c_is_the_same_wish(rank, signals, ended, capfd):
    for name in signals.split():
        os.kill(os.getpid(), signal.Signals[name])
    assert stop_requests.stop_requested() and rank == ended
    assert stop_requests.was_interrupted() == ("SIGINT" in signals)
    assert not stop_requests.was_interrupted()


def test_a_signal_that_the_launcher_passes_on_is_not_named_as_another(rank, monkeypatch, capfd):
    """Who presses Ctrl-C under `finetune train` has not sent the SIGUSR1 that the ranks get."""
    monkeypatch.setenv("RANK", "3")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop_requests.stop_reason() == "SIGUSR1 on rank 3"
    monkeypatch.setenv("FINETUNE_LAUNCH_DIR", "/tmp")
    assert stop_requests.stop_reason() == stop_requests.PASSED_ON
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "SIGUSR1" not in capfd.readouterr().err.splitlines()[-1]


def test_a_signal_within_a_destructor_ends_the_rank_behind_it(rank, monkeypatch, capfd):
    monkeypatch.setattr(stop_requests._request, "can_save", False)

    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        Interrupted()
        time.sleep(5)
    assert ended.value.code == stop_requests.EXIT_STOPPED and "Traceback" not in capfd.readouterr().err
