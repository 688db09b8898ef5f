"""All ranks agree on data, code, libraries and model before the first step, or none begins."""

import time

from finetune.distributed.consistency import RankFacts, describe_mismatch
from finetune.utils.errors import ConfigError, DataError

ALIKE = {"Python": "3.12.3", "torch": "2.13.0", "the data": "f3ab" * 8, "the base model": "77aa" * 8}
NAMES = {"data_path": ["data/a.json", "data/b.json"], "model_name": "models/small"}


def compared(*others: tuple[str, dict[str, str]]):
    """What ranks say that are like `ALIKE` but for what is given."""
    return describe_mismatch([RankFacts(host, {**ALIKE, **values}) for host, values in others], **NAMES)


def test_ranks_that_bring_the_same_agree():
    assert compared(("node0", {}), ("node0", {}), ("node1", {})) is None


def test_the_odd_host_is_named_with_both_values_and_what_to_copy():
    error = compared(("node0", {}), ("node1", {}), ("node2", {"the data": "91cd" * 8}))
    assert isinstance(error, DataError) and error.status == 3
    assert str(error) == (
        "the data differs: node0, node1 have f3abf3abf3ab, node2 has 91cd91cd91cd: "
        "copy data/a.json, data/b.json from node0 to node2"
    )


def test_what_most_ranks_have_is_right_even_where_rank_0_has_not():
    error = compared(("node0", {"torch": "2.12.0"}), ("node1", {}), ("node2", {}))
    assert isinstance(error, ConfigError) and error.status == 2
    assert str(error) == (
        "torch differs: node0 has 2.12.0, node1, node2 have 2.13.0: install the torch of node1 on node0"
    )


def test_a_library_that_one_host_lacks_is_named():
    error = compared(("node0", {}), ("node1", {"peft": "0.21.2"}))
    assert str(error) == "peft differs: node0 has none, node1 has 0.21.2: install the peft of node0 on node1"


def test_several_differences_are_one_message_and_its_status_that_of_the_installation():
    other = {"the data": "91cd" * 8, "Python": "3.11.0", "the base model": "0" * 32}
    error = compared(("node0", {}), ("node1", other))
    assert error.status == 2
    lines = str(error).splitlines()
    assert lines[0] == "3 differences:" and len(lines) == 4
    assert "copy models/small from node0 to node1" in str(error)


def test_ranks_of_one_host_that_differ_are_named_by_number():
    error = compared(("node0", {}), ("node0", {"torch": "2.12.0"}))
    assert "rank 0 on node0 has 2.13.0, rank 1 on node0 has 2.12.0" in str(error)


def test_hosts_on_two_sides_of_midnight_are_told_so():
    day = "the date that the chat template writes"
    error = compared(("node0", {day: "2026-11-29"}), ("node1", {day: "2026-11-30"}))
    assert error.status == 2 and "node0 has 2026-11-29, node1 has 2026-11-30: start again" in str(error)


def test_many_hosts_are_counted():
    hosts = [(f"node{number}", {"torch": "2.12.0"} if number < 40 else {}) for number in range(100)]
    assert "node6, node7 and 32 more have 2.12.0" in str(compared(*hosts))


def test_it_takes_no_time(tiny_model):
    from finetune.models import loader

    fingerprint = loader.model_fingerprint(str(tiny_model))
    RankFacts.here(data="", model=fingerprint)
    began = time.process_time()
    for _ in range(5):
        RankFacts.here(data="", model=fingerprint)
    assert (time.process_time() - began) / 5 < 0.2  # 0.01 s on an idle machine
