"""Held-out conversations: losses per row, turn and source, of the tuned model and its base."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.chat_templates.text_segments import segmenter
from finetune.config import DataArguments
from finetune.conversation import answer_numbers
from finetune.dataset.data_sources import find_sources
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.dataset.prepared_cache import example_of, int_column
from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.evaluation.significance import perplexity, ratio_interval
from finetune.evaluation.token_losses import (
    AnswerLoss,
    MeasuredModel,
    group_by_tokens,
    measure_each,
    measure_token_losses,
)
from finetune.inference.load_result import BASE, TUNED, LoadedModel, chat_format_of, load_tokenizer
from finetune.inference.run_result import RunResult
from finetune.training.data_setup import prepare_sources
from finetune.training.nonfinite import finite_or_none
from finetune.utils.errors import NumericsError

logger = logging.getLogger(__name__)

# Conversations are rendered with these arguments of the training, unless they are given.
TRAINING_ARGUMENTS = ("model_max_length", "too_long", "train_on", "repairs", "columns", "reasoning")


def prepare_held_out(result: RunResult, arguments: dict[str, Any]) -> PreparedData:
    """Read, render and check all rows as in training, except for the given fields of `DataArguments`."""
    trained = result.run.get("arguments", {})
    defaults = {name: trained[name] for name in TRAINING_ARGUMENTS if trained.get(name) is not None}
    data = DataArguments(**{**defaults, **arguments})
    sources = find_sources(data.data_path, data.columns)
    weighted = [source.name for source in sources if source.weight != 1]
    if weighted:
        logger.warning(f"the weight of {weighted[0]} is ignored: every row is measured once")
    prepared = prepare_sources(sources, chat_format_of(result, load_tokenizer(result)), data)
    check_dropped_share(prepared, data.max_dropped_rows)
    return prepared


@dataclass
class RowLosses:
    """Losses of one row of the data."""

    source: str
    row: int
    id: Any
    examples: list[int] = field(default_factory=list)  # indices of the prepared examples, the windows of the row
    tokens: dict[int, int] = field(default_factory=dict)  # supervised tokens by turn
    losses: dict[str, dict[int, float]] = field(default_factory=dict)  # sum of the losses by model and turn, in nats
    roles: dict[int, str] = field(default_factory=dict)  # by turn

    def mean(self, model: str) -> float:
        """Mean loss of all supervised tokens."""
        return sum(self.losses[model].values()) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def non_finite(self) -> list[str]:
        """Models whose loss is not finite."""
        return [model for model in self.losses if not math.isfinite(self.mean(model))]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; losses are means over tokens, null if they are not finite."""
        turns, numbers = [], answer_numbers(self.roles)
        for turn, tokens in sorted(self.tokens.items()):
            means = {model: finite_or_none(losses[turn] / tokens) for model, losses in self.losses.items()}
            turns.append({"turn": turn, "answer": numbers[turn], "tokens": tokens, **means})
        means = {model: finite_or_none(self.mean(model)) for model in self.losses}
        identity = {"source": self.source, "row": self.row, "id": self.id, "tokens": self.num_tokens}
        return {**identity, **means, "examples": self.examples, "turns": turns}


def evaluate_held_out(
    loaded: LoadedModel, prepared: PreparedData, *, tokens_per_batch: int, worst: int
) -> dict[str, Any]:
    """Measure the rows and return the content of `evaluation.json`, with the text of the `worst`, on every rank."""
    rows = measure_rows(loaded, prepared, tokens_per_batch)
    groups = summarize(rows)
    segments_of = segmenter(loaded.chat_format)

    def with_text(row: RowLosses) -> dict[str, Any]:
        examples = map(example_of, prepared.examples.with_format(None).select(row.examples))
        segments = [asdict(segment) for example in examples for segment in segments_of(example)]
        return {**row.to_json(), "segments": segments}

    return {
        "data": {
            "path": [source.name for source in prepared.sources],
            "fingerprint": prepared.fingerprint,
            "rows": len(rows),
            "tokens": sum(row.num_tokens for row in rows),
            "not_measured": prepared.summary.rows - len(rows),
            "cut": prepared.summary.cut,
            "split": prepared.summary.split,
        },
        "verdict": verdict(groups[0]),
        "groups": groups,
        "non_finite": [
            {"source": row.source, "row": row.row, "id": row.id, "models": row.non_finite}
            for row in rows
            if row.non_finite
        ],
        "worst": [with_text(row) for row in worst_rows(rows, worst)],
        "worsened": [with_text(row) for row in most_worsened(rows, worst)],
        "rows": [row.to_json() for row in rows],
    }


def measure_rows(loaded: LoadedModel, prepared: PreparedData, tokens_per_batch: int) -> list[RowLosses]:
    """Measure the models on all rows; ranks divide the work and all of them return all rows."""
    examples = prepared.examples
    lengths = int_column(examples, "length").tolist()
    groups = group_by_tokens(lengths, tokens_per_batch)[get_rank() :: get_world_size()]
    num_tokens = sum(lengths[index] for group in groups for index in group)
    plain = examples.select_columns(["input_ids", "labels", "turn_spans"]).with_format(None)

    def measure(model: MeasuredModel) -> list[AnswerLoss]:
        with model.padding_free(max(lengths)) as reason:
            if reason:
                logger.warning(f"{model.name}: conversations are measured one by one, because {reason}")
            with model.bar(num_tokens) as progress:
                losses = measure_token_losses(model, plain, groups, is_flat=reason is None, done=progress.update)
        return [loss for losses_of_rank in all_gather_object(losses) for loss in losses_of_rank]

    return collect_rows(examples, measure_each(loaded, measure))


