"""How near the memory planner comes: what it predicts, and by how much the resident set of a rank really grows.

    python benchmarks/memory.py                                         SmolLM2-135M, 12 cases on two ranks, ten minutes
    python benchmarks/memory.py --models qwen2 llama mixtral --stages 2 3 --checkpointing off
    python benchmarks/memory.py --ranks 1 --batch 8 --json figures.json
    python benchmarks/memory.py --published                             predictions beside figures of others, no runs

Each case is the real training story in processes of its own, for three steps. What counts is the growth from just
before the model is built to the highest point of those steps, of the rank that grows most. The kernel keeps that
point (VmHWM), and forgets what was before when it is told to (/proc/self/clear_refs, see proc(5)). Linux with glibc.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import PRETRAINED, ROOT, last_line, machine
from throughput import _free_port

sys.path.insert(0, str(ROOT))
DATA = ROOT / "data" / "identity.json"
STEPS, SECONDS_FOR_A_RUN = 3, 900
FIGURES = "FINETUNE_MEMORY_FIGURES"
ALL = dict(vocab_size=49_152, bos_token_id=1, eos_token_id=2, pad_token_id=2, max_position_embeddings=2_048)
# family -> class prefix and config of a random model, saved in the type named last.
RANDOM = {
    "qwen3": (
        "Qwen3",
        dict(
            vocab_size=100_000, hidden_size=512, intermediate_size=1_408, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=4, head_dim=128, tie_word_embeddings=True,
        ),
        "float32",
    ),
    "qwen2": (
        "Qwen2",
        dict(
            vocab_size=151_936, hidden_size=384, intermediate_size=1_536, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
    "llama": (
        "Llama",
        dict(
            hidden_size=768, intermediate_size=2_048, num_hidden_layers=8, num_attention_heads=12,
            num_key_value_heads=4, tie_word_embeddings=False,
        ),
        "float32",
    ),
    "mixtral": (
        "Mixtral",
        dict(
            hidden_size=384, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
            num_local_experts=8, num_experts_per_tok=2, sliding_window=None, tie_word_embeddings=False,
        ),
        "bfloat16",
    ),
    "tiny": (
        "Llama",
        dict(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        "float32",
    ),
    "small": (
        "Llama",
        dict(
            hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
}  # fmt: skip


LLAMA_8B = dict(
    vocab_size=128_256, hidden_size=4_096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
QWEN_14B = dict(
    vocab_size=152_064, hidden_size=5_120, intermediate_size=13_824, num_hidden_layers=48, num_attention_heads=40,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
MPT_7B = dict(  # its own code cannot be tried out: GPT-NeoX of the same sizes
    vocab_size=50_368, hidden_size=4_096, intermediate_size=16_384, num_hidden_layers=32, num_attention_heads=32,
    tie_word_embeddings=True,
)  # fmt: skip
TORCHTUNE, FOUNDRY, SWIFT = "torchtune README", "llm-foundry benchmarking README", "ms-swift Megatron quick start"
# what, class prefix, config, with an adapter, job, the figure as published
PUBLISHED = (
    ("Llama-3.1-8B, LoRA, 2 x 2,048, A6000", "Llama", LLAMA_8B, True, dict(stage=1, ranks=1, tokens=4_096),
     "30.3 GiB", TORCHTUNE),
    ("the same with recomputing, RTX 4090", "Llama", LLAMA_8B, True,
     dict(stage=1, ranks=1, tokens=4_096, checkpoint_every=1), "16.2 GiB", TORCHTUNE),
    ("MPT-7B, 6 x 2,048, 8 A100-80", "GPTNeoX", MPT_7B, False, dict(stage=3, ranks=8, tokens=12_288),
     "fits 80 GB", FOUNDRY),
    ("MPT-7B, 16 x 4,096, recomputing, 8 A100-80", "GPTNeoX", MPT_7B, False,
     dict(stage=3, ranks=8, tokens=65_536, checkpoint_every=1), "fits 80 GB", FOUNDRY),
    ("Qwen2.5-14B, 8,192 packed, ZeRO-2, 8 A800", "Qwen2", QWEN_14B, False,
     dict(stage=2, ranks=8, tokens=8_192, checkpoint_every=1), "80 GB", SWIFT),
    ("the same, ZeRO-3", "Qwen2", QWEN_14B, False, dict(stage=3, ranks=8, tokens=8_192, checkpoint_every=1),
     "58 GB", SWIFT),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    adapter: str
    stage: int
    checkpointing: str
    ranks: int
    batch: int

    def flags(self, folder: Path, output: Path) -> list[str]:
        """Of the training command."""
        named = ["--model_name_or_path", folder, "--data_path", DATA, "--output_dir", output]
        steps = ["--max_steps", STEPS + 1, "--save_strategy", "no", "--logging_steps", 1]
        size = ["--per_device_train_batch_size", self.batch, "--deepspeed", f"zero{self.stage}"]
        more = [
            "--gradient_checkpointing",
            self.checkpointing == "on",
            "--use_lora",
            self.adapter != "full",
            "--load_in_4bit",
            self.adapter == "qlora",
        ]
        dropout = ["--lora_dropout", 0] if self.model == "mixtral" and self.adapter != "full" else []
        return [str(word) for word in (*named, *steps, *size, *more, *dropout)]


def main() -> None:
    given = _arguments()
    if given.published:
        print_published()
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-", dir=given.work) as work:
        folders = {name: make_model(name, Path(work) / name) for name in given.models}
        print(
            f"{given.ranks} ranks, {given.batch} rows each; {machine()}, {time.strftime('%Y-%m-%d %H:%M')}", flush=True
        )
        for model in given.models:
            for adapter in given.adapters:
                for stage in given.stages:
                    for checkpointing in given.checkpointing:
                        case = Case(model, adapter, stage, checkpointing, given.ranks, given.batch)
                        rows.append(measured_and_predicted(case, folders[model], Path(work)))
                        print(_line(rows[-1]), flush=True)
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    print(f"mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}, of {len(rows)}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


def print_published() -> None:
    """Predictions for what others have measured or found to fit, logits at all positions, in decimal GB and GiB."""
    import transformers

    from finetune.config import AdapterArguments
    from finetune.models.adapters import attach_peft
    from finetune.preflight.memory import RunSpec, estimate_memory
    from finetune.preflight.memory.device_memory import FRAMEWORK
    from finetune.preflight.spec_from_config import spec_from_config

    def attach(base: Any) -> Any:
        return attach_peft(base, AdapterArguments(use_lora=True, lora_dropout=0.0))

    for what, prefix, sizes, adapter, job, figure, source in PUBLISHED:
        config = getattr(transformers, f"{prefix}Config")(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        shape = spec_from_config(config, precision="bf16", attach=attach if adapter else None)
        bucket = None if job["stage"] == 3 else 500_000_000
        found = estimate_memory(shape, RunSpec(**job, logits=job["tokens"], reduce_bucket=bucket))
        tensors = found.device_total - found.device[FRAMEWORK]
        sizes_of = f"{tensors / 2**30:.1f} GiB | {found.device_total / 1e9:.1f} GB"
        print(f"| {what} | {figure} | {sizes_of} | {found.phase} | {source} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted and measured memory of training on a CPU.")
    parser.add_argument("--models", nargs="+", choices=["smollm2", *RANDOM], default=["smollm2"])
    parser.add_argument("--adapters", nargs="+", choices=("full", "lora", "qlora"), default=["full", "lora"])
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--published", action="store_true", help="only print predictions beside published figures")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="rows of a rank's micro-batch")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--work", type=Path, help="where models lie while it runs (default: the system's)")
    return parser.parse_args()


def make_model(name: str, folder: Path) -> Path:
    """A folder with a model and the small model's tokenizer: SmolLM2 itself, or a random one."""
    if name == "smollm2":
        return PRETRAINED
    import torch
    import transformers

    prefix, own, dtype = RANDOM[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**ALL, **own})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(PRETRAINED).save_pretrained(folder)
    return folder


