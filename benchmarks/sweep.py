"""How the cost of training grows: over the length of conversations, rows of a step, and ranks.

    python benchmarks/sweep.py                       this project (flat) and the stock Trainer, all parameters
    python benchmarks/sweep.py --adapter lora --json sweep.json

One thing is changed at a time; the others stay at 512 tokens, 8 rows, 1 rank. Two ranks share the cores of one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from environments import VENVS, Unavailable, machine
from throughput import ALPACA_LIKE, CONTENDERS, Trained, make_model, make_rows, plain_conversations, run_once

SWEEPS: dict[str, tuple[int, ...]] = {"max_length": (128, 256, 512, 1024), "batch": (2, 4, 8, 16), "ranks": (1, 2)}
USUAL = {"max_length": 512, "batch": 8, "ranks": 1}


def main() -> None:
    given = _arguments()
    chosen = [one for one in CONTENDERS if one.name in ("flat", "stock")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=given.work) as folder:
        make_model(Path(folder) / "model", given.layers)
        print(f"{given.layers} layers, {given.adapter}; {machine()}, {time.strftime('%Y-%m-%d %H:%M')}")
        for changed, values in SWEEPS.items():
            for value in values:
                point = {**USUAL, changed: value}
                longer = point["max_length"] / USUAL["max_length"]
                lengths = replace(
                    ALPACA_LIKE, question=ALPACA_LIKE.question * longer, answer=ALPACA_LIKE.answer * longer
                )
                steps = given.warm_up + given.steps
                needed = point["batch"] * (steps + 1)
                make_rows(Path(folder), plain_conversations(4 * needed, lengths), needed, point["max_length"])
                rows += [{"changed": changed, **point, **_measured(one, given, point, folder)} for one in chosen]
                print(f"{changed} {value} done", flush=True)
    _print(rows)
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "layers": given.layers, "points": rows}, indent=1) + "\n"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the cost of training grows.")
    parser.add_argument("--adapter", choices=("lora", "full"), default="full")
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M-Instruct, which has 30")
    parser.add_argument("--warm_up", type=int, default=1, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--work", type=Path, help="where model and data lie while it runs (default: the system's)")
    return parser.parse_args()


def _measured(one: Trained, given: argparse.Namespace, point: dict[str, int], folder: str) -> dict[str, Any]:
    settings = argparse.Namespace(**{**vars(given), **point, "venvs": VENVS})
    try:
        run = run_once(one, Path(sys.executable), given.adapter, settings, Path(folder), point["ranks"])
    except Unavailable as reason:
        sys.exit(f"{one.label}: {reason}")
    seconds = sum(run["seconds"])
    return {
        "name": one.label,
        "tokens_a_step": sum(run["tokens"]) / given.steps,
        "step_seconds": seconds / given.steps,
        "tokens_per_second": sum(run["tokens"]) / seconds,
        "peak_rss_bytes": run["peak_rss_bytes"],
    }


def _print(rows: list[dict[str, Any]]) -> None:
    import plotext
    from rich.console import Console
    from rich.table import Table

    table = Table(title="how the cost grows")
    for name in ("changed", "to", "", "tokens a step", "s a step", "tokens/s", "RSS GB, a rank"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["changed"], f"{row[row['changed']]:,}", row["name"], f"{row['tokens_a_step']:,.0f}",
            f"{row['step_seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['peak_rss_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    plotext.plotsize(90, 18)
    plotext.theme("clear")
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted((row["tokens_a_step"], row["step_seconds"]) for row in rows if row["name"] == name)
        plotext.plot(*zip(*points, strict=True), label=name, marker="braille")
    plotext.title("seconds a step over real tokens a step, all points above")
    print(plotext.uncolorize(plotext.build()))


if __name__ == "__main__":
    main()
