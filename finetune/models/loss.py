"""Cross-entropy at supervised positions, together with the model's head: all logits never exist at once.

    hidden states [P, H] -> head -> logits [R, V] of R rows -> loss, and gradient in the place of the logits
                                                            -> gradients of these hidden states and of the head

Both gradients are made in the forward pass, a part of the rows at a time, and are multiplied by the gradient of the
loss in the backward pass. Under ZeRO-3 the head is one module that is called once: it is gathered once in each pass.

The stock loss keeps four float32 arrays of the size of the logits in addition to the logits: a copy, its log-softmax,
and the gradients of both. A model whose head cannot be replaced (`loss_head`) computes logits of the supervised
positions; the gradient is written over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.dataset.collator import Targets

# Bytes of float32 logits processed at a time: what fits a CPU's cache; what keeps a GPU busy.
CHUNK_BYTES, GPU_CHUNK_BYTES = 2 << 20, 64 << 20
# Bytes of the logits that a head computes at a time: enough rows for matrix products at full rate.
HEAD_BYTES, GPU_HEAD_BYTES = 32 << 20, 192 << 20
SUM_BYTES = 32 << 20  # of a product that is added to a sum in another dtype


@dataclass
class LossTerms:
    """What a loss is computed of beside logits; `loss` is set by a head that computed it.

    Attributes:
        targets: int64 [P].
        positions: where the targets are predicted: indices [P] into [1, T, ...], or a bool mask [rows, L] for
            [rows, L, ...], after any virtual tokens. None: the model computes these positions only.
        weights: float32 [P], or None for 1 each.
        scale: usually one over the denominator of the mean.
        smoothing: share of each target that is spread evenly over the vocabulary (Szegedy et al., 2016).
        each: [P], filled with the loss of each target: not scaled, not weighted, without a gradient.
    """

    targets: torch.Tensor
    positions: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    scale: float = 1.0
    smoothing: float = 0.0
    each: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Return the rows [P, N] of logits or hidden states [..., N] that predict the targets."""
        for name in ("targets", "positions", "weights"):  # the layers of a model may be on several devices
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(states.device))
        if self.positions is not None:
            if self.positions.dtype == torch.bool:
                states = states[:, states.shape[1] - self.positions.shape[1] :][self.positions]
            else:
                states = states[0, self.positions]
        return states.reshape(-1, states.shape[-1])


_WANTED: ContextVar[LossTerms | None] = ContextVar("_WANTED", default=None)


def wanted_loss() -> LossTerms | None:
    """Return the loss that a head called now computes in the place of logits, or None."""
    return _WANTED.get()


