"""Log-probabilities of chosen tokens from hidden states, without the logits of all positions at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from preceptor.errors import ShapeError

CHUNK_LOGITS = 2**20
"""Logits held at once: 4 MiB in float32."""

KEPT_LOGITS = 2**24
"""Logits up to which the backward pass finds their exponentials kept: 64 MiB in float32."""

_CHUNK_ROWS = 1_024
"""Rows in a block: enough for large products, few enough for thousands of columns in a block."""


def chosen_log_probs(
    states: Float[Tensor, "row width"],
    weight: Float[Tensor, "vocab width"],
    tokens: Int[Tensor, " row"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    kept_logits: int = KEPT_LOGITS,
) -> Float[Tensor, " row"]:
    """Log-probability in nats of one token a row, ``log_softmax(states @ weight.T + bias)[row, token]``.

    The logits are made in blocks of rows and of the vocabulary, and where there are more than ``kept_logits`` of them
    once more in the backward pass, so that beside the gradients themselves about ``chunk_logits`` numbers are held,
    whatever the rows and the vocabulary (as in Wijmans et al. 2024, arXiv 2411.09009, with plain products).

    Carries gradient into ``states``, ``weight`` and ``bias``, once (no second derivative). Products are in the dtype of
    ``states``, or autocast's; sums are in float32 (float64 for float64 states).

    Args:
        states: last hidden states of the positions that predict ``tokens``.
        weight: of the output head.
        tokens: chosen tokens, in 0..vocab − 1.
        bias: of the output head, or None; −inf rules a token out.
        chunk_logits: logits in a block.
        kept_logits: logits in all up to which what the backward pass needs is kept.

    Raises:
        ShapeError: not one token a row.

    >>> states, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    >>> chosen_log_probs(states, weight, torch.tensor([1, 0])).exp()
    tensor([0.7311, 0.1192])
    """
    if tokens.shape != states.shape[:1]:
        raise ShapeError(f"`tokens` must hold one token for each of {len(states)} rows, got {tuple(tokens.shape)}")
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    apply: Any = _ChosenLogProbs.apply
    result: Tensor = apply(states, weight, bias, tokens, chunk_logits, kept_logits)
    return result


class _ChosenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        chunk_logits: int,
        kept_logits: int,
    ) -> Tensor:
        chosen = states.new_empty(len(states), dtype=_sum_dtype(states))
        normalisers = torch.full_like(chosen, -torch.inf)
        ctx.keeps = any(ctx.needs_input_grad) and len(states) * len(weight) <= kept_logits
        kept: list[Tensor] = []
        with torch.autocast(states.device.type, enabled=False):
            for rows, columns in _blocks(len(states), len(weight), chunk_logits):
                logits = _logits(states[rows], weight[columns], None if bias is None else bias[columns])
                here, places = _within(tokens[rows], columns)
                chosen[rows] = torch.where(here, logits.gather(-1, places)[:, 0], chosen[rows])
                # Finite also for a block of nothing but −inf (tokens that a bias rules out), or NaN would arise.
                largest = logits.amax(-1).clamp_min_(torch.finfo(logits.dtype).min)
                exponentials = logits.sub_(largest[:, None]).exp_()
                normalisers[rows] = torch.logaddexp(normalisers[rows], exponentials.sum(-1).log_() + largest)
                if ctx.keeps:
                    kept += exponentials, largest
        ctx.save_for_backward(states, weight, bias, tokens, normalisers, *kept)
        ctx.chunk_logits = chunk_logits
        return chosen - normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, tokens, normalisers, *kept = ctx.saved_tensors
        # Sums over blocks, hence in float32 at least.
        for_states, for_weight, for_bias = (
            torch.zeros_like(tensor, dtype=_sum_dtype(tensor)) if needed else None
            for tensor, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for index, (rows, columns) in enumerate(_blocks(len(states), len(weight), ctx.chunk_logits)):
            # d chosen_log_prob / d logit = [logit is the chosen one] − probability
            if ctx.keeps:
                exponentials, largest = kept[2 * index : 2 * index + 2]
                slopes = exponentials * ((largest - normalisers[rows]).exp_() * -gradient[rows])[:, None]
            else:
                slopes = _logits(states[rows], weight[columns], None if bias is None else bias[columns])
                slopes.sub_(normalisers[rows, None]).exp_().mul_(-gradient[rows, None])
            here, places = _within(tokens[rows], columns)
            slopes.scatter_add_(-1, places, (gradient[rows] * here)[:, None])
            if for_bias is not None:
                for_bias[columns] += slopes.sum(0)
            slopes = slopes.to(states.dtype)
            if for_states is not None:
                _add_product(for_states[rows], slopes, weight[columns])
            if for_weight is not None:
                _add_product(for_weight[columns], slopes.T, states[rows])
        gradients = zip((states, weight, bias), (for_states, for_weight, for_bias), strict=True)
        return *(None if total is None else total.to(tensor.dtype) for tensor, total in gradients), None, None, None


def _blocks(num_rows: int, num_columns: int, chunk_logits: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the logits, block by block, each of about ``chunk_logits``."""
    for row in range(0, num_rows, _CHUNK_ROWS):
        rows = slice(row, min(row + _CHUNK_ROWS, num_rows))
        width = max(1, chunk_logits // (rows.stop - row))
        for column in range(0, num_columns, width):
            yield rows, slice(column, min(column + width, num_columns))


def _within(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which tokens lie in a block of the vocabulary, and the column of each in it (any, where it does not)."""
    here = (tokens >= columns.start) & (tokens < columns.stop)
    return here, (tokens - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A new tensor, in float32 at least."""
    logits = states @ weight.T if bias is None else torch.addmm(bias, states, weight.T)
    return logits.to(_sum_dtype(logits))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
