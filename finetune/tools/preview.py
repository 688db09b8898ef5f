"""`finetune preview`: what a data file renders to, through the very pipeline that trains."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from finetune.arguments import parse_for_preview
from finetune.console import quiet_libraries
from finetune.conversations import load_conversations
from finetune.dataset import prepare, render_all
from finetune.rendering import Renderer, Rendering
from finetune.train import load_format

SUMMARY = "Show what each row of a data file renders to: tokens, what is learned, what was cut or dropped."


def main(argv: Sequence[str]) -> None:
    """Takes the training command's model and data flags, and `--json` for one JSON line a row."""
    model, data, as_json = parse_for_preview(argv)
    quiet_libraries()
    conversations = load_conversations(data.data_path)
    _, chat_format, notes = load_format(model, data)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    renderings = render_all(conversations, Renderer(chat_format, data.model_max_length))
    lines = map(_as_json, renderings) if as_json else _as_text(renderings, data.data_path, chat_format.name)
    for line in lines:
        print(line)


def _as_json(rendering: Rendering) -> str:
    return json.dumps(
        {
            "row": rendering.row,
            "id": rendering.id,
            "status": rendering.status,
            "reason": rendering.reason,
            "examples": [{"input_ids": one.input_ids, "labels": one.labels} for one in rendering.examples],
        },
        ensure_ascii=False,
    )


def _as_text(renderings: Sequence[Rendering], source: str, format_name: str) -> Iterator[str]:
    for one in renderings:
        tokens = sum(len(example.input_ids) for example in one.examples)
        learned = sum(example.num_supervised for example in one.examples)
        reason = f"  ({one.reason})" if one.reason else ""
        yield f"row {one.row:<6} {one.status:<8} {tokens:>6,} tokens, {learned:>6,} learned{reason}"
    summary = prepare(renderings, source).summary
    yield (
        f"\n{source} in {format_name}: {summary.rows:,} rows, {summary.kept:,} kept, {summary.cut:,} cut, "
        f"{summary.dropped:,} dropped; {summary.tokens:,} tokens, {summary.supervised_share:.1%} of them learned, "
        f"the longest example {summary.longest:,}"
    )
