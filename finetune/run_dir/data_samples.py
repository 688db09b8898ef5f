"""Rows of a run's data as the model reads them; a few are kept in the output folder as `samples.json`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.chat_templates import Example, RenderedConversation, TurnSpan
from finetune.chat_templates.text_segments import Segment, Segmenter
from finetune.utils.atomic_io import replace_text
from finetune.utils.errors import storage_errors
from finetune.utils.user_files import UNREADABLE, from_json

SAMPLES_FILE = "samples.json"
MAX_CHARACTERS = 6_000  # of a row that is kept


@dataclass(frozen=True)
class TurnSample:
    """One turn of an example, or what a template writes between two (`role` is None there)."""

    role: str | None
    pieces: Sequence[Segment]
    note: str = ""

    @property
    def facts(self) -> list[str]:
        """What it is besides its role: reasoning, calls, and whether it is supervised."""
        supervised = any(segment.is_supervised for segment in self.pieces)
        return [*filter(None, [self.note]), "supervised" if supervised else "context"]

    @property
    def text(self) -> str:
        """The turn without control tokens."""
        return "".join(segment.text for segment in self.pieces if not segment.is_control)


@dataclass(frozen=True)
class RowSample:
    """One row of the data."""

    source: str
    row: int
    id: str | None
    status: str  # kept, cut, split or dropped
    tokens: int  # of all examples of the row
    supervised: int  # of these tokens
    reason: str | None
    examples: Sequence[Sequence[TurnSample]]  # none where the row was dropped
    unshown: int = 0  # characters at the end that are left out
    prompt: Sequence[int] = ()  # the ids in front of the first model turn, if that is supervised


def sample_of(rendering: RenderedConversation, in_segments: Segmenter) -> RowSample:
    """Return a rendered row as text, with `in_segments` for its tokens."""
    is_text = rendering.id is None or isinstance(rendering.id, str)
    return RowSample(
        source=rendering.source,
        row=rendering.row,
        id=rendering.id if is_text else json.dumps(rendering.id, ensure_ascii=False),  # as the file spells it
        status=rendering.status,
        tokens=sum(len(example.input_ids) for example in rendering.examples),
        supervised=sum(example.num_supervised for example in rendering.examples),
        reason=reason_of(rendering) or None,
        examples=[_turns(example, in_segments(example)) for example in rendering.examples],
        prompt=_prompt(rendering.examples[0]) if rendering.examples else (),
    )


def _prompt(example: Example) -> list[int]:
    start = next((span.start for span in example.turn_spans if span.role == "model"), 0)
    return example.input_ids[:start] if example.labels[start] == example.input_ids[start] else []


def _turns(example: Example, segments: Sequence[Segment]) -> list[TurnSample]:
    """Return the turns of an example, and what the template writes between them."""
    spans: dict[int | None, TurnSpan] = {span.turn: span for span in example.turn_spans}
    runs = ((spans.get(turn), list(run)) for turn, run in groupby(segments, lambda segment: segment.turn))
    return [TurnSample(span.role, run, span.note) if span else TurnSample(None, run) for span, run in runs]


def reason_of(rendering: RenderedConversation) -> str:
    """Return the reason without the source and row in front of it."""
    return without_place(rendering.reason, rendering.source, rendering.row)


def without_place(reason: str | None, source: str, row: int) -> str:
    """Return a reason without the source and row in front of it."""
    place = f"{source}, row {row}"
    return (reason or "").replace(f"{place}: ", "").replace(f"{place}, ", "")


def write_samples(folder: Path, renderings: Iterable[RenderedConversation], in_segments: Segmenter) -> None:
    """Keep these rows in an output folder, a long one up to its first characters."""
    samples = [asdict(_shortened(sample_of(rendering, in_segments))) for rendering in renderings]
    path = folder / SAMPLES_FILE
    with storage_errors(path):
        if samples:
            replace_text(path, json.dumps(samples, ensure_ascii=False, indent=1) + "\n")
        else:
            path.unlink(missing_ok=True)


def read_samples(folder: Path) -> list[RowSample]:
    """Return the rows that were kept; none where the file is missing or broken."""
    try:
        return [_from_json(values) for values in json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))]
    except UNREADABLE:
        return []


def _shortened(sample: RowSample) -> RowSample:
    left, unshown = MAX_CHARACTERS, 0
    examples = []
    for example in sample.examples:
        turns = []
        for turn in example:
            pieces = []
            for segment in turn.pieces:
                text = segment.text[: max(left, 0)]
                unshown += len(segment.text) - len(text)
                left -= len(segment.text)
                if text:
                    pieces.append(replace(segment, text=text))
            if pieces:
                turns.append(replace(turn, pieces=pieces))
        if turns:
            examples.append(turns)
    return replace(sample, examples=examples, unshown=unshown, prompt=() if unshown else sample.prompt)


def _from_json(values: dict[str, Any]) -> RowSample:
    def turn_of(turn: dict[str, Any]) -> TurnSample:
        pieces = [from_json(Segment, {"turn": None, **piece}, "a piece:") for piece in turn["pieces"]]
        return TurnSample(None if turn["role"] is None else str(turn["role"]), pieces, str(turn.get("note", "")))

    return RowSample(
        source=str(values["source"]),
        row=int(values["row"]),
        id=None if values["id"] is None else str(values["id"]),
        status=str(values["status"]),
        tokens=int(values["tokens"]),
        supervised=int(values["supervised"] if "supervised" in values else values["learned"]),  # 0.1: "learned"
        reason=None if values["reason"] is None else str(values["reason"]),
        examples=[[turn_of(turn) for turn in example] for example in values["examples"]],
        unshown=int(values.get("unshown", 0)),
        prompt=[int(token) for token in values.get("prompt", ())],
    )