def supervised_loss(
    model: Any,
    inputs: dict[str, Any],
    targets: Targets,
    *,
    scale: float,
    smoothing: float = 0.0,
    each: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """Run a model; return `scale` x the sum over the targets of -log softmax(logits)[target] x weight, and its outputs.

    The loss is a scalar, float32 or wider; the logits in the outputs are overwritten, or none.
    """
    terms = LossTerms(targets.tokens, targets.positions, targets.loss_weights(), scale, smoothing, each)
    token = _WANTED.set(terms)
    try:
        outputs = model(**inputs)
    finally:
        _WANTED.reset(token)
    if terms.loss is None:
        return loss_of_logits(outputs.logits, terms), outputs
    # The logits of no position lead through the hooks by which ZeRO-3 gathers the head in the backward pass.
    return terms.loss + outputs.logits.sum(), outputs


def loss_of_logits(logits: torch.Tensor, terms: LossTerms) -> torch.Tensor:
    """Return the loss of logits [..., V] of any float dtype; they are overwritten where a gradient is required."""
    return _ChunkedLoss.apply(None, terms, torch.is_grad_enabled(), terms.select(logits))[0]


def loss_of_head(head: Head, terms: LossTerms, hidden: torch.Tensor) -> torch.Tensor:
    """Set the loss of hidden states [..., H]; return logits [1, 0, V] of no position, which depend on it."""
    rows = terms.select(hidden)
    parameters, head.stand_in = head.trained() if head.stand_in is None else [head.stand_in], None
    terms.loss, logits = _ChunkedLoss.apply(head, terms, torch.is_grad_enabled(), rows, *parameters)
    return logits


def token_losses(model: Any, inputs: dict[str, Any], targets: Targets) -> torch.Tensor:
    """Return -log softmax(logits)[target] of each target without a gradient, float32 [P]."""
    each = torch.empty(len(targets.tokens), device=targets.tokens.device)
    with torch.no_grad():
        supervised_loss(model, inputs, targets, scale=1.0, each=each)
    return each


class Head:
    """A head and what the model does to its output, as functions of some rows of hidden states.

    Args:
        module: what computes logits of hidden states.
        forward: of the module.
        after: elementwise functions that the model applies to the output.
        vocabulary: the number of logits.

    Attributes:
        stand_in: what passes the gradient of the next call on to the weight, or None for the weight itself.
    """

    stand_in: torch.Tensor | None = None

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[[torch.Tensor], torch.Tensor],
        after: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
        vocabulary: int = 0,
    ) -> None:
        self.module: Any = module
        self.forward, self.after, self.vocabulary = forward, tuple(after), vocabulary
        self.is_plain = type(module) is torch.nn.Linear and "forward" not in vars(module)

    def trained(self) -> list[torch.Tensor]:
        """Return the parameters that get a gradient."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def chunks(self, rows: torch.Tensor) -> list[slice]:
        """Divide rows into parts of about equal size, whose logits fit `HEAD_BYTES`."""
        limit = HEAD_BYTES if rows.device.type == "cpu" else GPU_HEAD_BYTES
        each = max(1, limit // (rows.element_size() * self.vocabulary * (1 + 2 * len(self.after))))
        size = -(-len(rows) // max(1, -(-len(rows) // each)))
        return [slice(begin, begin + size) for begin in range(0, len(rows), max(1, size))]

    def logits(self, rows: torch.Tensor, weights: tuple[torch.Tensor, Any] | None, sums: _Sums) -> torch.Tensor:
        """Return logits [R, V] of rows [R, H]; the backward pass of a plain head adds to `sums` by itself."""
        logits = self.forward(rows) if weights is None else _Linear.apply(rows, *weights, sums)
        for function in self.after:
            logits = function(logits)
        return logits


class _Sums:
    """Gradients of parameters, summed over chunks in float32 or wider."""

    def __init__(self, parameters: Sequence[torch.Tensor], *, is_single: bool) -> None:
        self.parameters, self.is_single = parameters, is_single
        self.totals: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, place: int, gradient: torch.Tensor) -> None:
        total = self.totals[place]
        if total is None:
            self.totals[place] = gradient if self.is_single else gradient.to(_wide(gradient.dtype))
        else:
            total.add_(gradient)

    def add_product(self, place: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left [R, V] transposed x right [R, H]; by slices of V where the sum has another dtype."""
        total, wide = self.totals[place], _wide(left.dtype)
        if self.is_single or (total is None and wide == left.dtype):
            self.totals[place] = left.T @ right
        elif total is not None and wide == left.dtype:
            total.addmm_(left.T, right)
        else:
            if total is None:
                total = self.totals[place] = left.new_zeros((left.shape[1], right.shape[1]), dtype=wide)
            size = max(1, SUM_BYTES // (right.shape[1] * right.element_size()))
            for columns, rows in zip(left.split(size, dim=1), total.split(size), strict=True):
                rows.add_(columns.T @ right)


class _Linear(torch.autograd.Function):
    """A linear layer that adds the gradients of its weight and bias to sums."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: Any, sums: _Sums) -> torch.Tensor:
        ctx.rows, ctx.weight, ctx.sums = rows, weight, sums
        return torch.nn.functional.linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        for place, parameter in enumerate(ctx.sums.parameters):
            if parameter.dim() == 2:
                ctx.sums.add_product(place, above, ctx.rows)
            else:
                ctx.sums.add(place, above.sum(0))
        return above @ ctx.weight, None, None, None


class _ChunkedLoss(torch.autograd.Function):
    """The loss of rows of hidden states, or of logits without a head; the forward pass computes all gradients."""

    @staticmethod
    def forward(
        ctx: Any, head: Any, terms: LossTerms, has_backward: bool, rows: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants = has_backward and any(ctx.needs_input_grad)
        factors, unit = _factors(terms, rows.dtype)
        if head is None:
            total = _cross_entropy(rows.detach(), terms, factors, slice(None), writes=wants)
            gradients, chunks, sums = rows.detach(), [], _Sums([], is_single=True)
        else:
            chunks = head.chunks(rows)
            sums = _Sums(parameters, is_single=len(chunks) == 1)
            gradients = torch.empty_like(rows) if wants else rows
            total = torch.zeros((), dtype=_wide(rows.dtype), device=rows.device)
            weights = _plain_weights(head, rows) if head.is_plain else None
        for part in chunks:
            with torch.set_grad_enabled(wants):
                inputs = rows[part].detach().requires_grad_(wants)
                logits = head.logits(inputs if weights is None else inputs.to(weights[0].dtype), weights, sums)
            # What follows the head may need its own output in the backward pass.
            written = logits.detach().clone() if head.after and wants else logits.detach()
            total += _cross_entropy(written, terms, factors, part, writes=wants)
            if not wants:
                continue
            asked = [inputs, *(() if weights is not None else parameters)]
            gradients[part], *others = torch.autograd.grad(logits, asked, written, materialize_grads=True)
            for place, gradient in enumerate(others):
                sums.add(place, gradient)
            del logits, written, others
        if wants:
            ctx.gradients, ctx.unit = [gradients, *sums.totals], unit
            ctx.dtypes = [rows.dtype, *(parameter.dtype for parameter in parameters)]
            ctx.shapes = [rows.shape, *(parameter.shape for parameter in parameters)]
        ctx.set_materialize_grads(False)
        return total * unit, rows.new_zeros((1, 0, 0 if head is None else head.vocabulary))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        given, ctx.gradients = ctx.gradients, None
        factor = above * ctx.unit
        results: list[torch.Tensor | None] = []
        for gradient, dtype, shape, needed in zip(given, ctx.dtypes, ctx.shapes, ctx.needs_input_grad[3:], strict=True):
            if not needed:
                results.append(None)
            elif gradient is None:  # no row
                results.append(above.new_zeros(shape, dtype=dtype))
            else:  # a factor may be too large for float16, not for the product
                gradient = gradient.float() if gradient.dtype == torch.float16 else gradient
                if factor.device.type != "cpu" or factor != 1:  # asking a GPU would wait for it
                    gradient.mul_(factor)
                results.append(gradient.to(dtype))
        return (None, None, None, *results)


def _plain_weights(head: Head, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return weight and bias of a linear layer in the precision that it computes in, under autocast converted once."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    weight, bias = head.module.weight.detach(), head.module.bias
    return weight.to(dtype), None if bias is None else bias.detach().to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _factors(terms: LossTerms, dtype: torch.dtype) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Return what each loss is multiplied by, and what their sum is.

    A gradient in float16 is computed as of losses near 1 each, because it may be too small before it is scaled up.
    """
    if terms.weights is None:
        return (1.0, terms.scale) if dtype == torch.float16 else (terms.scale, 1.0)
    factors = terms.weights.to(_wide(dtype))[:, None] * terms.scale
    if dtype != torch.float16 or not len(factors):
        return factors, 1.0
    largest = factors.amax().clamp_min(torch.finfo(factors.dtype).tiny)
    return factors / largest, largest


def _cross_entropy(
    logits: torch.Tensor, terms: LossTerms, all_factors: Any, part: slice, *, writes: bool
) -> torch.Tensor:
    """Return the sum of the losses x factors of logits [R, V] of the targets in `part`.

    With `writes`, the gradient factor x (softmax - onehot) is written over the logits. Their version counter tells it
    to what keeps them for its backward pass, which then fails rather than compute with something else.
    """
    wide, vocabulary = _wide(logits.dtype), logits.shape[-1]
    targets, smoothing = terms.targets[part, None], terms.smoothing
    factors = all_factors[part] if isinstance(all_factors, torch.Tensor) else all_factors
    each = None if terms.each is None else terms.each[part]
    size = max(1, (CHUNK_BYTES if logits.device.type == "cpu" else GPU_CHUNK_BYTES) // (4 * vocabulary))
    total = torch.zeros((), dtype=wide, device=logits.device)
    for begin in range(0, len(targets), size):
        rows = slice(begin, begin + size)
        values, wanted = logits[rows].to(wide), targets[rows]
        factor = factors[rows] if isinstance(factors, torch.Tensor) else factors
        aimed_at = values.gather(-1, wanted)
        if smoothing:
            aimed_at = (1 - smoothing) * aimed_at + smoothing * values.mean(-1, keepdim=True)
        largest = values.amax(-1, keepdim=True)
        # Where the logits are wide already and a gradient is wanted, all this is written over them.
        values = (values.sub_(largest) if writes else values - largest).exp_()
        sums = values.sum(-1, keepdim=True)
        losses = sums.log() + largest - aimed_at
        total += (losses * factor).sum()
        if each is not None:
            each[rows] = losses[:, 0]
        if writes:
            values *= factor / sums
            if smoothing:
                values -= factor * (smoothing / vocabulary)
            values.scatter_add_(-1, wanted, (factor * (smoothing - 1)) * torch.ones_like(largest))
            if logits.dtype != wide:
                logits[rows] = values
    return total
