"""How fast training is: this project, the stock Trainer, three other toolkits, on the same rows and the same steps.

    python benchmarks/throughput.py                                   everything, a model of 4 layers, LoRA and full
    python benchmarks/throughput.py --layers 30 --adapters full --only flat stock
    python benchmarks/throughput.py --only flat stock --json figures.json
    python benchmarks/throughput.py --hybrid --only flat padded       a random model with a recurrent layer
    python benchmarks/throughput.py --tools --only flat stock trl      rows with tool calls and reasoning

Every run is a process of its own; the contenders take turns, in the opposite order in every other round. Beside each
rate stands the limit: what leaving out the padding and the unused logits of the stock Trainer allows for this very
data and model, and what the machine's matrix products allow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from conversations import Lengths, as_messages, conversations, tool_conversations, write_rows
from environments import (
    HERE,
    LLAMA_FACTORY,
    MS_SWIFT,
    PRETRAINED,
    ROOT,
    TRL,
    VENVS,
    Contender,
    Unavailable,
    last_line,
    machine,
    pythons_of,
)
from limits import Sizes, padding_and_logits_limit, roof_tokens_per_second
from peers.measured import CHATML_WITH_TOOLS

SECONDS_FOR_A_RUN = 3_600
# Lengths as Alpaca's are distributed: about half of a padded batch of eight is padding.
ALPACA_LIKE = Lengths(question=30, answer=50, spread=0.85)


@dataclass(frozen=True)
class Trained(Contender):
    """A contender with the form of its batches."""

    form: str = "padded"


CONTENDERS = (
    Trained("flat", "this project, flat", "train_this_project.py", form="flat"),
    Trained("packed", "this project, packed", "train_this_project.py", form="packed"),
    Trained("padded", "this project, padded", "train_this_project.py", form="padded"),
    Trained("stock", "stock Trainer", "train_stock.py"),
    Trained("published", "all rows 2048 long", "train_stock.py", form="longest"),
    Trained("llamafactory", "LLaMA-Factory 0.9.5", "train_llama_factory.py", *LLAMA_FACTORY),
    Trained("swift", "ms-swift 4.6.0", "train_ms_swift.py", *MS_SWIFT),
    Trained("trl", "TRL 1.16.0, padded", "train_trl_sft.py", *TRL),
    Trained("trl_packed", "TRL 1.16.0, packed", "train_trl_sft.py", *TRL, form="packed"),
)
COLUMNS = (
    "", "tokens/s", "from - to", "supervised/s", "to stock", "to best other", "to roof", "RSS GB", "to leanest",
    "start s", "padding", "loss 1, 2",
)  # fmt: skip
PEERS = ("llamafactory", "swift", "trl", "trl_packed")
OWN_TOOL_SYNTAX = ("llamafactory", "swift")  # they write declarations and calls in forms of their own


@dataclass
class Measured:
    """All runs of one contender with one adapter; rates are medians of the runs."""

    name: str
    label: str
    adapter: str
    runs: list[dict[str, Any]] = field(default_factory=list)

    def rates(self, counted: str = "tokens") -> list[float]:
        """Tokens per second of each run."""
        return [sum(run[counted]) / sum(run["seconds"]) for run in self.runs]

    def figure(self, name: str) -> float:
        """The median of a figure that each run has one of."""
        return median(run[name] for run in self.runs)


def main() -> None:
    given = _arguments()
    chosen = [contender for contender in CONTENDERS if contender.name in given.only]
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=given.work) as folder:
        sizes = (
            make_hybrid(Path(folder) / "model") if given.hybrid else make_model(Path(folder) / "model", given.layers)
        )
        needed = given.batch * (given.warm_up + given.steps + 1)
        drawn = tool_conversations(4 * needed) if given.tools else plain_conversations(4 * needed)
        make_rows(Path(folder), drawn, needed, given.max_length)
        layers = "2 hybrid" if given.hybrid else given.layers
        layers = f"{layers} layers{', rows with tool calls' if given.tools else ''}"
        print(f"{layers}, batch {given.batch}, {given.steps} steps; {machine()}")
        pythons = pythons_of(chosen, given.venvs)
        chosen = [contender for contender in chosen if contender.name in pythons]
        began = time.strftime("%Y-%m-%d %H:%M")
        results = _measure(chosen, pythons, given, Path(folder))
    if not results:
        sys.exit("nothing could be measured")
    limits = {}
    for adapter in given.adapters:
        group = [one for one in results if one.adapter == adapter]
        limits[adapter] = _print_table(group, sizes, adapter, given)
    if given.json:
        facts = {"machine": machine(), "began": began, "layers": given.layers, "batch": given.batch, "limits": limits}
        given.json.write_text(json.dumps({**facts, "results": [asdict(one) for one in results]}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description="Training throughput against the stock Trainer and other toolkits.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--adapters", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M-Instruct, which has 30")
    parser.add_argument("--hybrid", action="store_true", help="two random layers like Qwen3-Next's instead")
    parser.add_argument("--tools", action="store_true", help="rows with tool calls and reasoning")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--warm_up", type=int, default=2, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=6, help="steps that count")
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each run")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the other toolkits are installed")
    parser.add_argument("--work", type=Path, help="where model and data lie while it runs (default: the system's)")
    given = parser.parse_args()
    if given.tools and (others := {*given.only}.intersection(OWN_TOOL_SYNTAX)):
        parser.error(f"--tools: leave {', '.join(sorted(others))} out of --only: other text would be trained there")
    if not (PRETRAINED / "model.safetensors").is_file():
        parser.error(f"{PRETRAINED} is missing: run make model first")
    return given


def make_model(folder: Path, layers: int) -> Sizes:
    """The first layers of the small model in float32, its chat template plain ChatML."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    _save(model, AutoTokenizer.from_pretrained(PRETRAINED), folder)
    return Sizes.of(model.config)


