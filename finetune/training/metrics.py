"""Rates of training steps, `metrics.jsonl`, and the loss curve of the terminal.

`metrics.jsonl` is standard JSON, one line per logged step; a value that is not finite is written as null.
"""

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune.models.model_config import attention_widths, experts_of
from finetune.models.module_kinds import ROUTED_EXPERTS, ModuleKinds, full_shape, output_embeddings
from finetune.training.nonfinite import finite_or_none
from finetune.utils.atomic_io import append_json_lines, write_text_atomically

FIELDS = (
    "step", "epoch", "loss", "grad_norm", "non_finite_steps", "learning_rate", "step_seconds", "tokens_per_second",
    "supervised_tokens_per_second", "mfu", "peak_memory_bytes", "peak_reserved_bytes", "loss_by_source", "loss_by_turn",
    "eval_loss", "eval_tokens", "eval_non_finite_batches", "eval_seconds", "eval_loss_by_source", "eval_loss_by_turn",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFlops:
    """Floating point operations of training, forward and backward; recomputing activations is not counted.

    A weight costs 2 operations a token forwards, 2 for the gradient of what came in and 2 for its own: 6, or 4 where
    it is frozen. A query and a key that it sees cost 4 x width forwards and twice that backwards, in each layer.
    (Kaplan et al., Scaling laws for neural language models, 2020, section 2.1.)
    """

    per_token: float  # of all weights but the head's
    per_logit: float  # of the head, a position
    per_pair: float  # of attention

    def of(self, *, tokens: int, logits: int, pairs: int) -> float:
        """Return the operations of so many tokens, positions with logits, and pairs of query and key."""
        return self.per_token * tokens + self.per_logit * logits + self.per_pair * pairs


def model_flops(model: Any, kinds: ModuleKinds) -> ModelFlops:
    """Count the operations of a model from its parameters; right with adapters and under ZeRO-3.

    Only the experts that a token is routed to count.
    """
    experts, chosen = experts_of(model.config)
    active_share = chosen / max(experts, 1)
    embedding, head = model.get_input_embeddings(), output_embeddings(model)
    embedding_ids = {id(weight) for weight in embedding.parameters()} if embedding is not None else set()
    head_ids = {id(weight) for weight in head.parameters()} if head is not None else set()
    per_token = per_logit = 0.0
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if len(shape) < 2:
            continue
        cost = (6 if parameter.requires_grad else 4) * math.prod(shape)
        if id(parameter) in head_ids:
            per_logit += cost
        elif id(parameter) not in embedding_ids:
            per_token += cost * (active_share if experts and kinds.of(name) == ROUTED_EXPERTS else 1)
    return ModelFlops(per_token, per_logit, 12.0 * sum(attention_widths(model.config)))


@dataclass
class StepMeter:
    """Count the tokens of all ranks and the time since it was made, on the host, without a device sync."""

    tokens: int = 0
    supervised_tokens: int = 0
    flops: float = 0.0
    steps: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, tokens: int, supervised_tokens: int, flops: float) -> None:
        """Add one optimizer step of all ranks, padding not counted."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.flops += flops
        self.steps += 1

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """Return seconds per step, tokens per second, and the used share of `peak_flops` (per second, all ranks)."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rates = {
            "step_seconds": round(seconds / max(self.steps, 1), 4),
            "tokens_per_second": round(self.tokens / seconds, 2),
            "supervised_tokens_per_second": round(self.supervised_tokens / seconds, 2),
        }
        return rates | ({"mfu": round(self.flops / seconds / peak_flops, 4)} if peak_flops else {})


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this rank: allocated and reserved on its GPU, or on a CPU its largest resident set."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": reserved}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def append_metrics(path: Path, logs: Mapping[str, Any]) -> None:
    """Append one line with the fields of `FIELDS` that were logged."""
    append_json_lines(path, [{name: finite_or_none(logs[name]) for name in FIELDS if name in logs}])


def cut_metrics(path: Path, step: int) -> None:
    """Remove the lines after `step` and an unfinished one: a run that resumes there writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            logged = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if logged <= step:
            kept.append(line + "\n")
    write_text_atomically(path, "".join(kept))


def loss_curve(steps: Sequence[int], losses: Sequence[float], width: int, height: int = 12) -> str:
    """Draw the loss over the steps with characters; empty with fewer than two points."""
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    import plotext

    plotext.clear_figure()
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.plot([step for step, _ in points], [loss for _, loss in points], marker="braille")
    first, last = points[0][0], points[-1][0]
    plotext.xticks(sorted({round(first + part * (last - first) / 4) for part in range(5)}))
    plotext.title("loss by step")
    drawing = plotext.uncolorize(plotext.build()).rstrip()
    plotext.clear_figure()
    return drawing
