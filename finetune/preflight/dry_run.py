"""The dry run: a random model of the same architecture trains two steps, is saved, resumed and loaded.

shrink    the config at small width, with its tokenizer: seconds to build, megabytes to save
train     the user's own command, two steps, a checkpoint after each
resume    the same from the first checkpoint: the second step has the same loss
load      the result is loaded for inference
"""

import contextlib
import json
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from finetune.inference.load_result import load_for_inference
from finetune.inference.run_result import read_result
from finetune.models.auto_class import auto_class
from finetune.run_dir.run_json import METRICS_FILE
from finetune.utils.errors import FinetuneError, lines_of

logger = logging.getLogger(__name__)

LAYERS, HEADS, HEAD_WIDTH = 2, 4, 16
# The names that configs use for widths, and the widths of the small model.
WIDTHS = {
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "head_dim": HEAD_WIDTH, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD_WIDTH, "qk_rope_head_dim": HEAD_WIDTH, "v_head_dim": HEAD_WIDTH, "kv_channels": HEAD_WIDTH,
}  # fmt: skip
COUNTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
          "num_experts_per_tok": 2}  # fmt: skip
STEPS = 2
TOLERANCE = 1e-5
SECONDS_FOR_A_RUN = 300


def shrink_config(config: Any, *, heads: int = HEADS) -> Any:
    """Return a config of the same architecture with two layers (one of each kind), four heads and four experts."""
    small = deepcopy(config)
    text, vision = small.get_text_config(), getattr(small, "vision_config", None)
    if vision is not None and hasattr(vision, "num_hidden_layers"):
        vision.num_hidden_layers = LAYERS
    known = text.to_dict()
    per_layer = {int(number): fields for number, fields in (known.pop("per_layer_config", None) or {}).items()}
    if per_layer:
        text.per_layer_config = None  # fields that layers have for themselves
    known |= {name: known.get(own) for name, own in text.attribute_map.items()}  # hidden_size is n_embd in GPT-2
    kinds = list(known.get("layer_types") or ())
    layers = max(LAYERS, len(set(kinds)))
    values: dict[str, Any] = {"hidden_size": heads * HEAD_WIDTH, "num_hidden_layers": layers}
    if "num_attention_heads" in known:
        key_heads = known.get("num_key_value_heads") or text.num_attention_heads
        values["num_attention_heads"] = heads
        values["num_key_value_heads"] = heads if key_heads >= text.num_attention_heads else max(1, heads // 2)
    for name, most in {**WIDTHS, **COUNTS}.items():
        if isinstance(known.get(name), int):
            values[name] = min(most, known[name])
    values["layer_types"] = [*dict.fromkeys(kinds), *kinds][:layers]
    for name, value in values.items():
        if name in known and known[name] is not None:
            setattr(text, name, value)
    if per_layer:
        chosen = [kinds.index(kind) for kind in values["layer_types"]] if kinds else list(range(layers))
        limits = {**WIDTHS, "num_key_value_heads": heads}
        text.per_layer_config = {
            number: {name: min(limits.get(name, value), value) for name, value in per_layer.get(layer, {}).items()}
            for number, layer in enumerate(chosen)
        }
    return small


def make_random_model(
    name: str, folder: Path, *, revision: str | None, trust_remote_code: bool, heads: int = HEADS
) -> int:
    """Write a random model of that architecture to `folder`, with tokenizer and code; return its parameters."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    common = {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {})}
    config = AutoConfig.from_pretrained(name, **common)
    torch.manual_seed(0)
    try:
        model = auto_class(config).from_config(
            shrink_config(config, heads=heads), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long))
    except Exception as error:  # any model's code may fail at another width, in any way
        raise FinetuneError(f"this architecture ({config.model_type}) cannot be made small: {error}") from None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name, **common).save_pretrained(folder)
    if Path(name).is_dir():
        for path in Path(name).glob("*.py"):
            shutil.copy(path, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_dry_run(command: Sequence[str], model: Path, output: Path, *, trusts_code: bool) -> dict[str, Any]:
    """Train, resume and load with the small model in `model`, a folder on every host; `command` starts the training."""
    facts: dict[str, Any] = {}
    own = [
        "--model_name_or_path", str(model), "--output_dir", str(output), "--max_steps", str(STEPS), "--save_strategy",
        "steps", "--save_steps", "1", "--save_total_limit", "0", "--save_only_model", "False", "--logging_steps", "1",
        "--report_to", "none", "--trust_remote_code", str(trusts_code),
    ]  # fmt: skip
    began = time.monotonic()
    _run([*command, *own, "--resume_from_checkpoint", "none"], "two steps, saved and verified")
    facts["train_seconds"] = time.monotonic() - began
    logger.info(f"two steps, two checkpoints, a verified result after {facts['train_seconds']:.0f} s")
    losses = _losses(output)
    began = time.monotonic()
    _run([*command, *own, "--resume_from_checkpoint", str(output / "checkpoint-1")], "resuming from a checkpoint")
    facts["resume_seconds"] = time.monotonic() - began
    again = _losses(output)
    if len(again) != STEPS or not math.isclose(losses[-1], again[-1], rel_tol=TOLERANCE):
        raise FinetuneError(f"the second step has loss {again[-1:]} when resumed, and {losses[-1]} without a stop")
    logger.info(f"resumed from the first checkpoint: the same second step after {facts['resume_seconds']:.0f} s")
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        load_for_inference(read_result(output, trust_remote_code=trusts_code))
    facts["load_seconds"] = time.monotonic() - began
    logger.info(f"the result is loaded after {facts['load_seconds']:.0f} s")
    return {**facts, "losses": losses}


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS_FOR_A_RUN)
    except subprocess.TimeoutExpired:
        raise FinetuneError(f"{what}: not done after {SECONDS_FOR_A_RUN} s") from None
    if done.returncode:
        lines = lines_of(done.stdout + done.stderr)
        errors = [line for line in lines if "error:" in line.lower()]
        raise FinetuneError(f"{what}: status {done.returncode}: {(errors or lines)[-1]}")


def _losses(output: Path) -> list[float]:
    lines = (output / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]
