"""Modules that run a flat row conversation by conversation, because they carry something from token to token.

    hidden_states [1, 5, H]   a a a | b b      a convolution over time, a recurrence, a place in the row
    forward                   [1, 3, H]  [1, 2, H]  -> joined to [1, 5, H]

The boundaries are those of the row that the model computes (`segment_lengths`), also for code that does not pass them
on and for layers that activation checkpointing computes again.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

BOUNDARIES = ("position_ids", "segment_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
ONE_NEEDS_NONE = (*BOUNDARIES[2:], "seq_idx")  # some code refuses them where its kernels are not installed
CARRY = "they carry something from token to token"
MASKED = "their code reads a mask"
LONGEST_DECIDES = "its rotary embedding depends on the longest conversation of a row"
CHANGE = 0.02  # of the largest output: a smaller difference is rounding


class _Row:
    """The conversations of the row that a model computes now, or None outside of flat rows."""

    lengths: Sequence[int] | None = None


def lengths_of_row() -> Sequence[int] | None:
    """Return the tokens of each conversation of the flat row that is computed."""
    return _Row.lengths


@contextmanager
def _row(lengths: Sequence[int] | None) -> Iterator[None]:
    before, _Row.lengths = _Row.lengths, lengths
    try:
        yield
    finally:
        _Row.lengths = before


def follow_rows(base: Any) -> Callable[[], None]:
    """Let the modules of a model know the boundaries of its rows; return what ends that."""
    parameters = inspect.signature(type(base).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    has_convolution = any(isinstance(module, torch.nn.Conv1d) for module in base.modules())

    def enter(base: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        lengths = _Row.lengths = kwargs.get("segment_lengths")
        for module in base.modules() if base.training else ():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, _InItsRow):
                module._gradient_checkpointing_func = _InItsRow(function)
        boundaries = kwargs.get("cu_seq_lens_q")
        if lengths is not None and has_convolution and takes_any and boundaries is not None and boundaries.is_cuda:
            numbers = torch.arange(len(lengths), dtype=torch.int32, device=boundaries.device)
            kwargs["seq_idx"] = numbers.repeat_interleave(boundaries.diff(), output_size=sum(lengths))[None]
        taken = {name: value for name, value in kwargs.items() if takes_any or name in parameters}
        return args, taken if lengths is not None else kwargs

    def leave(*_: Any) -> None:
        _Row.lengths = None

    handles = [
        base.register_forward_pre_hook(enter, with_kwargs=True),
        base.register_forward_hook(leave, always_call=True),
    ]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


class _InItsRow:
    """A checkpointing function under which a layer that is computed again finds the row that it was computed in."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        lengths = _Row.lengths

        def run(*inputs: Any, **options: Any) -> Any:
            with _row(lengths):
                return layer(*inputs, **options)

        return self.function(run, *args, **kwargs)


class _BySegment:
    """The forward method of a module, called for each conversation of a flat row."""

    def __init__(
        self, module: torch.nn.Module, forward: Callable, reason: str, begin: Callable[[torch.nn.Module], None]
    ) -> None:
        self.module, self.forward, self.reason, self.begin = module, forward, reason, begin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lengths = _Row.lengths
        if lengths is None and self.module.training and torch.is_grad_enabled():
            raise ValueError(f"the boundaries of the conversations do not reach {type(self.module).__name__}")
        if lengths is None:
            return self.forward(*args, **kwargs)
        outputs, start = [], 0
        for length in lengths:
            self.begin(self.module)
            part = _part(args, sum(lengths), start, length), _part(kwargs, sum(lengths), start, length)
            with _row([length]):
                outputs.append(self.forward(*part[0], **part[1]))
            start += length
        return _joined(outputs)


