"""Log-probabilities of chosen tokens from hidden states, without holding the logits of all positions at once.

In a file of its own: :mod:`~preceptor.lm.model` builds on it, and :mod:`~preceptor.lm.score` builds on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from preceptor.errors import ShapeError

CHUNK_LOGITS = 2**20
"""Logits in a block: 4 MiB in float32."""

MAX_SAVED_LOGITS = 2**24
"""Logits up to which their exponentials are saved for the backward pass instead of recomputed: 64 MiB in float32."""

_CHUNK_ROWS = 1_024
"""Rows in a block: enough for large products, few enough to leave a block thousands of columns."""


def chosen_log_probs(
    states: Float[Tensor, "row width"],
    weight: Float[Tensor, "vocab width"],
    tokens: Int[Tensor, " row"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    max_saved_logits: int = MAX_SAVED_LOGITS,
) -> Float[Tensor, " row"]:
    """Log-probability in nats of one token a row, ``log_softmax(states @ weight.T + bias)[row, token]``.

    Logits are computed in blocks of rows and vocabulary entries. If there are more than ``max_saved_logits`` in all,
    the backward pass computes them again, so that besides the gradients only about ``chunk_logits`` numbers are held
    at once, however many rows and tokens there are (as in Wijmans et al. 2024, arXiv 2411.09009, but with ordinary
    matrix products).

    Gradients flow into ``states``, ``weight`` and ``bias`` (first derivatives only). Products are computed in the dtype
    of ``states`` or of autocast, sums in float32 (float64 for float64 states).

    Args:
        states: last hidden states at the positions that predict ``tokens``.
        weight: weight of the output head.
        tokens: chosen tokens, in 0..vocab − 1.
        bias: bias of the output head, or None; −inf rules a token out.
        chunk_logits: logits in a block.
        max_saved_logits: see above.

    Raises:
        ShapeError: there is not one token per row.

    >>> states, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    >>> chosen_log_probs(states, weight, torch.tensor([1, 0])).exp()
    tensor([0.7311, 0.1192])
    """
    if tokens.shape != states.shape[:1]:
        raise ShapeError(f"`tokens` must hold one token for each of {len(states)} rows, got {tuple(tokens.shape)}")
    # Cast here as autocast would for a product. The function itself turns autocast off, so that its forward and
    # backward passes compute in the same dtype.
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    apply: Any = _ChosenLogProbs.apply
    result: Tensor = apply(states, weight, bias, tokens, chunk_logits, max_saved_logits)
    return result


def in_blocks(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, num_rows: int
) -> tuple[Float[Tensor, " row"], ...]:
    """``function(*tensors)`` a few rows at a time, for a function that makes a vocabulary of numbers out of each row.

    What it makes is not kept for the backward pass but computed again there, block by block.

    Args:
        function: gives one or more tensors with a number for each row.
        tensors: with a row each; gradients flow into them and into whatever ``function`` uses.
        num_rows: rows in a block.
    """
    blocks = [
        checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False)
        for block in zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


class _ChosenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        chunk_logits: int,
        max_saved_logits: int,
    ) -> Tensor:
        # A streaming log-softmax: walk over the blocks, updating each row's log-normaliser log Σ exp(logit).
        chosen = states.new_empty(len(states), dtype=_sum_dtype(states))
        normalisers = torch.full_like(chosen, -torch.inf)
        # The exponentials of all blocks take rows × vocab numbers; above the limit they are recomputed, at one more
        # product.
        ctx.saves_logits = any(ctx.needs_input_grad) and len(states) * len(weight) <= max_saved_logits
        saved: list[Tensor] = []
        with torch.autocast(states.device.type, enabled=False):
            for rows, columns in _blocks(len(states), len(weight), chunk_logits):
                # [row, column]
                logits = _logits(states[rows], weight[columns], None if bias is None else bias[columns])
                # Each row's token lies in exactly one block of columns; there its logit is picked up.
                in_block, index = _within(tokens[rows], columns)
                chosen[rows] = torch.where(in_block, logits.gather(-1, index)[:, 0], chosen[rows])
                # Clamped because in a block of nothing but −inf (tokens that a bias rules out) −inf − (−inf) is NaN.
                largest = logits.amax(-1).clamp_min_(torch.finfo(logits.dtype).min)  # [row]
                exponentials = logits.sub_(largest[:, None]).exp_()  # [row, column], in place of the logits
                # log(e^a + e^b) of the normaliser so far and this block's own, log Σ exp(logit − largest) + largest.
                normalisers[rows] = torch.logaddexp(normalisers[rows], exponentials.sum(-1).log_() + largest)
                if ctx.saves_logits:
                    saved += exponentials, largest
        # Saved through ctx, not as attributes: autograd then checks that nothing was changed in place in between.
        ctx.save_for_backward(states, weight, bias, tokens, normalisers, *saved)
        ctx.chunk_logits = chunk_logits
        return chosen - normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, tokens, normalisers, *saved = ctx.saved_tensors
        # Gradients are sums over blocks, so they are accumulated in float32 at least.
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=_sum_dtype(tensor)) if needed else None
            for tensor, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for block, (rows, columns) in enumerate(_blocks(len(states), len(weight), ctx.chunk_logits)):
            # d log_prob(chosen) / d logit = [logit is the chosen one] − probability. The second term: [row, column].
            if ctx.saves_logits:
                exponentials, largest = saved[2 * block : 2 * block + 2]
                # probability = exp(logit − largest) · exp(largest − normaliser)
                grad_logits = exponentials * ((largest - normalisers[rows]).exp_() * -gradient[rows])[:, None]
            else:
                grad_logits = _logits(states[rows], weight[columns], None if bias is None else bias[columns])
                # In place, −gradient · exp(logit − normaliser): the block is never held twice.
                grad_logits.sub_(normalisers[rows, None]).exp_().mul_(-gradient[rows, None])
            in_block, index = _within(tokens[rows], columns)
            # Rows whose token lies in another block add 0 at a column of no importance.
            grad_logits.scatter_add_(-1, index, (gradient[rows] * in_block)[:, None])
            if grad_bias is not None:
                grad_bias[columns] += grad_logits.sum(0)
            # Products in the dtype of the forward pass, which is what makes bfloat16 training fast.
            grad_logits = grad_logits.to(states.dtype)
            if grad_states is not None:
                _add_product(grad_states[rows], grad_logits, weight[columns])
            if grad_weight is not None:
                _add_product(grad_weight[columns], grad_logits.T, states[rows])
        gradients = zip((states, weight, bias), (grad_states, grad_weight, grad_bias), strict=True)
        return *(None if total is None else total.to(tensor.dtype) for tensor, total in gradients), None, None, None


def _blocks(num_rows: int, num_columns: int, chunk_logits: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the logits in blocks of about ``chunk_logits``."""
    for row in range(0, num_rows, _CHUNK_ROWS):
        rows = slice(row, min(row + _CHUNK_ROWS, num_rows))
        # Fewer rows leave room for more columns: about chunk_logits numbers in either case.
        width = max(1, chunk_logits // (rows.stop - row))
        for column in range(0, num_columns, width):
            yield rows, slice(column, min(column + width, num_columns))


def _within(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each token lies in a block of the vocabulary [row]; its column there, clamped to the block [row, 1]."""
    in_block = (tokens >= columns.start) & (tokens < columns.stop)
    # A clamped index is valid for `gather` and `scatter_add_`; the caller masks what it finds there.
    return in_block, (tokens - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place."""
    # One call that adds in place where the dtypes allow it; otherwise a product is converted and then added.
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``states @ weight.T + bias`` as a new tensor, in float32 at least."""
    logits = states @ weight.T if bias is None else torch.addmm(bias, states, weight.T)
    return logits.to(_sum_dtype(logits))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
