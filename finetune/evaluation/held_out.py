"""Held-out conversations: the loss of each row, turn and source, of the trained model and of its base."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.chat_templates import Example, TurnSpan
from finetune.chat_templates.text_segments import segmenter
from finetune.conversation import answer_number
from finetune.dataset.prepare import PreparedData
from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.evaluation.significance import perplexity, ratio_interval
from finetune.evaluation.token_losses import AnswerLoss, flat_rows, groups_of, measure_token_losses
from finetune.inference.load_result import BASE, TUNED, LoadedModel
from finetune.training.nonfinite import finite_or_none
from finetune.utils.errors import NumericsError

logger = logging.getLogger(__name__)


@dataclass
class RowLosses:
    """One row of the data: tokens of each answer, and what each model loses on it, summed."""

    source: str
    row: int
    id: Any
    examples: list[int] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)  # by turn
    losses: dict[str, dict[int, float]] = field(default_factory=dict)  # by model and turn

    def total(self, model: str) -> float:
        """The loss of all learned tokens, summed."""
        return sum(self.losses[model].values())

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def non_finite(self) -> list[str]:
        """The models whose loss is no number."""
        return [model for model in self.losses if not math.isfinite(self.total(model))]

    def facts(self) -> dict[str, Any]:
        """As JSON values; losses are means over tokens, null where they are not finite."""
        turns = []
        for turn in sorted(self.tokens):
            means = {model: finite_or_none(losses[turn] / self.tokens[turn]) for model, losses in self.losses.items()}
            turns.append({"turn": turn, "answer": answer_number(turn), "tokens": self.tokens[turn], **means})
        means = {model: finite_or_none(self.total(model) / self.num_tokens) for model in self.losses}
        place = {"source": self.source, "row": self.row, "id": self.id, "tokens": self.num_tokens}
        return {**place, **means, "examples": self.examples, "turns": turns}


def evaluate_held_out(
    opened: LoadedModel,
    prepared: PreparedData,
    *,
    with_base: bool,
    tokens_per_batch: int,
    worst: int,
    bar: Callable[[str, int], Any],
) -> dict[str, Any]:
    """The document of `evaluation.json`, on every rank.

    Raises:
        ConfigError: the base is not there any more. CheckpointError: it is another model.
        NumericsError: no row has a finite loss.
    """
    rows = losses_of(opened, prepared, with_base=with_base, tokens_per_batch=tokens_per_batch, bar=bar)
    groups = summarized(rows)
    summary = prepared.summary
    in_segments = segmenter(opened.chat_format)

    def shown(row: RowLosses) -> dict[str, Any]:
        found = [example_at(prepared, number) for number in row.examples]
        pieces = [asdict(one) for example in found for one in in_segments(example)]
        return {**row.facts(), "segments": pieces}

    lost = [row for row in rows if row.non_finite]
    return {
        "result": str(opened.result.folder),
        "base": opened.base_name or opened.result.base["name"],
        "data": {
            "path": [source.name for source in prepared.sources],
            "fingerprint": prepared.fingerprint,
            "rows": len(rows),
            "tokens": sum(row.num_tokens for row in rows),
            "not_measured": summary.rows - len(rows),
            "cut": summary.cut,
            "split": summary.split,
        },
        "verdict": verdict(groups[0]),
        "groups": groups,
        "non_finite": [{"source": row.source, "row": row.row, "id": row.id, "models": row.non_finite} for row in lost],
        "worst": [shown(row) for row in worst_rows(rows, worst)],
        "worsened": [shown(row) for row in most_worsened(rows, worst)],
        "rows": [row.facts() for row in rows],
    }


def example_at(prepared: PreparedData, number: int) -> Example:
    """One prepared example."""
    one = prepared.examples.with_format(None)[number]
    spans = tuple(TurnSpan(**span) for span in one["turn_spans"])
    return Example(one["input_ids"], one["labels"], one["row"], one["source"], one["window"], spans)


def losses_of(
    opened: LoadedModel,
    prepared: PreparedData,
    *,
    with_base: bool,
    tokens_per_batch: int,
    bar: Callable[[str, int], Any],
) -> list[RowLosses]:
    """Measure both models on all rows, divided among the ranks; every rank gets everything.

    Args:
        bar: (label, tokens) -> a context manager with `update(tokens)`.
    """
    from finetune.dataset.collator import pad_token_id
    from finetune.dataset.dataloader import int_column

    examples = prepared.examples
    lengths = int_column(examples, "length").tolist()
    groups = groups_of(lengths, tokens_per_batch)[get_rank() :: get_world_size()]
    tokens = sum(lengths[number] for group in groups for number in group)
    plain = examples.select_columns(["input_ids", "labels", "turn_spans"]).with_format(None)

    def run(model: Any, label: str) -> list[AnswerLoss]:
        virtual = label == TUNED and opened.result.has_virtual_tokens
        with flat_rows(model, longest=max(lengths), has_virtual_tokens=virtual) as reason:
            if reason:
                logger.warning(f"{label}: conversations are measured one by one: {reason}")
            with bar(label, tokens) as progress:
                return measure_token_losses(
                    model,
                    plain,
                    groups,
                    pad_token_id=pad_token_id(opened.tokenizer),
                    is_flat=reason is None,
                    has_virtual_tokens=virtual,
                    done=progress.update,
                )

    found = {}
    if with_base:
        with opened.base() as base:
            found[BASE] = run(base, BASE)
    found[TUNED] = run(opened.tuned, TUNED)
    return rows_of(examples, {model: _of_all_ranks(losses) for model, losses in found.items()})


def _of_all_ranks(losses: list[AnswerLoss]) -> list[AnswerLoss]:
    everything = [one for part in all_gather_object(losses) for one in part]
    return sorted(everything, key=lambda one: (one.example, one.turn))


def rows_of(examples: Any, losses: dict[str, Sequence[AnswerLoss]]) -> list[RowLosses]:
    """The losses of examples gathered by the row of the data that they are windows of, in the order of the data."""
    described = examples.select_columns(["source", "row", "id"]).with_format(None)[:]
    rows: dict[tuple[str, int], RowLosses] = {}
    for model, answers in losses.items():
        for one in answers:
            place = described["source"][one.example], described["row"][one.example]
            row = rows.setdefault(place, RowLosses(*place, json.loads(described["id"][one.example])))
            if one.example not in row.examples:
                row.examples.append(one.example)
            row.tokens[one.turn] = one.tokens
            row.losses.setdefault(model, {})[one.turn] = one.loss
    return sorted(rows.values(), key=lambda one: one.examples[0])


def summarized(rows: Sequence[RowLosses]) -> list[dict[str, Any]]:
    """Token-mean losses of all rows, of each source where there are several, and of each answer's place.

    Only rows that are finite under every model count, so that both models are asked the same.

    Raises:
        NumericsError: there is none.
    """
    counted = [row for row in rows if not row.non_finite]
    if not counted:
        raise NumericsError("no row has a finite loss: the weights or the precision are broken")
    groups = [_group("all", "all rows", [(row, set(row.tokens)) for row in counted])]
    sources = list(dict.fromkeys(row.source for row in counted))
    if len(sources) > 1:
        for source in sources:
            groups.append(_group("source", source, [(row, set(row.tokens)) for row in counted if row.source == source]))
    numbers = sorted({answer_number(turn) for row in counted for turn in row.tokens})
    if len(numbers) > 1:
        for number in numbers:
            chosen = [(row, {turn for turn in row.tokens if answer_number(turn) == number}) for row in counted]
            groups.append(_group("answer", f"answer {number}", [(row, turns) for row, turns in chosen if turns]))
    return groups


def _group(kind: str, name: str, parts: Iterable[tuple[RowLosses, set[int]]]) -> dict[str, Any]:
    """Parts are rows, and those of their turns that belong to the group."""
    parts = list(parts)
    tokens = [sum(row.tokens[turn] for turn in turns) for row, turns in parts]
    sums = {
        model: [sum(row.losses[model][turn] for turn in turns) for row, turns in parts] for model in parts[0][0].losses
    }
    found: dict[str, Any] = {"kind": kind, "name": name, "rows": len(parts), "tokens": sum(tokens)}
    for model, losses in sums.items():
        loss = sum(losses) / sum(tokens)
        found[model] = {"loss": loss, "perplexity": finite_or_none(perplexity(loss))}
    if BASE in sums:
        apart = [tuned - base for tuned, base in zip(sums[TUNED], sums[BASE], strict=True)]
        interval = ratio_interval(apart, tokens)
        found["difference"] = {
            "loss": sum(apart) / sum(tokens),
            "interval": None if interval is None else list(interval),
            "rows_worse": sum(one > 0 for one in apart),
        }
    return found


def verdict(whole: dict[str, Any]) -> str:
    """One sentence about the group of all rows."""
    apart = whole.get("difference")
    if apart is None:
        return f"the tuned model loses {whole[TUNED]['loss']:.4f} per token; its base was not measured"
    size, interval = apart["loss"], apart["interval"]
    if interval is None:
        return f"the tuned model loses {size:+.4f} per token against the base; one row says nothing about others"
    low, high = interval
    spread = f"{size:+.4f} per token (95 %: {low:+.4f} to {high:+.4f})"
    if high < 0:
        return f"the tuned model is better than the base on these rows: {spread}"
    if low > 0:
        return f"the tuned model is worse than the base on these rows: {spread}"
    return f"the tuned model cannot be told from the base on {whole['rows']:,} rows: {spread}"


def worst_rows(rows: Sequence[RowLosses], count: int) -> list[RowLosses]:
    """Those with the largest loss per token under the tuned model, the largest first."""
    counted = [row for row in rows if not row.non_finite]
    return sorted(counted, key=lambda row: -row.total(TUNED) / row.num_tokens)[:count]


def most_worsened(rows: Sequence[RowLosses], count: int) -> list[RowLosses]:
    """Those on which the tuned model loses most per token against the base, the largest difference first."""
    counted = [row for row in rows if not row.non_finite and BASE in row.losses]

    def apart(row: RowLosses) -> float:
        return (row.total(TUNED) - row.total(BASE)) / row.num_tokens

    return [row for row in sorted(counted, key=lambda row: -apart(row))[:count] if apart(row) > 0]