def make_hybrid(folder: Path) -> None:
    """A gated delta rule and an attention, each with experts, as in Qwen3-Next; its arithmetic has no `Sizes`."""
    import torch
    from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=4,
        linear_num_value_heads=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
        shared_expert_intermediate_size=128, layer_types=["linear_attention", "full_attention"], bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    _save(Qwen3NextForCausalLM(config), tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    tokenizer.chat_template = CHATML_WITH_TOOLS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_conversations(count: int, lengths: Lengths = ALPACA_LIKE) -> Iterator[dict[str, Any]]:
    """English questions and answers."""
    return conversations(count, lengths=lengths, english_only=True)


def make_rows(folder: Path, drawn: Iterable[dict[str, Any]], needed: int, max_length: int) -> None:
    """`needed` rows that no contender cuts, in the two forms that contenders read, beside the `model` in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = []
    for row in drawn:
        messages = as_messages(row)
        ids = tokenizer.apply_chat_template(messages["messages"], tools=row.get("tools"), return_dict=False)
        if len(ids) <= max_length:
            rows.append((row, messages))
    if len(rows) < needed:
        sys.exit(f"only {len(rows)} of the {needed} rows needed have at most {max_length} tokens: raise --max_length")
    write_rows(folder / "data.json", (row for row, _ in rows[:needed]))
    write_rows(folder / "messages.json", (messages for _, messages in rows[:needed]))


def _measure(
    chosen: Sequence[Trained], pythons: dict[str, Path], given: argparse.Namespace, folder: Path
) -> list[Measured]:
    pairs = [(one, adapter) for adapter in given.adapters for one in chosen]
    results = {(one.name, adapter): Measured(one.name, one.label, adapter) for one, adapter in pairs}
    broken: set[tuple[str, str]] = set()
    for repeat in range(given.repeats):
        for one, adapter in pairs if repeat % 2 == 0 else pairs[::-1]:
            if (one.name, adapter) in broken:
                continue
            try:
                run = run_once(one, pythons[one.name], adapter, given, folder)
            except Unavailable as reason:
                print(f"{one.label}, {adapter}, is left out: {reason}", flush=True)
                broken.add((one.name, adapter))
                continue
            results[one.name, adapter].runs.append(run)
            rate = sum(run["tokens"]) / sum(run["seconds"])
            print(f"round {repeat + 1}, {adapter}, {one.label}: {rate:,.0f} tokens/s", flush=True)
    return [one for one in results.values() if one.runs]


def run_once(
    one: Trained, python: Path, adapter: str, given: argparse.Namespace, folder: Path, ranks: int = 1
) -> dict[str, Any]:
    """One run, its figures those of rank 0 but for the tokens, which are those of all ranks.

    Raises:
        Unavailable: it fails here.
    """
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    outputs = [folder / f"figures-{rank}.json" for rank in range(ranks)]
    is_slow = one.form == "longest"  # its every step is as any other: each position is computed
    task = {
        "model": folder / "model", "data": folder / "data.json", "messages": folder / "messages.json",
        "form": one.form, "adapter": adapter, "batch": given.batch // ranks, "max_length": given.max_length,
        "warm_up": 1 if is_slow else given.warm_up, "steps": 1 if is_slow else given.steps, "cache": cache,
    }  # fmt: skip
    command = [str(python), str(HERE / "peers" / one.driver)]
    command += [str(part) for name, value in task.items() for part in (f"--{name}", value)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(max(1, given.threads // ranks)), "CUDA_VISIBLE_DEVICES": ""}
    if not one.requirements:
        environment["PYTHONPATH"] = str(ROOT)
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(_free_port())}
    began, running = time.time(), []
    for rank, output in enumerate(outputs):
        output.unlink(missing_ok=True)
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        log = (folder / f"log-{rank}.txt").open("w")
        running.append(
            subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log, cwd=folder, env=own)
        )
    try:
        statuses = [process.wait(timeout=SECONDS_FOR_A_RUN) for process in running]
    except subprocess.TimeoutExpired:
        raise Unavailable(f"a run took more than {SECONDS_FOR_A_RUN:,} s") from None
    finally:
        for process in running:
            process.kill()
    if any(statuses) or not all(output.is_file() for output in outputs):
        raise Unavailable(f"its driver ended with status {statuses}: {last_line((folder / 'log-0.txt').read_text())}")
    facts = [json.loads(output.read_text()) for output in outputs]
    counts = ("tokens", "supervised_tokens", "positions")
    summed = {name: [sum(step) for step in zip(*(one[name] for one in facts), strict=True)] for name in counts}
    return {**facts[0], **summed, "start_up_seconds": facts[0]["first_step_at"] - began}


def _print_table(
    group: list[Measured], sizes: Sizes | None, adapter: str, given: argparse.Namespace
) -> dict[str, float]:
    from rich.console import Console
    from rich.table import Table

    by_name = {one.name: one for one in group}
    rate = {one.name: median(one.rates()) for one in group}
    stock, best_peer = rate.get("stock"), max((rate[name] for name in PEERS if name in rate), default=None)
    leanest = min((by_name[name].figure("peak_rss_bytes") for name in PEERS if name in rate), default=None)
    counted = by_name.get("flat") or group[0]
    tokens, supervised = (median(counted.runs[0][name]) for name in ("tokens", "supervised_tokens"))
    roof = sizes and roof_tokens_per_second(sizes, round(tokens), round(supervised), adapter, given.threads)
    limits: dict[str, float] = {"roof_tokens_per_second": roof} if roof else {}
    table = Table(title=f"training, {adapter}: real tokens/s, to the stock Trainer's and the best other toolkit's")
    for name in COLUMNS:
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for one in group:
        rates, memory = one.rates(), one.figure("peak_rss_bytes")
        real, positions = sum(one.runs[0]["tokens"]), sum(one.runs[0]["positions"])
        table.add_row(
            one.label,
            f"{rate[one.name]:,.0f}",
            f"{min(rates):,.0f} - {max(rates):,.0f}",
            f"{median(one.rates('supervised_tokens')):,.0f}",
            _ratio(rate[one.name], stock),
            _ratio(rate[one.name], best_peer),
            _ratio(rate[one.name], roof),
            f"{memory / 1e9:.2f}",
            _ratio(memory, leanest),
            f"{one.figure('start_up_seconds'):.1f}",
            f"{1 - real / positions:.0%}",
            ", ".join(f"{loss:.4f}" for loss in one.runs[0]["losses"][:2]),
        )
    Console(width=None if sys.stdout.isatty() else 175).print(table)
    if sizes is None or roof is None:
        return limits
    if "stock" in by_name:
        run = by_name["stock"].runs[0]
        useful = sum(run["tokens"]) / sum(run["positions"])
        supervised_share = sum(run["supervised_tokens"]) / sum(run["tokens"])
        limits["to_stock"] = padding_and_logits_limit(sizes, useful, supervised_share, adapter)
        print(
            f"limit to stock: {limits['to_stock']:.2f} = 1 / {useful:.3f} useful positions, and logits of "
            f"{supervised_share:.1%} of the tokens"
            + (f"; flat reaches {rate['flat'] / stock / limits['to_stock']:.2f} of it" if "flat" in rate else "")
        )
    print(f"roof: {roof:,.0f} tokens/s, the matrix products of a step alone, each as fast as it runs here by itself\n")
    return limits


def _free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return probing.getsockname()[1]


def _ratio(value: float, to: float | None) -> str:
    return f"{value / to:.2f}" if to else ""


if __name__ == "__main__":
    main()
