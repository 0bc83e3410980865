"""An n-gram language model by counting: the ladder that a learner has to climb, and the cheapest referee."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import ConfigError, DataError

CHUNK_POSITIONS = 8192
"""Positions whose distributions over the vocabulary are held at a time."""


class _Order(NamedTuple):
    """What was counted after contexts of one length. A context is a row; its counts are a slice of the entries."""

    keys: Int[Tensor, " context"]  # (row of the context one token shorter) · V + the token before it, ascending
    starts: Int[Tensor, " context"]  # first entry of each row
    num_kinds: Int[Tensor, " context"]  # different tokens seen after it: T
    totals: Float[Tensor, " context"]  # tokens seen after it: c
    tokens: Int[Tensor, " entry"]
    counts: Float[Tensor, " entry"]


class NGram:
    """Interpolated n-gram probabilities with Witten-Bell smoothing.

    p_k(v | h) = (c(h, v) + T(h) · p_{k−1}(v | h')) / (c(h) + T(h))

    where h are the k − 1 tokens before, h' the same without the first of them, c(h) the number of tokens seen after h,
    T(h) how many different ones, and p_0 uniform. A context that was never seen passes p_{k−1} on as it is.

    Args:
        tokens: of the training text, in order, more than ``order``.
        order: n, at least 1; the model looks back n − 1 tokens.
        vocab_size: number of different tokens, V.

    Raises:
        ConfigError: ``order`` below 1.
        DataError: too few tokens.

    Source: Witten and Bell (1991), doi:10.1109/18.87000, in the recursive form of Chen and Goodman (1998).

    >>> bigram = NGram(torch.tensor([0, 1, 0, 1, 1]), order=2, vocab_size=2)
    >>> bigram.probabilities(torch.tensor([[0, 1]]))[0]  # after 0 came 1 twice: (2 + 1 · p_1(1)) / (2 + 1)
    tensor([[0.1429, 0.8571],
            [0.4643, 0.5357]])
    """

    def __init__(self, tokens: Int[Tensor, " token"], *, order: int, vocab_size: int) -> None:
        if order < 1:
            raise ConfigError(f"the order of an n-gram must be at least 1, got {order}")
        if len(tokens) <= order:
            raise DataError(f"an n-gram of order {order} is fitted on more than {order} tokens, got {len(tokens)}")
        self.order = order
        self.vocab_size = vocab_size
        self.num_tokens = len(tokens)
        self._orders: list[_Order] = []
        rows = torch.zeros(len(tokens), dtype=torch.long)  # of the context before each token; one empty context
        for length in range(order):
            if length:
                rows = rows[1:] * vocab_size + tokens[: len(tokens) - length]
            keys, rows = rows.unique(return_inverse=True)
            self._orders.append(_count(keys, rows, tokens[length:], vocab_size))

    @property
    def num_counts(self) -> int:
        """Numbers that the model keeps: its size."""
        return sum(len(order.counts) for order in self._orders)

    def probabilities(
        self, tokens: Int[Tensor, "batch time"], *, order: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """p(· | the tokens up to and with each position), so ``[:, t]`` is about the token at t + 1.

        Only the given row is looked at: early positions have short contexts.

        Args:
            tokens: rows of text.
            order: a lower order of the same model; None is its own.
        """
        device, tokens = tokens.device, tokens.cpu()  # the counts lie there
        flat = torch.full((tokens.numel(), self.vocab_size), 1 / self.vocab_size)
        rows = torch.zeros(tokens.numel(), dtype=torch.long)
        known = torch.ones(tokens.numel(), dtype=torch.bool)
        for length, counted in enumerate(self._orders[: order or self.order]):
            if length:
                rows, known = self._longer(tokens, rows, known, length=length, counted=counted)
            flat = _interpolate(flat, rows, known, counted)
        return flat.view(*tokens.shape, self.vocab_size).to(device)

    def _longer(
        self,
        tokens: Int[Tensor, "batch time"],
        rows: Int[Tensor, " position"],
        known: Bool[Tensor, " position"],
        *,
        length: int,
        counted: _Order,
    ) -> tuple[Int[Tensor, " position"], Bool[Tensor, " position"]]:
        """Rows of the contexts one token longer, and which of them were ever seen."""
        before = torch.full_like(tokens, -1)
        before[:, length - 1 :] = tokens[:, : max(0, tokens.shape[1] - length + 1)]
        wanted = rows * self.vocab_size + before.flatten()
        found = torch.searchsorted(counted.keys, wanted).clamp(max=len(counted.keys) - 1)
        return found, known & (before.flatten() >= 0) & (counted.keys[found] == wanted)

    def score(self, tokens: Int[Tensor, " token"], *, order: int | None = None) -> tuple[float, float]:
        """Mean cross-entropy (nats per token) and top-1 accuracy on ``tokens``, from the second token on.

        Every token is predicted from all that the order can see, over any boundary of windows.
        """
        nats, hits, overlap = 0.0, 0, self.order - 1
        for start in range(0, len(tokens) - 1, CHUNK_POSITIONS):
            first = max(0, start - overlap)
            row = tokens[first : start + CHUNK_POSITIONS]
            targets = tokens[start + 1 : start + CHUNK_POSITIONS + 1]
            probabilities = self.probabilities(row[None], order=order)[0, start - first :][: len(targets)]
            nats -= float(probabilities.gather(1, targets[:, None]).double().log().sum())
            hits += int((probabilities.argmax(-1) == targets).sum())
        return nats / (len(tokens) - 1), hits / (len(tokens) - 1)


def _count(
    keys: Int[Tensor, " context"], rows: Int[Tensor, " token"], following: Int[Tensor, " token"], vocab_size: int
) -> _Order:
    pairs, counts = (rows * vocab_size + following).unique(return_counts=True)
    num_kinds = torch.bincount(pairs // vocab_size, minlength=len(keys))
    totals = torch.bincount(rows, minlength=len(keys))
    return _Order(
        keys=keys,
        starts=num_kinds.cumsum(0) - num_kinds,
        num_kinds=num_kinds,
        totals=totals.float(),
        tokens=pairs % vocab_size,
        counts=counts.float(),
    )


def _interpolate(
    shorter: Float[Tensor, "position vocab"],
    rows: Int[Tensor, " position"],
    known: Bool[Tensor, " position"],
    counted: _Order,
) -> Float[Tensor, "position vocab"]:
    """``shorter`` with the counts after the ``known`` contexts mixed in."""
    positions = known.nonzero().squeeze(1)
    rows = rows[positions]
    num_kinds = counted.num_kinds[rows]
    mixed = shorter.clone()
    mixed[positions] *= num_kinds[:, None].float()
    # The entries of each row, side by side: its first entry plus 0, 1, 2, … within the row.
    within = torch.arange(int(num_kinds.sum())) - (num_kinds.cumsum(0) - num_kinds).repeat_interleave(num_kinds)
    entries = counted.starts[rows].repeat_interleave(num_kinds) + within
    mixed.index_put_(
        (positions.repeat_interleave(num_kinds), counted.tokens[entries]), counted.counts[entries], accumulate=True
    )
    mixed[positions] /= (counted.totals[rows] + num_kinds)[:, None]
    return mixed
