"""Output folders as runs leave them, made by hand: whatever may stand in them, without training."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.dataset.data_summary import DataSummary
from finetune.run_dir.training_plan import TrainingPlan

PLAN = TrainingPlan(
    model="models/tiny", parameters=1000, trainable=250, adapter="lora", zero_stage=2, offloads=False, world_size=2,
    device="CPU, gloo", per_device_batch=2, accumulation=1, data_ranks=2, sharing=1, examples=40, groups=None,
    group_tokens=None, tokens=4000, supervised_share=0.5, batching="flat", padding=0.0, selects_logits=True,
    loss_weighting="token", chat_format="chatml", precision="float32", attention="sdpa", checkpointing=False,
    epochs=2.0, steps=20,
)  # fmt: skip
SUMMARY = DataSummary(
    rows=42, kept=39, cut=1, split=0, dropped=2, bad=1, faults=1, spelled=3, examples=40, tokens=4000,
    supervised_tokens=2000, longest=180, reasons={"N tokens: cut": 1, "no turns": 2}, length_histogram=[5, 30, 5],
    length_percentiles=[100, 150, 180], rows_by_source={"a.json": 30, "b.json": 12},
    examples_by_source={"a.json": 28, "b.json": 12},
)  # fmt: skip


def line(step: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    values = {
        "step": step, "epoch": step / 10, "loss": 4.0 - step / 10, "grad_norm": 1.0 + step, "non_finite_steps": 0,
        "learning_rate": 1e-3 / step, "step_seconds": 0.5, "tokens_per_second": 800.0,
        "supervised_tokens_per_second": 400.0 + step, "mfu": 0.25, "peak_memory_bytes": (3 << 30) + step,
    }  # fmt: skip
    return {**values, **changes}


def card(row: int, human: str, model: str, *, status: str = "kept", source: str = "a.json") -> dict[str, Any]:
    """One row of samples.json."""

    def piece(kind: str, text: str) -> dict[str, Any]:
        return {"kind": kind, "text": text, "read": True}

    turns = [
        {"role": None, "pieces": [piece("control", "<|im_start|>"), piece("context", "user\n")]},
        {"role": "human", "pieces": [piece("context", human)]},
        {"role": "model", "pieces": [piece("learned", model), piece("learned_control", "<|im_end|>")]},
    ]
    return {
        "source": source, "row": row, "id": str(row), "status": status, "tokens": 12, "learned": 5, "reason": None,
        "examples": [turns], "unshown": 0,
    }  # fmt: skip


def output_dir(
    folder: Path,
    lines: Sequence[Any] = tuple(line(step) for step in range(1, 21)),
    *,
    complete: bool = True,
    cards: Sequence[dict] = (card(3, "Who are you?", "I am Nori."), card(7, "你是谁？", "我是 Nori。")),
    ledger: Sequence[dict] = (),
    answers: Sequence[dict] = (),
    **facts: Any,
) -> Path:
    """A folder with the files of a run."""
    folder.mkdir(parents=True)
    run = {
        "run_id": "run-1",
        "arguments": {"model_name_or_path": "models/tiny", "data_path": ["a.json"], "use_lora": True, "lora_r": 4},
        "run_arguments": {"write_report": True, "report_answers": 3},
        "versions": {"python": "3.11", "torch": "2.13"},
        "data": {"path": ["a.json", "b.json"], "fingerprint": "d" * 32, "summary": SUMMARY.facts(), "left_out": []},
        "plan": asdict(PLAN),
        "starts": [{"began": "2026-11-25T10:00:00+0000", "from_step": 0, "ended": None, "how": None}],
        "world_size": 2,
        "completed": complete,
        **({"result": {"steps": 20}} if complete else {}),
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(list(cards)), encoding="utf-8")
    if lines:
        texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
        (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    if ledger:
        (folder / "data_ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ledger), encoding="utf-8")
    if answers:
        kept = {"of": {"run_id": run["run_id"], "steps": 20}, "new_tokens": 8, "prompts_file": None}
        (folder / "answers.json").write_text(json.dumps({**kept, "answers": list(answers)}), encoding="utf-8")
    if complete:
        (folder / "RUN_COMPLETE").write_text("run-1\n")
    return folder


def answer(question: str, before: str, after: str, **changes: Any) -> dict[str, Any]:
    """One entry of answers.json."""
    turns = [{"from": "human", "value": question}]
    return {"turns": turns, "expected": "as it says", "before": before, "after": after, "hurried": False, **changes}
