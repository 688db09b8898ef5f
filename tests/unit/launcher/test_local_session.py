"""Stopping the processes of a run on this host."""

import pytest

from finetune.launcher.local_session import LocalSession


@pytest.mark.parametrize(("ended", "kills"), [([], 1), (["rank-0.json"], 0)])
def test_a_run_without_ranks_is_killed_only_if_none_has_ended(ended, kills, tmp_path, monkeypatch):
    """A command whose ranks have ended well is about to end by itself, with its own status."""
    session = LocalSession.__new__(LocalSession)
    session.folder, killed = tmp_path, []
    for name in ended:
        (tmp_path / name).write_text('{"status": 0}')
    monkeypatch.setattr(session, "_pids", lambda: [], raising=False)
    monkeypatch.setattr(session, "kill", lambda: killed.append(1), raising=False)

    session.ask_to_stop()

    assert session.was_asked_to_stop and len(killed) == kills