def _part(value: Any, total: int, start: int, length: int, name: str = "") -> Any:
    """Return one conversation's share of an argument: of [1, T, ...], [3, 1, T], or a mask [1, 1, T, T]."""
    if isinstance(value, dict):
        return type(value)({name: _part(item, total, start, length, name) for name, item in value.items()})
    if name in ONE_NEEDS_NONE or value is None:
        return None
    if name == "segment_lengths":
        return [length]
    if isinstance(value, tuple | list):
        return type(value)(_part(item, total, start, length) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if _is_mask(value, total):
        return value[..., start : start + length, start : start + length]
    if value.shape[1] == total:
        return value.narrow(1, start, length)
    if value.ndim == 3 and value.shape[2] == total:
        return value.narrow(2, start, length)
    return value


def _is_mask(value: Any, total: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (total, total)


def _joined(outputs: list[Any]) -> Any:
    """Join what a module returned for each conversation: [1, T, ...], or [T, ...] of routers."""
    first = outputs[0]
    if isinstance(first, torch.Tensor) and first.ndim == 3 and not first.is_floating_point():
        most = max(output.shape[2] for output in outputs)  # tokens that an indexer chose: a repeated one adds nothing
        outputs = [torch.cat([o, o[..., -1:].expand(-1, -1, most - o.shape[2])], dim=2) for o in outputs]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs, dim=0 if first.ndim == 2 else 1) if first.ndim in (2, 3) else None
    if isinstance(first, dict):
        return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    return first


def _nothing(module: torch.nn.Module) -> None:
    pass


def run_by_segment(
    modules: Sequence[torch.nn.Module], reason: str, begin: Callable[[torch.nn.Module], None] = _nothing
) -> None:
    """Let modules run each conversation of a flat row by itself; `begin` is called with the module before each."""
    for module in modules:
        if isinstance(module.forward, _BySegment):
            continue
        module.forward = _BySegment(module, module.forward, reason, begin)


def run_whole(base: Any) -> None:
    """Undo `run_by_segment` for all modules of a model."""
    for module in by_segment(base):
        del module.forward


def by_segment(base: Any) -> list[Any]:
    """Return the modules that run by segment."""
    return [module for module in base.modules() if isinstance(module.forward, _BySegment)]


def by_segment_note(base: Any) -> str | None:
    """Say which modules run by segment and why, if any do; those without parameters are parts of others."""
    modules = [
        module for module in by_segment(base) if _is_dynamic(module) or next(module.parameters(), None) is not None
    ]
    counts = Counter((type(module).__name__, module.forward.reason) for module in modules)
    return (
        "; ".join(
            f"{count} {name} computed conversation by conversation, because {reason}"
            for (name, reason), count in counts.items()
        )
        or None
    )


def split_carrying_modules(base: Any, row: Callable[[], Any], boundary: int, total: int) -> int:
    """Let the innermost modules that carry something over a boundary run by segment; return how many these are.

    Each module that maps [1, T, ...] or token ids [1, T] to [1, T, ...] is called once more, with the token before the
    boundary changed: it carries if outputs behind the boundary change, or if it refuses a flat row. Modules that are
    given a mask of the whole row are left out: it has T x T numbers.

    Args:
        row: computes a flat row of `total` tokens, of which a conversation ends at token `boundary`.
    """
    count, is_examined = 0, False

    def examined(module: torch.nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        nonlocal count, is_examined
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if is_examined or not given or not _is_of_row(given[0], total):
            return forward(*args, **kwargs)
        before = count
        try:
            output = forward(*args, **kwargs)
            if count > before or any(value.shape[-2:] == (total, total) for value in given):
                return output
            is_examined = True
            carries = _carries(forward, args, kwargs, output, boundary, total)
        except Exception:
            if count > before:
                raise
            carries = True
        finally:
            is_examined = False
        if not carries:
            return output
        chosen[module] = _BySegment(module, forward, CARRY, _nothing)
        output = chosen[module](*args, **kwargs)
        count += 1
        return output

    chosen: dict[torch.nn.Module, _BySegment] = {}
    own = {module: module.__dict__.get("forward") for module in base.modules()}
    modules = [module for module in own if not isinstance(module.forward, _BySegment)]
    for module in modules:
        module.forward = partial(examined, module, module.forward)
    try:
        row()
    finally:
        for module in modules:
            del module.forward
            if own[module] is not None:
                module.forward = own[module]
    run_by_segment(list(chosen), CARRY)
    return len(chosen)


@contextmanager
def convolutions_show(base: Any) -> Iterator[None]:
    """Let convolutions over time that are zero until their first step (Qwen4-Exp) carry something in a trial."""

    def computed(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if module.weight.any():
            return output
        return module._conv_forward(args[0], torch.ones_like(module.weight), module.bias)

    handles = [module.register_forward_hook(computed) for module in base.modules() if type(module) is torch.nn.Conv1d]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_masked_modules(base: Any, row: Callable[[], Any], total: int) -> None:
    """Let attention that is given the mask of a whole row [1, 1, T, T] run by segment; layers as a whole do not.

    Args:
        row: computes a flat row of `total` tokens.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    masked: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(_is_mask(value, total) for value in (*args, *kwargs.values())):
            masked.append(module)

    modules = [module for module in base.modules() if not isinstance(module, GradientCheckpointingLayer)]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        row()
    finally:
        for handle in handles:
            handle.remove()
    inner = {part for module in masked for part in module.modules() if part is not module}
    for part in inner.intersection(by_segment(base)):
        del part.forward
    run_by_segment([module for module in dict.fromkeys(masked) if module not in inner], MASKED)


def _is_of_row(value: Any, total: int) -> bool:
    """Whether this is states [1, T, ...] or token ids [1, T] of the row."""
    is_tensor = isinstance(value, torch.Tensor) and value.ndim == (3 if value.is_floating_point() else 2)
    return is_tensor and value.shape[1] == total


def _carries(forward: Callable, args: tuple, kwargs: dict[str, Any], output: Any, boundary: int, total: int) -> bool:
    expected = _first(output)
    if expected is None or expected.shape[:2] != (1, total):
        return False

    def changed(value: Any) -> Any:
        if not _is_of_row(value, total):
            return value
        result, last = value.clone(), value[:, boundary - 1]
        other = value[:, boundary] + value.abs().mean() if value.is_floating_point() else value.max()
        result[:, boundary - 1] = torch.where(last == other, value.min(), other)
        return result

    result = _first(forward(*map(changed, args), **{name: changed(value) for name, value in kwargs.items()}))
    difference = 0 if result is None else (result - expected)[:, boundary:].abs().max()
    return bool(difference > CHANGE * expected.abs().max())


def _first(output: Any) -> torch.Tensor | None:
    """Return the hidden states of a module's output, if they are [1, T, ...]; places of tokens are none."""
    output = output[0] if isinstance(output, tuple | list) and output else output
    is_tensor = isinstance(output, torch.Tensor) and output.is_floating_point()
    return output if is_tensor and output.ndim == 3 else None


def rows_decide_rope(base: Any, longest: int) -> list[torch.nn.Module]:
    """Find the rotary embeddings whose factors depend on the longest conversation of a row (longrope, dynamic)."""
    return [module for module in base.modules() if _is_dynamic(module) and longest > _rope_limit(module)]


def _is_dynamic(module: Any) -> bool:
    types = getattr(module, "rope_type", None)
    types = types.values() if isinstance(types, dict) else [types]
    return any(kind == "longrope" or "dynamic" in (kind or "") for kind in types)


def _rope_limit(module: Any) -> int:
    """Return the tokens up to which the factors are the same."""
    parameters = module.config.rope_parameters
    layers = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    limits = [kind.get("original_max_position_embeddings") for kind in layers]
    return min((limit for limit in limits if limit), default=module.config.max_position_embeddings)


def forget_longer_rows(module: Any) -> None:
    """Reset the factors of `dynamic`, which otherwise stay those of the longest conversation so far."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        prefix = name.removesuffix("max_seq_len_cached")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if original is not None and getattr(module, name) != module.original_max_seq_len:
            setattr(module, name, module.original_max_seq_len)
            buffer = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(buffer.device), persistent=False)