def collect_rows(examples: Any, losses: dict[str, list[AnswerLoss]]) -> list[RowLosses]:
    """Collect the losses of examples, which are windows of rows, by row, in the order of the data."""
    columns = examples.select_columns(["source", "row", "id", "turn_spans"]).with_format(None)[:]
    rows: dict[tuple[str, int], RowLosses] = {}
    for model, answers in losses.items():
        for answer in sorted(answers, key=lambda answer: (answer.example, answer.turn)):
            key = columns["source"][answer.example], columns["row"][answer.example]
            row = rows.setdefault(key, RowLosses(*key, json.loads(columns["id"][answer.example])))
            if answer.example not in row.examples:
                row.examples.append(answer.example)
                row.roles |= {span["turn"]: span["role"] for span in columns["turn_spans"][answer.example]}
            row.tokens[answer.turn] = answer.tokens
            row.losses.setdefault(model, {})[answer.turn] = answer.loss
    return sorted(rows.values(), key=lambda row: row.examples[0])


def summarize(rows: Sequence[RowLosses]) -> list[dict[str, Any]]:
    """Compute token-mean losses of all rows, of each source if there are several, and of each answer number.

    Only rows with a finite loss under every model count, so that the models are compared on the same rows.
    """
    finite = [row for row in rows if not row.non_finite]
    if not finite:
        raise NumericsError("no row has a finite loss: check the weights and the precision")
    groups = [_group("all", "all rows", [(row, set(row.tokens)) for row in finite])]
    sources = list(dict.fromkeys(row.source for row in finite))
    if len(sources) > 1:
        for source in sources:
            groups.append(_group("source", source, [(row, set(row.tokens)) for row in finite if row.source == source]))
    answers = [(row, answer_numbers(row.roles)) for row in finite]
    numbers = sorted({of[turn] for row, of in answers for turn in row.tokens})
    if len(numbers) > 1:
        for number in numbers:
            parts = [(row, {turn for turn in row.tokens if of[turn] == number}) for row, of in answers]
            groups.append(_group("answer", f"answer {number}", [(row, turns) for row, turns in parts if turns]))
    return groups


def _group(kind: str, name: str, parts: Iterable[tuple[RowLosses, set[int]]]) -> dict[str, Any]:
    """Summarize parts: rows, and the turns of each that belong to the group."""
    parts = list(parts)
    tokens = [sum(row.tokens[turn] for turn in turns) for row, turns in parts]
    sums = {
        model: [sum(row.losses[model][turn] for turn in turns) for row, turns in parts] for model in parts[0][0].losses
    }
    group: dict[str, Any] = {"kind": kind, "name": name, "rows": len(parts), "tokens": sum(tokens)}
    for model, losses in sums.items():
        loss = sum(losses) / sum(tokens)
        group[model] = {"loss": loss, "perplexity": finite_or_none(perplexity(loss))}
    if BASE in sums:
        differences = [tuned - base for tuned, base in zip(sums[TUNED], sums[BASE], strict=True)]
        group["difference"] = {
            "loss": sum(differences) / sum(tokens),
            "interval": ratio_interval(differences, tokens),
            "rows_worse": sum(difference > 0 for difference in differences),
        }
    return group


def verdict(group: dict[str, Any]) -> str:
    """Return one sentence about the group of all rows."""
    difference = group.get("difference")
    if difference is None:
        return f"the tuned model has a loss of {group[TUNED]['loss']:.4f} per token; its base was not measured"
    if difference["interval"] is None:
        return f"the loss differs from the base by {difference['loss']:+.4f} per token; one row gives no interval"
    low, high = difference["interval"]
    values = f"{difference['loss']:+.4f} per token (95 %: {low:+.4f} to {high:+.4f})"
    if high < 0:
        return f"the tuned model is better than the base on these rows: {values}"
    if low > 0:
        return f"the tuned model is worse than the base on these rows: {values}"
    return f"no significant difference between the tuned model and the base on {group['rows']:,} rows: {values}"


def worst_rows(rows: Sequence[RowLosses], count: int) -> list[RowLosses]:
    """Return the rows with the largest loss per token under the tuned model, largest first."""
    finite = [row for row in rows if not row.non_finite]
    return sorted(finite, key=lambda row: -row.mean(TUNED))[:count]


def most_worsened(rows: Sequence[RowLosses], count: int) -> list[RowLosses]:
    """Return the rows whose loss per token exceeds that of the base most, largest difference first."""

    def difference(row: RowLosses) -> float:
        return row.mean(TUNED) - row.mean(BASE)

    worse = [row for row in rows if not row.non_finite and BASE in row.losses and difference(row) > 0]
    return sorted(worse, key=lambda row: -difference(row))[:count]
