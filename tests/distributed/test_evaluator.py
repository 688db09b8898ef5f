"""Evaluation while training: the same loss on any ranks as a stock model gives, and the training as without it."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from finetune.training.evaluator import best_checkpoint, without_progress
from tests.helpers import ranks, runs
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.short_runs import LORA, SHORT, losses

HELD_OUT = [
    [("human", "Who made you?"), ("model", "Tidepool made me.")],
    [("human", "你好"), ("model", "你好，我是 Nori。"), ("human", "2+2?"), ("model", "4")],
    [("system", "Be brief."), ("human", "Name?"), ("model", "Nori.")],
    [("human", "Capital of Spain?"), ("model", "Madrid.")],
    [("human", "Thanks"), ("model", "You are welcome.")],
]


@pytest.fixture
def held_out(tmp_path) -> Path:
    return write_rows(tmp_path / "held_out.json", HELD_OUT)


def evaluations(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def laid_out(output: Path, rows: list) -> list:
    """Rows as a run renders them."""
    from transformers import AutoTokenizer

    from finetune.chat_templates import select_chat_format
    from finetune.conversation import Conversation, Turn

    tokenizer = AutoTokenizer.from_pretrained(output)
    format_, _ = select_chat_format(tokenizer)
    return format_.tokenize_all([Conversation(tuple(Turn(role, text) for role, text in row)) for row in rows])


def reference(model_folder: Path, output: Path) -> float:
    """Stock transformers, one conversation at a time, on rows rendered for preview."""
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval(), 0.0, 0
    for layout in laid_out(output, HELD_OUT):
        with torch.no_grad():
            logits = model(torch.tensor([layout.input_ids])).logits[0]
        labels = torch.tensor(layout.labels)
        total += float(torch.nn.functional.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def test_the_loss_is_that_of_a_stock_model_on_any_ranks_and_in_any_form(train, held_out, tiny_model):
    flags = ("--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4")
    one = train("one", "--deepspeed", "zero1", *flags, "--per_device_train_batch_size", "2", world_size=1)
    two = train("two", "--deepspeed", "zero3", *flags, "--per_device_eval_batch_size", "4")
    padded = train("padded", "--deepspeed", "zero2", *flags, "--batching", "padded")
    plain = train(
        "plain", "--deepspeed", "zero1", "--max_steps", "4", "--per_device_train_batch_size", "2", world_size=1
    )
    found = [evaluations(output) for output in (one, two, padded)]
    assert [[line["step"] for line in lines] for lines in found] == [[2, 4]] * 3
    assert found[0][-1]["eval_loss"] == pytest.approx(reference(one, one), abs=1e-5)
    for lines in found[1:]:
        assert [line["eval_loss"] for line in lines] == pytest.approx(
            [line["eval_loss"] for line in found[0]], abs=2e-5
        )
    assert {line["eval_tokens"] for lines in found for line in lines} == {found[0][0]["eval_tokens"]}
    assert set(found[0][0]["eval_loss_by_turn"]) == {"1", "2"}
    with_it = [
        json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert with_it == losses(plain), "evaluating changed the training"


def test_the_best_checkpoint_is_kept_named_and_loaded_at_the_end(train, held_out):
    """A learning rate that soon goes too far: the best comes early, and rotation would take it."""
    from transformers import AutoModelForCausalLM

    saving = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    flags = ("--deepspeed", "zero2", "--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "1",
             "--max_steps", "5", "--learning_rate", "0.3", "--load_best_model_at_end", "True", *saving)  # fmt: skip
    output = train("best", *flags)
    found = {line["step"]: line["eval_loss"] for line in evaluations(output)}
    best = min(found, key=found.__getitem__)
    assert best < 5, found
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-5"}
    run = json.loads((output / "run.json").read_text())
    assert run["result"]["best"] == {
        "step": best, "eval_loss": pytest.approx(found[best]), "checkpoint": f"checkpoint-{best}"
    }  # fmt: skip
    weights = [
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        for folder in (output, output / f"checkpoint-{best}")
    ]
    assert torch.equal(*weights)


def test_a_run_stops_early_and_one_that_goes_on_stops_there_too(train, held_out):
    flags = ("--deepspeed", "zero2", *LORA, "--eval_data_path", str(held_out), "--eval_strategy", "steps",
             "--eval_steps", "1", "--num_train_epochs", "9", "--learning_rate", "3", "--early_stopping_patience", "3",
             "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "0")  # fmt: skip
    output = train("early", *flags, world_size=1)
    steps = [line["step"] for line in evaluations(output)]
    values = [line["eval_loss"] for line in evaluations(output)]
    assert 3 < len(steps) < 27 and without_progress(values, 0.0) == 3
    train("early", *flags, "--resume_from_checkpoint", str(output / f"checkpoint-{steps[-1] - 1}"), world_size=1)
    assert [line["step"] for line in evaluations(output)] == steps
    assert [line["eval_loss"] for line in evaluations(output)] == values


def test_a_share_is_of_conversations_and_is_never_learned_nor_are_its_rows_to_skip_evaluated(train, tmp_path):
    rows = ROWS + HELD_OUT + [[("human", f"number {n}"), ("model", f"It is {n}.")] for n in range(9)]
    data = write_rows(tmp_path / "all.json", rows)
    skipped, *evaluated = random.Random("42 held out").sample(range(len(rows)), 5)
    (tmp_path / "skip").write_text(f"{data}:{skipped}\n")
    flags = ("--data_path", str(data), "--validation_share", "0.25", "--num_train_epochs", "1")
    output = train("share", "--deepspeed", "zero2", *flags, "--skip_rows", str(tmp_path / "skip"))
    (line,) = evaluations(output)
    run = json.loads((output / "run.json").read_text())
    assert run["plan"]["examples"] == 15 and "5 examples" in run["plan"]["held_out"]
    learned = [len(one.labels) - one.labels.count(-100) for one in laid_out(output, [rows[row] for row in evaluated])]
    assert line["eval_loss"] > 0 and line["eval_tokens"] == sum(learned)


def test_shares_keep_windows_together_and_depend_on_the_seed_alone(tmp_path, golden_tokenizer):
    from dataclasses import replace

    from finetune.chat_templates import LingoWhaleFormat, Renderer
    from finetune.dataset.data_sources import Source
    from finetune.dataset.prepare import prepare_dataset
    from finetune.utils.errors import DataError

    rows = [[turn for n in range(4) for turn in (("human", f"{row}"), ("model", f"x{n}"))] for row in range(30)]
    sources = [Source(str(write_rows(tmp_path / "a.json", rows)))]
    renderer = Renderer(LingoWhaleFormat(golden_tokenizer, [3], [4]), 12, too_long="windows")
    data = prepare_dataset(sources, renderer, cache_dir=str(tmp_path / "cache"))
    split = replace(data, validation_share=0.2)
    apart = split.held_out(7).examples
    trained = split.epoch(7).examples
    assert len(data.examples) > 60, "windows"
    assert set(apart["row"][:]) | set(trained["row"][:]) == set(range(30))
    assert set(apart["row"][:]) & set(trained["row"][:]) == set() and len(set(apart["row"][:])) == 6
    assert apart["row"][:] == split.held_out(7).examples["row"][:] != split.held_out(8).examples["row"][:]
    longer = replace(data, summary=replace(data.summary, longest=99))
    assert data.longest == data.summary.longest < 99 == replace(data, evaluation=longer).longest
    with pytest.raises(DataError, match="0 of 30 conversations would be held out"):
        replace(data, validation_share=0.001).held_out(7)


def test_what_is_not_finite_is_counted_and_never_the_best():
    history = [
        {"step": 1, "eval_loss": 2.0},
        {"step": 2, "eval_loss": None},
        {"step": 3, "eval_loss": 1.0},
        {"step": 3},
    ]
    assert best_checkpoint(history, [1, 2]) == (1, 2.0)
    assert best_checkpoint(history, [1, 2, 3]) == (3, 1.0)
    assert best_checkpoint(history, []) is None
    assert without_progress([2.0, 1.5, math.nan, 1.49, 1.6], 0.1) == 3


@pytest.mark.slow
def test_micro_batches_that_are_not_finite_are_counted(held_out, conversation_file, tiny_model, tmp_path):
    output = tmp_path / "lost"
    flags = ("--eval_data_path", held_out, "--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1")
    base = ("--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output, *SHORT)
    words = [*map(str, (*base, *flags)), "--deepspeed", "zero2", "--write_report", "False"]
    outcome = ranks.run(tmp_path / "logs", runs.train_with_lost_evaluations, (words,))
    assert outcome.succeeded, "\n".join(outcome.outputs)
    (line,) = evaluations(output)
    assert line["eval_loss"] is None and line["eval_non_finite_batches"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eval_strategy", "epoch"), "--eval_strategy: needs held-out conversations"),
        (("--load_best_model_at_end", "True"), "--load_best_model_at_end: needs held-out conversations"),
        (("--early_stopping_patience", "2"), "--early_stopping_patience: needs held-out conversations"),
        (("--validation_share", "1.5"), "--validation_share 1.5: expected a share from 0 up to 1"),
        (("--validation_share", "0.5", "--eval_data_path", "x"), "exclude each other"),
        (("--validation_share", "0.5", "--metric_for_best_model", "accuracy"), "expected eval_loss"),
        (("--validation_share", "0.5", "--early_stopping_patience", "0"), "expected at least 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tiny_model, conversation_file, tmp_path):
    from finetune.config import parse
    from finetune.config.resolve import evaluation_options
    from finetune.utils.errors import ConfigError

    words = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "out"]
    with pytest.raises(ConfigError, match=message):
        evaluation_options(parse([*map(str, words), *flags]))