def measured_and_predicted(case: Case, folder: Path, work: Path) -> dict[str, Any]:
    """Bytes; of the measured ones those of the rank that grew most."""
    seen = run_ranks(case, folder, work)
    tokens, supervised = (max(one[name] for one in seen) for name in ("tokens", "supervised"))
    found = predict(case, folder, tokens, supervised)
    return {
        **vars(case),
        "tokens": tokens,
        "supervised": supervised,
        "before": max(one["before"] for one in seen),
        "measured": max(one["growth"] for one in seen),
        "least": min(one["growth"] for one in seen),
        "predicted": found.device_total,
        "phase": found.phase,
        "parts": found.device,
    }


def predict(case: Case, folder: Path, tokens: int, logits: int) -> Any:
    """The planner's `MemoryEstimate` of a case."""
    from transformers import AutoConfig

    from finetune.config import AdapterArguments
    from finetune.models.adapters import attach_peft
    from finetune.models.model_folder import stored_bytes
    from finetune.preflight.memory import RunSpec, estimate_memory
    from finetune.preflight.spec_from_config import spec_from_config

    dropout = 0.0 if case.model == "mixtral" else 0.1

    def attach(base: Any) -> Any:
        return attach_peft(base, AdapterArguments(use_lora=True, lora_dropout=dropout))

    shape = spec_from_config(
        AutoConfig.from_pretrained(folder),
        precision="float32",
        attach=None if case.adapter == "full" else attach,
        bits=4 if case.adapter == "qlora" else None,
        stored_bytes=stored_bytes(folder),
    )
    job = RunSpec(
        stage=case.stage,
        ranks=case.ranks,
        tokens=tokens,
        logits=logits,
        rows=case.batch,
        precision="float32",
        use_cpu=True,
        checkpoint_every=int(case.checkpointing == "on"),
        reduce_bucket=None if case.stage == 3 else 500_000_000,
    )
    return estimate_memory(shape, job)


