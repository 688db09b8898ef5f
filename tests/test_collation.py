"""Batches: what is padding is known by length, so a pad token that ends turns hides nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.collation import PaddedCollator, pad_token_id
from finetune.rendering import IGNORE_INDEX

END = 2


def test_the_drawing():
    batch = PaddedCollator(0)(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert (batch["num_tokens"], batch["num_supervised_tokens"]) == (5, 3)


def test_a_pad_token_that_ends_turns_hides_no_end_of_turn():
    batch = PaddedCollator(END)(
        [{"input_ids": [4, 5, END], "labels": [-100, 5, END]}, {"input_ids": [4], "labels": [-100]}]
    )
    assert batch["labels"][0].tolist() == [-100, 5, END]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1]
    assert batch["labels"][1].tolist() == [-100] * 3


def test_the_pad_id_of_a_tokenizer_without_one():
    class Tokenizer:
        pad_token_id = None
        eos_token_id = END

    assert pad_token_id(Tokenizer) == END
    Tokenizer.eos_token_id = None
    assert pad_token_id(Tokenizer) == 0


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 9))
def test_every_row_comes_back_whole(rows, pad):
    batch = PaddedCollator(pad)([{"input_ids": row, "labels": [IGNORE_INDEX, *row[1:]]} for row in rows])
    for row, ids, labels, mask in zip(
        rows, batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        assert ids[mask].tolist() == row
        assert labels[mask].tolist() == [IGNORE_INDEX, *row[1:]]
        assert torch.all(labels[~mask] == IGNORE_INDEX) and torch.all(ids[~mask] == pad)
    assert batch["num_tokens"] == sum(map(len, rows)) == int(batch["attention_mask"].sum())
    assert batch["num_supervised_tokens"] == int((batch["labels"] != IGNORE_INDEX).sum())
