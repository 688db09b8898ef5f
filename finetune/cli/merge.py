"""`finetune merge`: write a result as a plain model that any library loads.

finetune merge output                       # an adapter into its base, or a full model, to output/merged
finetune merge output/checkpoint-200 model  # a checkpoint of any ZeRO stage and any number of ranks
finetune merge output --gguf q8_0           # and as a file of llama.cpp's beside it
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from finetune.checkpoint import step_of, verify_checkpoint
from finetune.config.arguments import VERIFY_KEY_HELP
from finetune.inference.run_result import TRUST_HELP, read_result
from finetune.run_dir.output_dir_lock import check_writable
from finetune.utils.console import configure_logging, quiet_libraries
from finetune.utils.errors import CheckpointError, ConfigError, raise_faults
from finetune.utils.options import CommandParser, fill, option, positional

logger = logging.getLogger(__name__)

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class MergeOptions:
    """Merge an adapter into its base, or a ZeRO checkpoint into a plain model, on the CPU, shard by shard."""

    output: str = positional("OUTPUT", "the output_dir of a run, or a checkpoint in it")
    target: str | None = positional("DIR", "where the model goes; default: OUTPUT/merged", None)
    base_model: str | None = option(None, "where the base model is now; default: where it was")
    dtype: Literal["bf16", "fp16", "float32"] | None = option(None, "default: the precision of the training")
    max_shard_size: str = option("5GB", "size of a file; about the memory that is needed")
    gguf: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = option(
        None, "also write a GGUF file of this type, and a Modelfile"
    )
    trust_remote_code: bool = option(False, TRUST_HELP)
    verify_key: str | None = option(None, VERIFY_KEY_HELP)
    no_check: bool = option(False, "do not load the result and compare its logits")


build_parser = partial(CommandParser, "finetune merge", "OUTPUT [DIR] [--dtype TYPE] [--gguf TYPE] ...", MergeOptions)


def main(argv: Sequence[str]) -> None:
    """Merge, check the result, and print what was written."""
    began = time.monotonic()
    options = fill(MergeOptions, build_parser().parse(argv))
    configure_logging()
    result = read_result(
        Path(options.output), trust_remote_code=options.trust_remote_code, verify_key=options.verify_key
    )
    output, step = Path(options.output), step_of(Path(options.output).absolute())
    default = output / "merged" if step is None else output.parent / f"merged-{step}"
    folder = Path(options.target) if options.target else default
    shard_bytes = bytes_of(options.max_shard_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not replaced: choose another folder, or remove it")
    check_writable(folder, str(folder))
    if step is not None:
        raise_faults(verify_checkpoint(result.folder), CheckpointError)
    if result.adapter is not None:
        result.base_path(options.base_model)
    from finetune.export.gguf_writer import check_gguf, write_gguf  # they need torch; --help does not
    from finetune.export.model_merge import merge_weights, plan_merge
    from finetune.export.modelfile import write_modelfile

    quiet_libraries()
    plan = plan_merge(result, folder, base_name=options.base_model, dtype=options.dtype)
    if options.gguf is not None:
        check_gguf(plan.source, plan.tokenizer)
    logger.info(f"merging {plan.origin}: {len(plan.tensors):,} tensors, {plan.size / 1e9:.2f} GB")
    merged = merge_weights(plan, shard_bytes=shard_bytes, verify=not options.no_check)
    for note in merged.notes:
        logger.warning(note)
    logger.info(f"{folder}: {merged.size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s; {merged.checked}")
    if options.gguf is not None:
        path = write_gguf(folder, options.gguf, stop_token_id=result.chat["stop_token_id"])
        modelfile = write_modelfile(path, result.chat.get("template_kwargs"))
        logger.info(f"{path}: {path.stat().st_size / 1e9:.2f} GB; for Ollama: ollama create NAME -f {modelfile}")


def bytes_of(size: str) -> int:
    """Parse a size like 5GB."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--max_shard_size {size}: expected a size like 5GB or 500MB")
    return int(number) * UNITS[unit]
