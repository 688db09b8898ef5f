"""What one GPU does with this project: kernels, loss, and runs of 1B and 8B beside the stock Trainer and the forecast.

    python benchmarks/gpu.py --markdown FILE.md             everything, what tells most first; about 12 minutes
    python benchmarks/gpu.py --only attention full stock    parts of it
    python benchmarks/gpu.py --device cpu --steps 2         the same code at toy sizes, without figures of use

Models have random weights and are made on the device, so that nothing is downloaded; the tokenizer is that of the small
model. Each run is a process of its own and is profiled for two steps that do not count. A run that fails or takes too
long leaves a line with its error, and the next one starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversations import conversations, write_rows
from environments import PRETRAINED, ROOT, last_line
from gpu_kernels import attention_rows, loss_rows
from peers.measured import CHATML
from throughput import ALPACA_LIKE

SECONDS_FOR_A_RUN = 240
WARM_UP, PROFILED = 3, 2  # steps before those that count
MODELS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16},
}
ROWS_OF_A_STEP = "--tokens_per_device_batch 16384"
LORA = "--use_lora True --lora_dropout 0 --lora_r 16"
# name -> model, flags; `stock` is the Trainer of transformers with the same rows.
RUNS: dict[str, tuple[str, str]] = {
    "full": ("1b", f"--deepspeed zero2 {ROWS_OF_A_STEP}"),
    "lora": ("8b", f"--deepspeed zero2 {LORA} {ROWS_OF_A_STEP} --gradient_checkpointing True"),
    "stock": ("1b", "--per_device_train_batch_size 16"),
    "padded": ("1b", "--deepspeed zero2 --batching padded --per_device_train_batch_size 16"),
    "packed": ("1b", "--deepspeed zero2 --batching packed --model_max_length 4096 --per_device_train_batch_size 4"),
    "qlora": ("8b", f"{LORA} --load_in_4bit True {ROWS_OF_A_STEP} --gradient_checkpointing True"),
    "zero3": ("1b", f"--deepspeed zero3 {ROWS_OF_A_STEP}"),
    "alone": ("1b", f"{LORA} {ROWS_OF_A_STEP}"),
}
KERNELS = ("attention", "loss")
COLUMNS = (
    "run", "model", "tokens/s", "MFU", "allocated GB", "reserved GB", "forecast GB", "launches/step", "syncs/step",
    "device idle", "loss first, last",
)  # fmt: skip
SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> None:
    given = _arguments()
    if given.child:
        run_child(given.child, given.words)
        return
    if given.kernels:
        print(json.dumps({"attention": attention_rows, "loss": loss_rows}[given.kernels](given.device)))
        return
    began = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=given.work) as name:
        folder = Path(name)
        kernels: list[Sequence[Any]] = []
        for kind in [kind for kind in KERNELS if kind in given.only]:
            rows, error = in_process(["--kernels", kind, "--device", given.device], folder / "log")
            kernels += rows or [(kind, "", error, "")]
            print(*kernels, sep="\n", flush=True)
        write_rows(folder / "rows.json", conversations(4000 if given.device == "cuda" else 200, lengths=ALPACA_LIKE))
        runs = []
        for run in [run for run in RUNS if run in given.only]:
            runs.append(measure(run, given, folder))
            print(*runs[-1].items(), flush=True)
    text = markdown(kernels, runs, began, given.device)
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=(*KERNELS, *RUNS), default=[*KERNELS, *RUNS])
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    parser.add_argument("--work", type=Path, help="where models lie while it runs (default: the system's)")
    parser.add_argument("--kernels", choices=KERNELS, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(words: list[str], log: Path) -> tuple[Any, str | None]:
    """Call this script and return the JSON of its last line, or None and the error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
                timeout=SECONDS_FOR_A_RUN,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"took more than {SECONDS_FOR_A_RUN} s"
    if done.returncode:
        return None, last_line(log.read_text())[:200]
    return json.loads(last_line(done.stdout)), None


# ---- runs


