"""Losses by source and answer: each learned token in its cell, sums as a plain loop makes them, all else as before."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.chat_templates import LingoWhaleFormat, Renderer, select_chat_format
from finetune.conversation import Conversation, Turn
from finetune.dataset.collator import MAX_ANSWERS, LossCells
from finetune.dataset.data_sources import Source
from finetune.dataset.prepare import prepare_dataset
from finetune.models.loss import LossTerms, loss_of_logits
from finetune.training.loss_breakdown import LossBreakdown
from tests.helpers.rows import ROWS, write_rows


@pytest.fixture
def two_sources(tmp_path) -> tuple[Path, Path]:
    several = [[("system", "Be brief."), ("human", "a"), ("model", "bb"), ("human", "c"), ("model", "ddd")]]
    long = [[turn for number in range(20) for turn in (("human", f"{number}"), ("model", f"x{number}"))]]
    return write_rows(tmp_path / "one.json", ROWS[:3]), write_rows(tmp_path / "two.json", several + long)


GREETING = [("model", "Ask!"), ("human", "a"), ("model", "bb"), ("human", "c"), ("model", "ddd")]


def cells_of(data, sources: list[str]) -> list[np.ndarray]:
    cells = LossCells(sources)
    columns = (data.examples["source"], data.examples.with_format("numpy")["answer_numbers"])
    return [cells.of(source, answers) for source, answers in zip(*columns, strict=True)]


def by_loop(turns, format_, source: int) -> list[int]:
    """Cells of a conversation, told by rendering it one answer longer each time."""
    cells, before = [], 0
    answers = [number for number, turn in enumerate(turns) if turn[0] == "model"]
    for ordinal, number in enumerate(answers):
        head = [Turn(role, text) for role, text in turns[: number + 1]]
        (layout,) = format_.tokenize_all([Conversation(tuple(head))])
        learned = sum(label != -100 for label in layout.labels)
        cells += [source * MAX_ANSWERS + min(ordinal, MAX_ANSWERS - 1)] * (learned - before)
        before = learned
    return cells


@pytest.mark.parametrize("too_long", ["turns", "windows"])
def test_every_learned_token_is_in_the_cell_of_its_source_and_answer(two_sources, golden_tokenizer, too_long, tmp_path):
    format_ = LingoWhaleFormat(golden_tokenizer, [3], [4])
    sources = [Source(str(path)) for path in two_sources]
    data = prepare_dataset(sources, Renderer(format_, 500, too_long=too_long), cache_dir=str(tmp_path / "cache"))
    found = cells_of(data, list(data.summary.examples_by_source))
    wanted = []
    for number, path in enumerate(two_sources):
        for row in json.loads(path.read_text()):
            turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
            wanted.append(by_loop(turns, format_, number))
    assert [cells.tolist() for cells in found] == wanted
    assert max(wanted[-1]) == MAX_ANSWERS + MAX_ANSWERS - 1, "behind the sixteenth all are one"


@pytest.mark.parametrize("kind", ["lingowhale", "chatml"])
def test_a_greeting_in_front_of_the_first_question_is_of_the_first_answer(kind, golden_tokenizer, tmp_path):
    format_, _ = select_chat_format(golden_tokenizer, kind)
    source = Source(str(write_rows(tmp_path / "greeting.json", [GREETING])))
    data = prepare_dataset([source], Renderer(format_, 500), cache_dir=str(tmp_path / "cache"))
    (cells,) = cells_of(data, [source.name])
    learned = [len(format_.plain.encode(text)) + 1 for role, text in GREETING if role == "model"]
    assert cells.tolist() == [0] * (learned[0] + learned[1]) + [1] * learned[2]


def test_windows_keep_the_number_of_their_answer(two_sources, golden_tokenizer, tmp_path):
    format_ = LingoWhaleFormat(golden_tokenizer, [3], [4])
    renderer = Renderer(format_, 24, too_long="windows")
    data = prepare_dataset([Source(str(two_sources[1]))], renderer, cache_dir=str(tmp_path / "cache"))
    found = cells_of(data, ["two.json", *data.summary.examples_by_source])
    rows = np.asarray(data.examples["row"][:])
    of_the_long = np.concatenate([cells for cells, row in zip(found, rows, strict=True) if row == 1]) % MAX_ANSWERS
    assert (np.diff(of_the_long) >= 0).all() and set(of_the_long) == set(range(MAX_ANSWERS))


def test_the_losses_of_targets_are_those_of_torch_and_change_no_gradient():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 9, dtype=torch.float64), torch.randint(9, (50,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    each = torch.empty(50, dtype=torch.float64)
    loss_of_logits(ours * 1, LossTerms(targets, scale=0.1, each=each)).backward()
    wanted = torch.nn.functional.cross_entropy(theirs, targets, reduction="none")
    (wanted.sum() * 0.1).backward()
    assert torch.allclose(each, wanted.detach()) and torch.allclose(ours.grad, theirs.grad)


def test_sums_are_a_plain_loops_and_what_is_not_finite_is_left_out():
    parts = LossBreakdown(["a", "b"], "cpu")
    cells = torch.tensor([0, 0, 1, MAX_ANSWERS, 2 * MAX_ANSWERS - 1])
    parts.add(cells, torch.tensor([1.0, 2.0, 4.0, 8.0, float("nan")]))
    parts.add(torch.tensor([0]), torch.tensor([6.0]))
    parts.take()
    assert parts.logged == {"loss_by_source": {"a": 13 / 4, "b": 8.0}, "loss_by_turn": {"1": 17 / 4, "2": 4.0}}
    parts.take()
    assert parts.logged == {}
