"""A model is asked: which of several answers it finds likeliest, and what it writes itself."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat_templates import IGNORE_INDEX, ChatFormat, UnrenderableError, prompt_ids, tokenize_conversation
from finetune.conversation import Turn
from finetune.distributed.collectives import all_gather_object, get_rank, get_world_size
from finetune.evaluation.token_losses import device_of, token_losses_of
from finetune.utils.errors import ConfigError

Done = Callable[[int], None]


@dataclass(frozen=True)
class AnswerChoice:
    """A question as ids, and its candidates, the end of the turn left out. Behind the prompt all candidates part."""

    prompt: list[int]
    candidates: list[list[int]]
    num_bytes: list[int]


def scores_of(
    model: Any,
    chat_format: ChatFormat,
    asked: Sequence[tuple[str, Sequence[str]]],
    *,
    pad_token_id: int,
    has_virtual_tokens: bool,
    batch_size: int,
    done: Done,
) -> list[list[float]]:
    """log p of each candidate of each (question, candidates) over its bytes, on every rank.

    A question is computed once, and its cache serves all candidates; a model that cannot do so is given each
    conversation whole.

    Raises:
        ConfigError: the chat format cannot express a question.
    """
    choices = [_choice(chat_format, question, candidates) for question, candidates in asked]
    by_cache = not has_virtual_tokens and "position_ids" in inspect.signature(code_of(model)).parameters
    found: dict[int, list[float]] = {}
    for group in _groups([len(one.prompt) for one in choices], batch_size):
        chosen = [choices[number] for number in group]
        if by_cache:
            sums = _by_cache(model, chosen, pad_token_id)
        else:
            sums = [_whole(model, one, pad_token_id, has_virtual_tokens) for one in chosen]
        for number, own in zip(group, sums, strict=True):
            found[number] = [total / size for total, size in zip(own, choices[number].num_bytes, strict=True)]
        done(len(group))
    return _of_all_ranks(found)


def code_of(model: Any) -> Any:
    """The forward function of the model itself, below an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).forward


def _groups(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """This rank's groups of numbers of like length; which belong together does not depend on the ranks."""
    order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
    groups = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    return groups[get_rank() :: get_world_size()]


def _of_all_ranks(found: dict[int, Any]) -> list[Any]:
    everything = {number: one for part in all_gather_object(found) for number, one in part.items()}
    return [everything[number] for number in range(len(everything))]


def _choice(chat_format: ChatFormat, question: str, candidates: Sequence[str]) -> AnswerChoice:
    prompt, ids = _prompt(chat_format, question), []
    for candidate in candidates:
        layout = tokenize_conversation(chat_format, [Turn("human", question), Turn("model", candidate)])
        answer = layout.supervised_spans[-1]
        ids.append(layout.input_ids[answer.start : answer.stop - answer.ended])
    return AnswerChoice(prompt, ids, [len(candidate.encode()) for candidate in candidates])


def _prompt(chat_format: ChatFormat, question: str) -> list[int]:
    try:
        return prompt_ids(chat_format, [Turn("human", question)])
    except UnrenderableError as refusal:
        raise ConfigError(f"the chat format cannot express a question: {refusal}") from None


def _by_cache(model: Any, choices: Sequence[AnswerChoice], pad_token_id: int) -> list[list[float]]:
    """log p of the candidates, all questions of a batch at once.

    prompts      p p 1 2 3     candidates, a row each     7 8 9     positions  3 4 5
                 1 2 3 4 5     behind the cached prompt   7 8 p                5 6 -
    """
    import torch

    from finetune.models.attention import supports_logits_to_keep

    device = device_of(model)
    prompts, mask = _padded([one.prompt for one in choices], pad_token_id, device, in_front=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [ids for one in choices for ids in one.candidates]
    counts = torch.tensor([len(one.candidates) for one in choices], device=device)
    ids, real = _padded(rows, pad_token_id, device)
    last_only = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}
    with torch.no_grad():
        read = model(input_ids=prompts, attention_mask=mask, position_ids=positions, use_cache=True, **last_only)
        cache, first = read.past_key_values, read.logits[:, -1].repeat_interleave(counts, 0)
        if len(set(counts.tolist())) > 1:
            raise ValueError("questions of a batch need as many candidates")
        cache.batch_repeat_interleave(int(counts[0]))
        behind = positions[:, -1:].repeat_interleave(counts, 0) + 1 + torch.arange(ids.shape[1], device=device)
        seen = torch.cat([mask.repeat_interleave(counts, 0), real], dim=1)
        logits = model(
            input_ids=ids, attention_mask=seen, position_ids=behind, past_key_values=cache, use_cache=True
        ).logits
        logits = torch.cat([first[:, None], logits[:, :-1]], dim=1)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    sums = iter((-(losses * real).sum(1)).tolist())
    return [[next(sums) for _ in one.candidates] for one in choices]


def _padded(rows: Sequence[list[int]], pad_token_id: int, device: Any, *, in_front: bool = False) -> tuple[Any, Any]:
    """int64 [rows, longest] ids, and as many 1 where they are real."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    real = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if in_front else slice(0, len(row))
        ids[number, place], real[number, place] = torch.tensor(row), 1
    return ids.to(device), real.to(device)


def _whole(model: Any, choice: AnswerChoice, pad_token_id: int, has_virtual_tokens: bool) -> list[float]:
    """The same, from each conversation whole, one by one."""
    sums = []
    for ids in choice.candidates:
        labels = [IGNORE_INDEX] * len(choice.prompt) + ids
        example = {"input_ids": choice.prompt + ids, "labels": labels}
        sums.append(-float(token_losses_of(model, [example], pad_token_id, False, has_virtual_tokens).sum()))
    return sums


def answers_of(
    model: Any,
    chat_format: ChatFormat,
    questions: Sequence[str],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Done,
) -> list[str]:
    """What the model writes, greedily, as an answer to each question; on every rank.

    Questions of like length are asked together, padded in front; which these are does not depend on the ranks.

    Raises:
        ConfigError: the chat format cannot express a question.
    """
    import torch

    prompts = [_prompt(chat_format, question) for question in questions]
    tokenizer, device = chat_format.plain.tokenizer, device_of(model)
    found: dict[int, str] = {}
    for group in _groups([len(one) for one in prompts], batch_size):
        ids, mask = _padded([prompts[number] for number in group], stop_token_ids[0], device, in_front=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(stop_token_ids),
                pad_token_id=stop_token_ids[0],
            )
        for number, own in zip(group, made[:, ids.shape[1] :].tolist(), strict=True):
            found[number] = tokenizer.decode(own, skip_special_tokens=True).strip()
        done(len(group))
    return _of_all_ranks(found)
