"""Check before the first step that all ranks have the same data, code, libraries and base model.

Ranks that differ in one of them train without an error, and train something else than the run says: each rank reads
rows by index from its own data, and gradients are averaged over different code.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.distributed import host_probe
from finetune.distributed.collectives import all_gather_object
from finetune.utils.errors import ConfigError, DataError, FinetuneError, format_faults, format_names
from finetune.utils.proc import ROOT

SHOWN_CHARACTERS = 12  # of a digest
DATA, CODE, MODEL, PYTHON = "the data", "the code of finetune", "the base model", "Python"
DAY = "the date that the chat template writes"
NONE = "none"


@dataclass(frozen=True)
class RankFacts:
    """What must be the same on all ranks, by name, and this rank's host."""

    host: str
    values: dict[str, str]

    @classmethod
    def here(cls, *, data: str, model: str, day: str | None = None) -> RankFacts:
        """Collect those of this process; `data` and `model` are fingerprints, which are expensive to compute twice.

        `day` is the date that the chat template writes, None if it writes none.
        """
        own = {
            PYTHON: platform.python_version(),
            **host_probe.versions(),
            CODE: host_probe.code_digest(ROOT / "finetune") or NONE,
            MODEL: model,
            DATA: data,
            DAY: day or NONE,
        }
        return cls(os.uname().nodename, own)


def check_rank_consistency(facts: RankFacts, *, data_path: Sequence[str], model_name: str) -> None:
    """Compare the facts of all ranks in one exchange; every rank calls this, and if it fails it fails on all.

    The error is a `DataError` if nothing but the data differs. `data_path` and `model_name` are for the remedy.
    """
    error = describe_mismatch(all_gather_object(facts), data_path=data_path, model_name=model_name)
    if error is not None:
        raise error


def describe_mismatch(facts: Sequence[RankFacts], *, data_path: Sequence[str], model_name: str) -> FinetuneError | None:
    """Return the error that names all differences, with hosts and values; None if there are none. `facts`: by rank."""
    remedies = {
        CODE: f"bring {ROOT} to the same commit on all hosts",
        MODEL: f"copy {model_name} from {{right}} to {{wrong}}",
        DATA: f"copy {', '.join(data_path)} from {{right}} to {{wrong}}",
        DAY: "start again; the hosts began on two sides of midnight (UTC), or the clock of {wrong} is wrong",
        PYTHON: "install the same Python on all hosts",
    }
    hosts = [rank.host for rank in facts]
    faults = {}
    for name in dict.fromkeys(name for rank in facts for name in rank.values):
        values = [rank.values.get(name, NONE) for rank in facts]
        if len(set(values)) > 1:
            remedy = remedies.get(name, f"install the {name} of {{right}} on {{wrong}}")
            faults[name] = _describe(name, values, hosts, remedy)
    if not faults:
        return None
    error = (DataError if set(faults) == {DATA} else ConfigError)(format_faults(list(faults.values()), "difference"))
    error.is_shared = True
    return error


def _describe(name: str, values: Sequence[str], hosts: Sequence[str], remedy: str) -> str:
    """`the data differs: node0, node1 have 0a1b, node2 has 2c3d: ...`; most ranks are right, rank 0 if even."""
    needs_ranks = len(set(zip(hosts, values, strict=True))) > len(set(hosts))  # ranks of one host differ

    def names_of(ranks: Sequence[int]) -> list[str]:
        return list(dict.fromkeys(f"rank {rank} on {hosts[rank]}" if needs_ranks else hosts[rank] for rank in ranks))

    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    right = Counter(values).most_common(1)[0][0]
    clauses = []
    for value, ranks in ranks_by_value.items():
        names = names_of(ranks)
        clauses.append(f"{format_names(names)} {'have' if len(names) > 1 else 'has'} {value[:SHOWN_CHARACTERS]}")
    wrong = [rank for rank, value in enumerate(values) if value != right]
    remedy = remedy.format(right=names_of(ranks_by_value[right])[0], wrong=format_names(names_of(wrong)))
    return f"{name} differs: {', '.join(clauses)}: {remedy}"