def run_ranks(case: Case, folder: Path, work: Path) -> list[dict[str, int]]:
    """What each rank saw. Ends with a message where a run fails."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
    }  # fmt: skip
    flags = case.flags(folder, work / f"output-{time.monotonic_ns()}")
    figures = [work / f"figures-{rank}.json" for rank in range(case.ranks)]
    running = []
    for rank, path in enumerate(figures):
        path.unlink(missing_ok=True)
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), FIGURES: str(path)}
        command = [sys.executable, __file__, "--rank", *flags]  # alike on all ranks: it is what guards know a run by
        log = (work / f"log-{rank}.txt").open("w")
        running.append(subprocess.Popen(command, stdout=log, stderr=log, env=own))
    try:
        for one in running:
            one.wait(timeout=SECONDS_FOR_A_RUN)
    finally:
        for one in running:
            one.kill()
    if not all(path.is_file() for path in figures):
        sys.exit(f"{case}: {last_line((work / 'log-0.txt').read_text())}")
    return [json.loads(path.read_text()) for path in figures]


def be_a_rank(output: Path, flags: Sequence[str]) -> None:
    """Train for three steps and write down what memory did: bytes before, the growth, the largest micro-batch."""
    import torch

    from finetune import train

    torch.set_num_threads(1)
    seen = {"before": 0, "tokens": 0, "supervised": 0}
    plain_load = train.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        seen["before"] = _status("VmRSS")
        return plain_load(*args, **kwargs)

    train.load_model = load
    _watch_steps(output, seen)
    train.main(list(flags))


def _watch_steps(output: Path, seen: dict[str, int]) -> None:
    from transformers import TrainerCallback

    from finetune.training.trainer import SupervisedTrainer

    class AfterThree(TrainerCallback):
        """Ends the process once the figures are there: what comes behind is saving."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                output.write_text(json.dumps({**seen, "growth": _status("VmHWM") - seen["before"]}))
                os._exit(0)

    plain_init, plain_loss = SupervisedTrainer.__init__, SupervisedTrainer.compute_loss

    def initialised(self: Any, **kwargs: Any) -> None:
        plain_init(self, **kwargs)
        self.add_callback(AfterThree())

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen["tokens"] = max(seen["tokens"], inputs["input_ids"].numel())
        seen["supervised"] = max(seen["supervised"], len(inputs["targets"]))
        return plain_loss(self, model, inputs, *args, **kwargs)

    SupervisedTrainer.__init__, SupervisedTrainer.compute_loss = initialised, compute_loss


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes; see proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def _line(row: dict[str, Any]) -> str:
    names = [row["model"], row["adapter"], f"ZeRO-{row['stage']}", row["checkpointing"], f"{row['tokens']}"]
    figures = [f"{row['measured'] / 1e6:,.0f}", f"{row['predicted'] / 1e6:,.0f}"]
    return "| " + " | ".join([*names, *figures, f"{row['predicted'] / row['measured'] - 1:+.0%}", row["phase"]]) + " |"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        be_a_rank(Path(os.environ[FIGURES]), sys.argv[2:])
    else:
        main()
