"""Ask a model questions: score given answers by their probability, or let it write answers."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from finetune.chat_templates import IGNORE_INDEX, ChatFormat, UnrenderableError, prompt_ids, tokenize_conversation
from finetune.conversation import Conversation, Turn
from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.evaluation.token_losses import MeasuredModel
from finetune.inference.answer_turns import answer_turn
from finetune.inference.generate import SamplingParams
from finetune.models.attention import supports_logits_to_keep
from finetune.models.module_kinds import unwrap_adapter
from finetune.utils.errors import ConfigError

Done = Callable[[int], None]


class Candidate(NamedTuple):
    """A tokenized question and one of its answers, without the end of the turn."""

    prompt: list[int]
    answer: list[int]
    num_bytes: int  # of the answer's text in UTF-8


Choice = list[Candidate]  # all of one question


def scores_of(
    model: MeasuredModel, questions: Sequence[tuple[str, Sequence[str]]], *, batch_size: int, done: Done
) -> list[list[float]]:
    """Compute log p per byte of each candidate of each (question, candidates), on every rank.

    A question is computed once and its cache serves all candidates, of which each question has the same number. Models
    without `position_ids` compute each conversation as a whole.
    """
    choices = [
        [_tokenize(model.chat_format, question, text) for text in candidates] for question, candidates in questions
    ]
    forward = type(unwrap_adapter(model.model)).forward
    uses_cache = not model.has_virtual_tokens and "position_ids" in inspect.signature(forward).parameters
    scores: dict[int, list[float]] = {}
    for group in _groups_of_rank([len(choice[0].prompt) for choice in choices], batch_size):
        batch = [choices[index] for index in group]
        if uses_cache:
            sums = _sums_with_cache(model, batch)
        else:
            sums = [_sums_of_whole(model, choice) for choice in batch]
        for index, choice_sums in zip(group, sums, strict=True):
            scores[index] = [
                total / candidate.num_bytes for total, candidate in zip(choice_sums, choices[index], strict=True)
            ]
        done(len(group))
    return _gather(scores)


def _groups_of_rank(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices of similar length and return this rank's groups; the grouping does not depend on the ranks."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    groups = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return groups[get_rank() :: get_world_size()]


def _gather(results: dict[int, Any]) -> list[Any]:
    """Gather the results of all ranks, in the order of their indices."""
    gathered = {index: result for part in all_gather_object(results) for index, result in part.items()}
    return [gathered[index] for index in range(len(gathered))]


def _tokenize(chat_format: ChatFormat, question: str, text: str) -> Candidate:
    try:
        tokenized = tokenize_conversation(chat_format, Conversation((Turn("human", question), Turn("model", text))))
    except UnrenderableError as error:
        raise ConfigError(f"the chat format cannot express a question: {error}") from None
    answer = tokenized.supervised_spans[-1]
    stop = answer.stop - answer.ended
    return Candidate(tokenized.input_ids[: answer.start], tokenized.input_ids[answer.start : stop], len(text.encode()))


def _sums_of_whole(model: MeasuredModel, choice: Choice) -> list[float]:
    """Compute log p of each candidate from whole conversations."""
    examples = [
        {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer} for prompt, answer, _ in choice
    ]
    losses = model.token_losses(examples)
    ends = np.cumsum([len(candidate.answer) for candidate in choice])
    return [-float(part.sum()) for part in np.split(losses, ends[:-1])]


def _sums_with_cache(measured: MeasuredModel, choices: Sequence[Choice]) -> list[list[float]]:
    """Compute log p of the candidates of a batch of questions.

    prompts      p p 1 2 3     candidates, a row each       7 8 9     positions  3 4 5
                 1 2 3 4 5     after the cached prompt      7 8 p                5 6 -
    """
    model, device, pad_token_id = measured.model, measured.device, measured.pad_token_id
    count = len(choices[0])
    prompts, mask = _pad([choice[0].prompt for choice in choices], pad_token_id, device, side="left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, ids_mask = _pad([candidate.answer for choice in choices for candidate in choice], pad_token_id, device)
    last_only = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}
    with torch.no_grad():
        output = model(input_ids=prompts, attention_mask=mask, position_ids=positions, use_cache=True, **last_only)
        cache, first_logits = output.past_key_values, output.logits[:, -1].repeat_interleave(count, 0)
        cache.batch_repeat_interleave(count)
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([mask.repeat_interleave(count, 0), ids_mask], dim=1),
            position_ids=positions[:, -1:].repeat_interleave(count, 0) + 1 + torch.arange(ids.shape[1], device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([first_logits[:, None], logits[:, :-1]], dim=1)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    return (-(losses * ids_mask).sum(1)).view(len(choices), count).tolist()


def _pad(
    rows: Sequence[list[int]], pad_token_id: int, device: Any, *, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their attention mask, int64 [rows, longest]."""
    ids = [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(ids, padding_value=pad_token_id), pad(mask)


def answers_of(
    model: MeasuredModel, questions: Sequence[str], *, max_new_tokens: int, batch_size: int, done: Done
) -> list[str]:
    """Generate a greedy answer to each question, on every rank: its text without reasoning."""
    try:
        asked = [Conversation((Turn("human", question),)) for question in questions]
        prompts = [prompt_ids(model.chat_format, conversation) for conversation in asked]
    except UnrenderableError as error:
        raise ConfigError(f"the chat format cannot express a question: {error}") from None
    generated = generate_ids(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, done=done)
    return [
        answer_turn(model.chat_format, *answered).text.strip()
        for answered in zip(asked, prompts, generated, strict=True)
    ]


def generate_ids(
    model: MeasuredModel, prompts: Sequence[list[int]], *, max_new_tokens: int, batch_size: int, done: Done
) -> list[list[int]]:
    """Generate greedily behind each prompt, on every rank: the ids up to and without the first stop token.

    Prompts of similar length form a batch, padded on the left; the batches do not depend on the ranks.
    """
    stops = list(model.stop_token_ids)
    if model.has_virtual_tokens:  # peft leaves positions to the model then, which would count padding
        batch_size = 1
    answers: dict[int, list[int]] = {}
    for group in _groups_of_rank([len(prompt) for prompt in prompts], batch_size):
        ids, mask = _pad([prompts[index] for index in group], stops[0], model.device, side="left")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            generated = model.model.generate(
                input_ids=ids,
                attention_mask=mask,
                eos_token_id=stops,
                pad_token_id=stops[0],
                **SamplingParams(max_new_tokens=max_new_tokens).generate_options(),
            )
        for index, row in zip(group, generated[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = [*takewhile(lambda token: token not in stops, row)]
        done(len(group))
    return _gather(answers)
