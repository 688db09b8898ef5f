"""Rows as the cards of a page; a few of them are drawn for each run and kept in its output_dir, as `samples.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.chat_templates import Example, RenderedConversation
from finetune.chat_templates.text_segments import InSegments, Segment
from finetune.report.pages.row_cards import RowCard, TurnCard
from finetune.utils.atomic_io import write_bytes_atomically
from finetune.utils.errors import StorageError

FILE = "samples.json"
MOST_CHARACTERS = 6_000  # of a card that is kept


def card_of(rendering: RenderedConversation, in_segments: InSegments) -> RowCard:
    """A rendered row as a card."""
    tokens, learned = counts(rendering)
    return RowCard(
        source=rendering.source,
        row=rendering.row,
        id=None if rendering.id is None else id_of(rendering),
        status=rendering.status,
        tokens=tokens,
        learned=learned,
        reason=reason_of(rendering) or None,
        examples=[_turns(example, in_segments(example)) for example in rendering.examples],
    )


def _turns(example: Example, found: Sequence[Segment]) -> list[TurnCard]:
    roles: dict[int | None, str] = {span.turn: span.role for span in example.turn_spans}
    return [TurnCard(roles.get(turn), list(run)) for turn, run in groupby(found, lambda one: one.turn)]


def counts(rendering: RenderedConversation) -> tuple[int, int]:
    """Tokens, and those that are learned."""
    tokens = sum(len(example.input_ids) for example in rendering.examples)
    return tokens, sum(example.num_supervised for example in rendering.examples)


def reason_of(rendering: RenderedConversation) -> str:
    """The reason without the place, which stands beside it."""
    place = f"{rendering.source}, row {rendering.row}"
    return (rendering.reason or "").replace(f"{place}: ", "").replace(f"{place}, ", "")


def id_of(rendering: RenderedConversation) -> str:
    """The id as the file spells it; text without its quotes."""
    return rendering.id if isinstance(rendering.id, str) else json.dumps(rendering.id, ensure_ascii=False)


# ---- kept with a run


def write_samples(folder: Path, renderings: Iterable[RenderedConversation], in_segments: InSegments) -> None:
    """Keep these rows in an output_dir; of a long one the first characters.

    Raises:
        StorageError: the disk refused.
    """
    cards = [_shortened(card_of(one, in_segments)) for one in renderings]
    path = folder / FILE
    try:
        if not cards:
            path.unlink(missing_ok=True)
            return
        write_bytes_atomically(
            path, json.dumps([_as_json(card) for card in cards], ensure_ascii=False, indent=1) + "\n"
        )
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def read_samples(folder: Path) -> list[RowCard]:
    """The rows that were kept; none where there is no such file, or it is not whole."""
    try:
        return [_from_json(one) for one in json.loads((folder / FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def sample_row(turn: TurnCard) -> str:
    """The words of a turn, without control tokens."""
    return "".join(piece.text for piece in turn.pieces if not piece.kind.endswith("control"))


def _shortened(card: RowCard) -> RowCard:
    room, unshown, examples = MOST_CHARACTERS, 0, []
    for example in card.examples:
        turns = []
        for turn in example:
            pieces = []
            for piece in turn.pieces:
                kept = piece.text[: max(room, 0)]
                unshown += len(piece.text) - len(kept)
                room -= len(piece.text)
                if kept:
                    pieces.append(Segment(piece.kind, kept, None, piece.read))
            if pieces:
                turns.append(TurnCard(turn.role, pieces))
        if turns:
            examples.append(turns)
    return RowCard(**{**vars(card), "examples": examples, "unshown": unshown}) if unshown else card


def _as_json(card: RowCard) -> dict[str, Any]:
    examples = [
        [
            {"role": turn.role, "pieces": [{"kind": p.kind, "text": p.text, "read": p.read} for p in turn.pieces]}
            for turn in example
        ]
        for example in card.examples
    ]
    return {**asdict(RowCard(**{**vars(card), "examples": []})), "examples": examples}


def _from_json(values: dict[str, Any]) -> RowCard:
    examples = [
        [
            TurnCard(turn["role"], [Segment(p["kind"], str(p["text"]), None, bool(p["read"])) for p in turn["pieces"]])
            for turn in example
        ]
        for example in values["examples"]
    ]
    return RowCard(
        source=str(values["source"]),
        row=int(values["row"]),
        id=None if values["id"] is None else str(values["id"]),
        status=str(values["status"]),
        tokens=int(values["tokens"]),
        learned=int(values["learned"]),
        reason=None if values["reason"] is None else str(values["reason"]),
        examples=examples,
        unshown=int(values.get("unshown", 0)),
    )
