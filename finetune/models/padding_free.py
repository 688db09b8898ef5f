"""Switch a model to flat rows, after a trial that they give what single conversations give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch

from finetune.config.hardware import Precision
from finetune.distributed.collectives import first_not_none
from finetune.models import segments
from finetune.models.attention import (
    FLAT_ATTENTION,
    has_kernel,
    padding_free_attention,
    register_flat_attention,
    sliding_window_of,
    unsupported_config_reason,
)
from finetune.models.compat import each_row_alone, make_masks_without_waiting
from finetune.models.loader import torch_dtype
from finetune.models.module_kinds import output_embeddings, unwrap_adapter
from finetune.models.zero3 import gather_as_a_whole, gather_per_module, is_partitioned
from finetune.utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)
ATTENTION_LOOP = partial(padding_free_attention, uses_kernel=False)
LEAK = "in a trial, a conversation attended to the one before it"


def enable_padding_free(
    model: Any,
    *,
    longest: int,
    vocab_size: int,
    device: torch.device | str,
    autocast: Precision = "float32",
    shared: bool = False,
) -> str | None:
    """Switch a model to flat rows; if it cannot run them, leave it unchanged and return the reason.

    The config is checked first. Then random conversations are run: in one row, and alone with the stock attention.
    Where torch's kernel for attention fails, attention runs conversation by conversation, as do layers that carry
    something from one to the next (a convolution over time, a recurrence). If padded rows differ from single
    conversations too, the whole model does.
    All ranks must call this together, and decide alike.

    Args:
        longest: Tokens of the longest conversation.
        device: Device of the model's parameters, also of gathered ones.
        autocast: What autocast will compute in; float32: without autocast.
        shared: Ranks will share rows (sequence parallelism), for which attention must receive the positions.
    """
    base = unwrap_adapter(model)
    was_training = model.training
    make_masks_without_waiting()
    unfollow = segments.follow_rows(base)
    trial = Trial(model, base, vocab_size, device, autocast)
    ropes = segments.rows_decide_rope(base, longest)
    try:
        model.eval()
        reason = first_not_none(_reason_against_flat_rows(trial, ropes, longest, shared))
        if reason is None:
            if trial.is_partitioned:  # ranks have different numbers of conversations
                gather_as_a_whole(segments.by_segment(base))
            base.register_forward_pre_hook(_refuse_masks_and_caches, with_kwargs=True, prepend=True)
            return None
        trial.undo()
        if shared:
            unfollow()
            return reason
        tried = None if ropes else trial.attempt(lambda: trial.padded_reason(longest))
        differs = first_not_none(segments.LONGEST_DECIDES if ropes else tried)
        if differs and not trial.is_partitioned:
            segments.run_by_segment(ropes, segments.LONGEST_DECIDES, segments.forget_longer_rows)
            segments.run_by_segment([_decoder(base)], f"{reason}; {differs}")
            if first_not_none(trial.reason()) is None:
                return None
            trial.undo()
        unfollow()
        if differs:
            reason += f"; {differs}, so that a loss depends on the rows beside it: --per_device_train_batch_size 1"
        return reason
    finally:
        model.train(was_training)


def check_causal(model: Any, *, vocab_size: int, device: torch.device | str, autocast: Precision) -> None:
    """Check that no token attends to later ones (BERT; PaliGemma with `sdpa` in transformers 5.23). All ranks.

    Raises:
        ConfigError: some do: they would read what they are to predict.
    """
    trial, was_training = Trial(model, unwrap_adapter(model), vocab_size, device, autocast), model.training
    model.eval()
    trial.attempt(trial.look_ahead)
    model.train(was_training)
    if first_not_none("" if trial.looks_ahead else None) is not None:
        raise ConfigError(
            f"the tokens of this model attend to later ones with {trial.stock} attention, and would read what they "
            "are to predict: give --attn_implementation eager, or a causal language model"
        )


def _reason_against_flat_rows(trial: Trial, ropes: list[Any], longest: int, shared: bool) -> str | None:
    base = trial.base
    reason = unsupported_config_reason(base.config, longest)
    if reason or (shared and ropes):
        return reason or segments.LONGEST_DECIDES
    can_set = "flash" in trial.stock or base._can_set_attn_implementation()
    by_place = [module for module in base.modules() if getattr(module, "attn_temperature_tuning", False)]
    segments.run_by_segment(by_place, "they scale queries by the place in the row")  # Llama 4
    segments.run_by_segment(ropes, segments.LONGEST_DECIDES, segments.forget_longer_rows)
    window = sliding_window_of(base.config, longest)
    reason = trial.choose_attention(window, shared) if can_set else trial.reason(window, shared)
    reason = trial.without_carrying(reason, window, shared)
    if reason and not shared and trial.split_masked_attention(window):
        reason = trial.without_carrying(trial.reason(window), window)
    if shared and reason is None and (note := segments.by_segment_note(base)):
        return f"ranks cannot share a conversation: {note}"
    if not can_set and (reason or segments.by_segment_note(base) is None):
        return "its code does not take attention functions from transformers"
    return reason


class Trial:
    """Runs of random conversations, b a b, with a model: in a flat row, alone, in padded rows."""

    def __init__(self, model: Any, base: Any, vocab_size: int, device: Any, autocast: Precision) -> None:
        self.model, self.base, self.stock = model, base, base.config._attn_implementation
        self.attention: Callable | None = padding_free_attention  # of flat rows; None: the stock one
        self.calls_kernel = False
        self.is_partitioned, self.looks_ahead = is_partitioned(base), False
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randint(vocab_size, (size,), generator=generator).to(device) for size in (7, 5))
        self.changed = torch.cat([self.a[:-1], (self.a[-1:] + 1) % vocab_size])
        self.autocast = torch_dtype(autocast)
        is_16_bit = not {next(base.parameters()).dtype, self.autocast}.isdisjoint((torch.float16, torch.bfloat16))
        self.loose, self.tight = (5e-2, 1e-3) if is_16_bit else (1e-4, 1e-5)  # relative to the largest logit

    def choose_attention(self, window: int | None, shared: bool) -> str | None:
        """Take the first of flash attention, torch's kernel and a loop that gives what single conversations give.

        Returns:
            Why none does, and then the first one is taken.
        """
        candidates = [*([None] if "flash" in self.stock else []), padding_free_attention, ATTENTION_LOOP]
        reasons = []
        for self.attention in candidates:
            self._use_attention()
            reasons.append(self.reason(window, shared))
            if first_not_none(reasons[-1]) is None:
                if len(reasons) > 1:
                    instead = "torch's kernel, or one" if self.attention is padding_free_attention else "one"
                    logger.info(f"note: fallback to attention by {instead} conversation at a time because {reasons[0]}")
                return None
            if first_not_none("another" if self.attention is None or self.calls_kernel else None) is None:
                break
        self.attention = candidates[0]
        self._use_attention()
        return reasons[0]

    def _use_attention(self) -> None:
        if self.attention is not None:
            register_flat_attention(self.attention)
            self.base.set_attn_implementation(FLAT_ATTENTION)
        else:
            self.base.set_attn_implementation(self.stock)

    def reason(self, window: int | None = None, shared: bool = False) -> str | None:
        """Return why flat rows do not give what single conversations give, or None."""
        return self.attempt(lambda: self._flat_reason(window, shared))

    def without_carrying(self, reason: str | None, window: int | None, shared: bool = False) -> str | None:
        """Let modules that carry something over a boundary run by segment; return the reason that is left."""
        while reason and self._split_carrying_modules():
            reason = self.reason(window, shared)
        return reason

    def split_masked_attention(self, window: int | None) -> bool:
        """Let the model's own attention run by segment, if it is given a mask: it may choose tokens by it."""
        self.attention = None
        self._use_attention()
        self.without_carrying(self.reason(window), window)
        row, total = partial(_logits, self.base, [self.b, self.a, self.b]), len(self.a) + 2 * len(self.b)
        self.attempt(lambda: segments.split_masked_modules(self.base, row, total))
        return bool(segments.by_segment(self.base))

    def _split_carrying_modules(self) -> bool:
        """Let modules that carry something over the boundary before the last b run by segment, if there are any."""
        row = partial(_logits, self.base, [self.b, self.a, self.b])
        count = 0

        def search() -> None:
            nonlocal count
            boundary = len(self.b) + len(self.a)
            count = segments.split_carrying_modules(self.base, row, boundary, boundary + len(self.b))

        return not self.attempt(search) and count > 0

    def look_ahead(self) -> None:
        """Find out whether another token at the end of a conversation changes the logits at all places before it.

        At some places they may change in a causal model: an expert that works on other tokens rounds otherwise, and a
        router further up decides a tie the other way.
        """
        rows = (
            self.base(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in (self.a, self.changed)
        )
        logits, other = rows
        self.looks_ahead = bool((logits - other).abs().amax(-1).min() > self.loose * logits.abs().max())

    def undo(self) -> None:
        """Let the model compute what it computed before."""
        segments.run_whole(self.base)
        register_flat_attention()
        self.base.set_attn_implementation(self.stock)

    def attempt(self, run: Callable[[], str | None]) -> str | None:
        """Return what `run` returns, or why it failed."""
        try:
            casts = torch.autocast(self.a.device.type, self.autocast, enabled=self.autocast != torch.float32)
            seen = segments.convolutions_show(self.base)
            with seen, gather_per_module(self.model), each_row_alone(self.base), torch.no_grad(), casts:
                return run()
        except Exception as error:  # the code of a model may raise anything: fall back to padded rows
            return f"a trial with random conversations failed: {first_line(error)[:200]}"

    def _alone(self) -> torch.Tensor:
        current = self.base.config._attn_implementation
        self.base.set_attn_implementation("sdpa" if "flash" in self.stock and self.attention else self.stock)
        logits = self.base(input_ids=self.b[None], use_cache=False).logits[0].float()
        self.base.set_attn_implementation(current)
        return logits

    def padded_reason(self, longest: int) -> str | None:
        """Return why padded rows of `longest` tokens do not give what single conversations give, or None."""
        rows = torch.zeros(2, max(longest, len(self.b)), dtype=torch.int64, device=self.b.device)
        rows[0], rows[1, : len(self.b)] = self.b.repeat(rows.shape[1])[: rows.shape[1]], self.b
        mask = torch.ones_like(rows)
        mask[1, len(self.b) :] = 0
        alone = self.base.base_model(input_ids=self.b[None], use_cache=False)[0][0].float()
        padded = self.base.base_model(input_ids=rows, attention_mask=mask, use_cache=False)[0][1, : len(self.b)].float()
        difference, scale = (padded - alone).abs().max().item(), alone.abs().max().item()
        differs = not difference <= self.loose * scale
        return f"its padded rows differ from single conversations (by {difference / scale:.1e})" if differs else None

    def _flat_reason(self, window: int | None, shared: bool) -> str | None:
        """Compare the last b with b alone, before which another token may stand.

        The first b follows nothing, so its difference is rounding, unless the attention differs from the model's own.
        All three as one conversation show the difference that a leak would make.
        """
        a, b, base = self.a, self.b, self.base
        windows: set[int | None] = set()
        has_positions: set[bool] = set()
        self.calls_kernel = False

        def recording_attention(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
            windows.add(sliding_window)
            has_positions.add(kwargs.get("position_ids") is not None)
            self.calls_kernel |= self.attention is not ATTENTION_LOOP and has_kernel(*args[1:4])
            return cast(Callable, self.attention)(*args, sliding_window=sliding_window, **kwargs)

        is_own = base.config._attn_implementation == FLAT_ATTENTION
        if is_own:
            register_flat_attention(recording_attention)
        try:
            flat = _logits(base, [b, a, b])
            joined = _logits(base, [torch.cat([b, a, b])])[-len(b) :]
        finally:
            if is_own:
                register_flat_attention(self.attention)
        if window is not None and windows and window not in windows:
            return f"its sliding window of {window} tokens does not reach the attention"
        if shared and False in has_positions:
            return "its attention is not told the positions"
        alone = self._alone()
        rounding, difference, leaked = (
            (logits - alone).abs().max().item() for logits in (flat[: len(b)], flat[-len(b) :], joined)
        )
        scale = alone.abs().max().item()
        if not rounding <= self.loose * scale:
            return f"in a trial, its own attention computed something else (logits differ by {rounding:.1e})"
        allowed = 8 * rounding + self.tight * scale
        other = (_logits(base, [b, self.changed, b]) - flat)[-len(b) :].abs().max().item()
        if not max(difference, other) <= allowed:
            return f"{LEAK} (logits differ by {max(difference, other):.1e})"
        if not leaked > 2 * allowed:
            return f"a trial could not show whether conversations are separate (if not, logits differ by {leaked:.1e})"
        if self.is_partitioned or not any(weight.requires_grad for weight in base.parameters()):
            return None
        return self._gradient_reason()

    def _gradient_reason(self) -> str | None:
        """The last b has exactly no gradient with respect to the tokens before it, in any precision."""
        inputs: list[torch.Tensor] = []

        def as_input(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
            inputs.append(output.detach().requires_grad_())
            return inputs[-1]

        hook = self.base.get_input_embeddings().register_forward_hook(as_input)
        try:
            with torch.enable_grad():
                loss = _logits(self.base, [self.b, self.a, self.b])[-len(self.b) :].square().sum()
                parts = torch.autograd.grad(loss, inputs, allow_unused=True)
        finally:
            hook.remove()
        if sum(given.shape[-2] for given in inputs) != len(self.a) + 2 * len(self.b):
            return None  # a model that embeds tokens of its own, too
        gradients = torch.cat(
            [torch.zeros_like(given[0]) if part is None else part[0] for given, part in zip(inputs, parts, strict=True)]
        )
        leaked = gradients[: -len(self.b)].abs().max().item()
        return f"{LEAK} (gradient {leaked:.1e})" if leaked else None


def _decoder(base: Any) -> Any:
    """Return all of a model but its head, which may be asked for the logits of places in the row."""
    head, embeddings = output_embeddings(base), base.get_input_embeddings()
    parts = ((module, set(module.modules())) for module in base.modules() if module is not embeddings)
    return next((module for module, inner in parts if embeddings in inner and head not in inner), base.base_model)


def _logits(base: Any, conversations: list[torch.Tensor]) -> torch.Tensor:
    """Compute the logits of a flat row, float32 [T, V]."""
    lengths = [len(conversation) for conversation in conversations]
    ids = torch.cat(conversations)
    boundaries = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
    return base(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None],
        use_cache=False,
        segment_lengths=lengths,
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits[0].float()  # fmt: skip


def _refuse_masks_and_caches(base: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for a mask or a cache, with which transformers would silently mix the conversations of a flat row."""
    if "cu_seq_lens_q" not in kwargs and base.config._attn_implementation != FLAT_ATTENTION:
        return
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        raise ValueError("a flat row cannot have an attention mask or a cache: its conversations would be mixed")
    if kwargs.get("use_cache") is not False or kwargs.get("position_ids") is None:
        raise ValueError("a flat row needs use_cache=False and position_ids: its conversations would be mixed")
