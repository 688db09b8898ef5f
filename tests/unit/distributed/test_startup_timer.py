"""Where a start went."""

import time

from finetune.distributed import startup_timer


def test_the_parts_of_a_start_add_up(monkeypatch):
    monkeypatch.setattr(startup_timer, "_stage_seconds", {})
    monkeypatch.setattr(startup_timer, "_first_stage_began", [])

    @startup_timer.timed("sleep")
    def sleep() -> str:
        time.sleep(0.05)
        return "rested"

    assert sleep() == "rested"
    parts = startup_timer.start_up_seconds()
    assert list(parts) == ["launcher", "imports", "sleep", "engine"]
    assert 0.05 <= parts["sleep"] < 1
    assert parts["imports"] > 0 and -0.05 < parts["engine"]
