"""A resolved DeepSpeed config -> the fields of a `RunSpec` that it decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUTO = "auto"


def from_deepspeed(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a `RunSpec` that a resolved DeepSpeed config decides; None: a run without DeepSpeed.

    An absent key has DeepSpeed's own default (runtime/zero/config.py), "auto" is filled by transformers.
    """
    if config is None:
        return {"stage": None}
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)

    def number(key: str, default: int) -> int | None:
        value = zero.get(key, default)
        return None if value == AUTO else int(value)

    places = {name: (zero.get(key) or {}) for name, key in _OFFLOADED.items()}
    fields: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket": number("reduce_bucket_size", 500_000_000),
        "overlap_comm": bool(zero.get("overlap_comm", False)) and stage in (1, 2),
        "sequence_parallel": int(config.get("sequence_parallel_size", 1)),
        **{name: place.get("device", "none") for name, place in places.items()},
    }
    if stage == 3:
        fields |= {
            "prefetch_bucket": number("stage3_prefetch_bucket_size", 50_000_000),
            "persistence_threshold": number("stage3_param_persistence_threshold", 100_000),
            "max_live": number("stage3_max_reuse_distance", 1_000_000_000),
            "sub_group": number("sub_group_size", 1_000_000_000),
            "max_in_cpu": int(places["offload_parameters"].get("max_in_cpu", 1_000_000_000)),
            "hpz": int(zero.get("zero_hpz_partition_size", 1)),
        }
    return fields


_OFFLOADED = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
