"""Before the first step all ranks agree: the same data, the same code, the same libraries, the same base model.

A run whose ranks differ in one of them goes on without a word, and learns something else than it says: each rank draws
its rows by number from data of its own, and a weight is the mean of what different code has computed.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.distributed import host_probe
from finetune.distributed.collectives import all_gather_object
from finetune.utils.errors import ConfigError, DataError, FinetuneError, format_faults
from finetune.utils.proc import ROOT

SHOWN_CHARACTERS, SHOWN_NAMES = 12, 4
DATA, CODE, MODEL, PYTHON = "the data", "the code of finetune", "the base model", "Python"
NONE = "none"


@dataclass(frozen=True)
class RankFacts:
    """What one rank brings: its host, and by name what all must have alike."""

    host: str
    values: dict[str, str]

    @classmethod
    def here(cls, *, data: str, model: str) -> RankFacts:
        """Those of this process; `data` and `model` are fingerprints, which are not cheap to take twice."""
        own = {
            PYTHON: platform.python_version(),
            **host_probe.versions(),
            CODE: host_probe.code_digest(ROOT / "finetune") or NONE,
            MODEL: model,
            DATA: data,
        }
        return cls(os.uname().nodename, own)


def check_rank_consistency(facts: RankFacts, *, data_path: Sequence[str], model_name: str) -> None:
    """Compare what all ranks bring; all ranks call it, and where it fails it fails on all. One exchange.

    Args:
        data_path, model_name: as the user gave them, for the remedy.

    Raises:
        DataError: the data differs, and nothing else does.
        ConfigError: something else differs.
    """
    error = describe_mismatch(all_gather_object(facts), data_path=data_path, model_name=model_name)
    if error is not None:
        raise error


def describe_mismatch(facts: Sequence[RankFacts], *, data_path: Sequence[str], model_name: str) -> FinetuneError | None:
    """The error that names everything in which the ranks differ, with hosts and values; None where they agree.

    Args:
        facts: by rank.
    """
    remedies = {
        CODE: f"bring {ROOT} to the same commit on all hosts",
        MODEL: f"copy {model_name} from {{right}} to {{wrong}}",
        DATA: f"copy {', '.join(data_path)} from {{right}} to {{wrong}}",
        PYTHON: "install the same Python on all hosts",
    }
    faults = {}
    for name in dict.fromkeys(name for one in facts for name in one.values):
        values = [one.values.get(name, NONE) for one in facts]
        if len(set(values)) > 1:
            remedy = remedies.get(name, f"install the {name} of {{right}} on {{wrong}}")
            faults[name] = _fault(name, values, [one.host for one in facts], remedy)
    if not faults:
        return None
    error = (DataError if set(faults) == {DATA} else ConfigError)(format_faults(list(faults.values()), "difference"))
    error.is_shared = True
    return error


def _fault(name: str, values: Sequence[str], hosts: Sequence[str], remedy: str) -> str:
    """`the data differs: node0, node1 have 0a1b, node2 has 2c3d: ...`; right is what most ranks have, then rank 0."""
    holders = {value: [rank for rank, one in enumerate(values) if one == value] for value in dict.fromkeys(values)}
    by_rank = len({(host, value) for host, value in zip(hosts, values, strict=True)}) > len(set(hosts))

    def named(ranks: Sequence[int]) -> list[str]:
        return list(dict.fromkeys(f"rank {rank} on {hosts[rank]}" if by_rank else hosts[rank] for rank in ranks))

    right = Counter(values).most_common(1)[0][0]
    said = []
    for value, ranks in holders.items():
        names = named(ranks)
        said.append(f"{_few(names)} {'have' if len(names) > 1 else 'has'} {_shown(value)}")
    wrong = [rank for rank, value in enumerate(values) if value != right]
    remedy = remedy.format(right=named(holders[right])[0], wrong=_few(named(wrong)))
    return f"{name} differs: {', '.join(said)}: {remedy}"


def _shown(value: str) -> str:
    """A version whole, of a digest enough to tell it."""
    return value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS]


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