def measure(run: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one of `RUNS` and, of this project's, its forecast; the figures of a row."""
    size, flags = RUNS[run]
    is_cpu = given.device == "cpu"
    model = make_model(folder, "toy" if is_cpu else size, given.device)
    words = ["--model_name_or_path", str(model), "--data_path", str(folder / "rows.json")]
    words += ["--output_dir", str(folder / run), *(flags.replace("16384", "512") if is_cpu else flags).split()]
    words += f"--max_steps {WARM_UP + PROFILED + given.steps} --learning_rate 1e-5 --logging_steps 1".split()
    words += f"--data_cache_dir {folder / 'cache'} --save_strategy no --write_report False --seed 7".split()
    words += ["--use_cpu", "True"] if is_cpu else []
    child = ["--device", given.device, "--child", str(folder / f"{run}.json")]
    facts, error = in_process([*child, "--", run, *words], folder / f"{run}.log")
    if facts is None:
        return {"run": run, "model": size, "error": error}
    if run != "stock":
        new = [str(folder / "new") if word == str(folder / run) else word for word in words]
        doctor = [sys.executable, "-m", "finetune", "doctor", "--json", *new]
        done = subprocess.run(doctor, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS_FOR_A_RUN)
        device = json.loads(done.stdout).get("memory", {}).get("device", {})
        facts["forecast"] = device.get("total_in_the_first_steps")
    return {"run": run, "model": size, **facts}


def make_model(folder: Path, size: str, device: str) -> Path:
    """Return the folder of a model with random weights in bf16, made on the device."""
    target = folder / f"model-{size}"
    if target.is_dir():
        return target
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **MODELS[size], num_key_value_heads=8, vocab_size=49152 if size == "toy" else 128256,
        max_position_embeddings=8192, rope_theta=5e5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(target, max_shard_size="5GB")
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(target)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return target


def run_child(target: Path, words: Sequence[str]) -> None:
    """Train in this process, watched, and print the figures as the last line."""
    run, *flags = words
    probe = watch_trainer()
    sys.stdout.flush()
    if run == "stock":
        train_stock(dict(zip(flags[::2], flags[1::2], strict=True)))
    else:
        from finetune.train import main as train

        train(flags)
    metrics = Path(flags[flags.index("--output_dir") + 1], "metrics.jsonl")
    if metrics.is_file():
        logged = [json.loads(line) for line in metrics.read_text().splitlines()][WARM_UP + PROFILED :]
        probe.facts["mfu"] = sum(line.get("mfu", 0) for line in logged) / max(len(logged), 1)
    print(json.dumps(probe.facts))


def watch_trainer() -> Any:
    """Add a probe to each Trainer that is made from now on."""
    import torch
    from transformers import Trainer, TrainerCallback

    on_gpu = torch.cuda.is_available()

    class Probe(TrainerCallback):
        """Time steps, count tokens, profile two steps."""

        def __init__(self) -> None:
            self.facts: dict[str, Any] = {"losses": []}
            self.tokens: Any = 0
            self.profiler: Any = None

        def _now(self) -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP:
                kinds = [torch.profiler.ProfilerActivity.CPU]
                kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
                self.profiler = torch.profiler.profile(activities=kinds)
                self.profiler.__enter__()
            elif state.global_step == WARM_UP + PROFILED:
                self.began, self.tokens = self._now(), 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP + PROFILED:
                self._now()
                self.profiler.__exit__(None, None, None)
                self.facts |= profiled(self.profiler)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.facts["losses"] += [logs["loss"]] if "loss" in logs else []

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.facts["tokens_per_second"] = float(self.tokens) / (self._now() - self.began)
            if on_gpu:
                self.facts["allocated"] = torch.cuda.max_memory_allocated()
                self.facts["reserved"] = torch.cuda.max_memory_reserved()

    probe, initialize, step = Probe(), Trainer.__init__, Trainer.training_step

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> None:
        initialize(trainer, *args, **kwargs)
        trainer.add_callback(probe)

    def counted(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        probe.tokens += inputs["counts"].tokens if "counts" in inputs else inputs["attention_mask"].sum()
        return step(trainer, model, inputs, *args, **kwargs)

    Trainer.__init__, Trainer.training_step = watched, counted
    return probe


def profiled(profiler: Any) -> dict[str, Any]:
    """Return kernel launches and synchronizations of a step, and the share of the time in which the device was idle."""
    from torch.autograd import DeviceType

    counts = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    syncs = sum(counts.get(name, 0) for name in SYNCHRONIZING)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    idle = 1 - busy / (until - spans[0][0]) if spans else None
    return {"launches": launches / PROFILED, "syncs": syncs / PROFILED, "idle": idle}


def train_stock(flags: dict[str, str]) -> None:
    """Train with the Trainer of transformers: padded rows, logits at all positions, bf16 with float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from finetune.config import parse
    from finetune.training.data_setup import prepare_run_data

    arguments = parse([word for name, value in flags.items() for word in (name, value)])
    tokenizer, _, data = prepare_run_data(arguments.model, arguments.data)
    use_cpu = "--use_cpu" in flags
    model = AutoModelForCausalLM.from_pretrained(flags["--model_name_or_path"], dtype=torch.float32)
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=flags["--output_dir"], max_steps=int(flags["--max_steps"]), learning_rate=1e-5, logging_steps=1,
            per_device_train_batch_size=int(flags["--per_device_train_batch_size"]), save_strategy="no",
            report_to="none", bf16=not use_cpu, use_cpu=use_cpu, disable_tqdm=True, seed=7,
        ),
        train_dataset=[{"input_ids": row["input_ids"], "labels": row["labels"]} for row in data.examples],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()  # fmt: skip


# ---- tables


def markdown(kernels: Sequence[Sequence[Any]], runs: Sequence[dict[str, Any]], date: str, device: str) -> str:
    """Return the two tables, with device, versions and date."""
    from importlib.metadata import version

    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, toy sizes: not for comparison"
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "deepspeed", "peft"))
    head = ("what", "by", "ms, forward and backward", "GB beside inputs")
    by_name = {run["run"]: run for run in runs}
    full, stock = by_name.get("full", {}), by_name.get("stock", {})
    if full.get("mfu") and "tokens_per_second" in stock:  # the same model has the same operations a token
        stock["mfu"] = full["mfu"] / full["tokens_per_second"] * stock["tokens_per_second"]
    lines = [f"{name}; {versions}; CUDA {torch.version.cuda}; {date}", "", *table(head, kernels), ""]
    return "\n".join([*lines, *table(COLUMNS, list(map(cells, runs))), ""])


def cells(run: dict[str, Any]) -> list[Any]:
    """Return the row of a run."""
    if "error" in run:
        return [run["run"], run["model"], run["error"], *[""] * (len(COLUMNS) - 3)]
    giga = [f"{run[name] / 1e9:.2f}" if run.get(name) else "" for name in ("allocated", "reserved", "forecast")]
    mfu, idle = run.get("mfu"), run.get("idle")
    losses = f"{run['losses'][0]:.3f}, {run['losses'][-1]:.3f}"
    return [
        run["run"], run["model"], f"{run['tokens_per_second']:,.0f}", f"{mfu:.1%}" if mfu else "", *giga,
        f"{run['launches']:,.0f}", f"{run['syncs']:,.0f}", "" if idle is None else f"{idle:.0%}", losses,
    ]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
