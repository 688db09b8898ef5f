"""`finetune merge`: a result becomes a plain model that anything loads: one folder, nothing of ours needed.

finetune merge output                       # an adapter into its base, or a full model, to output/merged
finetune merge output/checkpoint-200 model  # a checkpoint of any ZeRO stage and any number of ranks
finetune merge output --gguf q8_0           # and as a file of llama.cpp's beside it
"""

from __future__ import annotations

import time
from pathlib import Path

from finetune.checkpoint import step_of
from finetune.inference.run_result import read_result
from finetune.utils.console import quiet_libraries, say, say_note
from finetune.utils.errors import ConfigError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(
    output: str,
    target: str | None,
    *,
    base_model: str | None,
    dtype: str | None,
    max_shard_size: str,
    gguf: str | None,
    check: bool,
) -> None:
    """Merge, prove, say what came of it.

    Raises:
        ConfigError: what cannot be merged, a target that holds something, a type or size that is none.
        CheckpointError: files that are not whole, another base, an adapter of another size.
        StorageError: the disk is too small, or refused.
    """
    began = time.monotonic()
    result = read_result(Path(output))
    folder = Path(target) if target else default_target(Path(output))
    shard_bytes = bytes_of(max_shard_size)
    if dtype not in (None, "bf16", "fp16", "float32"):
        raise ConfigError(f"--dtype {dtype}: expected bf16, fp16 or float32")
    from finetune.export import check_gguf, merge_weights, plan_merge, write_gguf  # needs torch; --help does not

    quiet_libraries()
    plan = plan_merge(result, folder, base_name=base_model, dtype=dtype)
    if gguf is not None:
        check_gguf(plan.source, gguf, plan.tokenizer)
    say(f"merging {plan.origin}: {len(plan.pieces):,} tensors, {plan.size / 1e9:.2f} GB")
    merged = merge_weights(plan, shard_bytes=shard_bytes, proves=check)
    for note in merged.notes:
        say_note(note)
    say(f"{folder}: {merged.size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s; {merged.checked}")
    if gguf is not None:
        path = write_gguf(folder, gguf, stop_token_id=result.chat["stop_token_id"])
        say(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


def default_target(output: Path) -> Path:
    """Beside what is merged: output/merged, or output/merged-200 for output/checkpoint-200."""
    step = step_of(output.absolute())
    return output / "merged" if step is None else output.parent / f"merged-{step}"


def bytes_of(size: str) -> int:
    """A size like 5GB.

    Raises:
        ConfigError: it is none.
    """
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--max_shard_size {size}: expected a size like 5GB or 500MB")
    return int(number) * UNITS[unit]
