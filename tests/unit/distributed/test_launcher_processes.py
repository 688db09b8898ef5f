"""Whether a rank still has the launcher that started it."""

import pytest

from finetune.distributed import launcher_processes
from finetune.utils.proc import was_adopted


class _Ended(BaseException):
    pass


@pytest.mark.parametrize(
    ("mark", "launcher", "words", "ends"),
    [
        ("CROSS_SIZE", 1, ["/sbin/init"], True),
        ("TORCHELASTIC_RUN_ID", 1, ["/sbin/init"], True),
        ("CROSS_SIZE", 77, [], True),  # it is dying: its memory is gone, its children are not adopted yet
        ("CROSS_SIZE", 77, ["sh", "wrapper.sh"], False),
        ("RANK", 1, ["/sbin/init"], False),  # started in the background, by a shell that has ended since
    ],
)
def test_a_rank_whose_launcher_is_gone_at_its_start_ends(monkeypatch, mark, launcher, words, ends):
    def end(status: int) -> None:
        raise _Ended

    monkeypatch.setenv(mark, "1")
    monkeypatch.setattr(launcher_processes.os, "getppid", lambda: launcher)
    monkeypatch.setattr(launcher_processes.os, "_exit", end)
    monkeypatch.setattr(launcher_processes, "command_of", lambda pid: words)
    monkeypatch.setattr(launcher_processes, "was_adopted", lambda pid: False)
    if ends:
        with pytest.raises(_Ended):
            launcher_processes._watch_launcher()
    else:
        assert launcher_processes._watch_launcher() is None


def test_a_process_of_another_session_than_its_parent_was_adopted(monkeypatch):
    sessions = {10: ["S", "1", "10", "10"], 11: ["S", "10", "10", "10"], 12: ["S", "1", "10", "10"]}
    sessions |= {1: ["S", "0", "0", "0"], 13: ["S", "10", "13", "13"]}
    monkeypatch.setattr("finetune.utils.proc.stat_of", sessions.get)
    assert [was_adopted(pid) for pid in (10, 11, 12, 13)] == [False, False, True, False]
