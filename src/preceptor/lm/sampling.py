"""The distribution that tokens are sampled from, as log-probabilities, so that what is recorded is what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import ConfigError, NumericError, ShapeError


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Applied in this order: suppressed tokens, temperature, top-k, and top-p among the tokens that top-k keeps.

    Attributes:
        temperature: divides the logits, finite and > 0; 0 is greedy (the first of the largest logits is certain).
        top_k: keep the k largest logits and any that tie with the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose total probability reaches p, in (0, 1] (Holtzman et
            al. 2020, arXiv 1904.09751); among ties at the edge, the smaller ids. 1 keeps all.
        suppressed: token ids that are never sampled, such as control tokens.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppressed: Sequence[int] = ()

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < math.inf:
            faults.append(f"`temperature` must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            faults.append(f"`top_k` must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            faults.append(f"`top_p` must lie in (0, 1], got {self.top_p}")
        if faults:
            raise ConfigError(*faults)

    def log_probs(
        self, logits: Float[Tensor, "*batch vocab"], *, drawn: Int[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities in nats of the truncated and renormalised distribution; −inf for tokens that it excludes.

        Gradients flow into ``logits`` (none when greedy); the set of tokens kept is treated as a constant.

        Args:
            logits: float32 logits of the model.
            drawn: tokens sampled earlier from this distribution. They are always kept: rounding may have moved their
                logit across the edge of the truncation since, and −inf would ruin a gradient.

        >>> Sampling(top_k=2).log_probs(torch.tensor([3.0, 3.0, 1.0])).exp()
        tensor([0.5000, 0.5000, 0.0000])
        """
        if self.suppressed:
            logits = logits.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)
        if self.temperature == 0:
            greedy = logits.argmax(-1) if drawn is None else drawn
            # Log-probability 0 for one token, −inf for the rest. A token sampled earlier stays certain even if rounding
            # moved the largest logit since.
            return torch.full_like(logits, -torch.inf).scatter(-1, greedy[..., None], 0.0)
        if self.temperature != 1:  # the largest logit becomes 0, so that a tiny temperature cannot overflow
            logits = (logits - logits.detach().amax(-1, keepdim=True)) / self.temperature
        if self.top_k or self.top_p < 1:
            # The mask is made from detached logits: which tokens are kept has no gradient.
            allowed = self._allowed(logits.detach())
            if drawn is not None:
                allowed = allowed.scatter(-1, drawn[..., None], True)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits.log_softmax(-1)

    def _allowed(self, logits: Float[Tensor, "*batch vocab"]) -> Bool[Tensor, "*batch vocab"]:
        """True = top-k and top-p keep this token."""
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if 0 < self.top_k < logits.shape[-1]:
            # `>=` keeps ties with the k-th logit, so that the result does not depend on how topk orders them.
            allowed = logits >= logits.topk(self.top_k, dim=-1).values[..., -1:]
        if self.top_p < 1:
            probabilities = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
            ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)  # stable: small ids first
            before = ordered.cumsum(-1) - ordered  # total probability of all more probable tokens
            # A token is needed as long as those before it fall short of p; scatter undoes the sorting.
            allowed = allowed & torch.zeros_like(allowed).scatter(-1, indices, before < self.top_p)
        return allowed


@dataclass(frozen=True)
class SharedStream:
    """A stream of random numbers for ``total`` rows, of which this process has ``rows``.

    The numbers of all rows are drawn and this process's are kept, so that a row gets the same number and the stream
    goes on from the same place however many processes share the batch.
    """

    generator: torch.Generator
    total: int
    rows: slice

    def uniform(self, num_rows: int) -> Float[Tensor, "batch 1"]:
        """A number in [0, 1) for each of this process's rows, float64."""
        own = torch.rand(self.total, 1, dtype=torch.float64, generator=self.generator)[self.rows]
        if len(own) != num_rows:
            raise ShapeError(f"rows {self.rows.start}..{self.rows.stop} of {self.total} were shared, got {num_rows}")
        return own


Stream: TypeAlias = torch.Generator | SharedStream
"""Where the random numbers of a batch's rows come from."""


def draw(log_probs: Float[Tensor, "batch choices"], generator: Stream) -> Int[Tensor, " batch"]:
    """One index per row, sampled by inversion: the first whose cumulative probability exceeds a uniform number.

    Uniform numbers come from a CPU generator and sums are in float64, so that every device samples the same. An index
    with log-probability −inf is never sampled.

    Raises:
        NumericError: a row is not a distribution (NaN).
    """
    # Float64: a float32 cumulative sum over a large vocabulary loses tokens of small probability.
    cumulative = log_probs.detach().double().exp().cumsum(-1)
    total = cumulative[:, -1:]  # 1 but for rounding
    if not bool((total > 0).all()):
        raise NumericError("a distribution to draw from is NaN or empty; the model's weights may be damaged")
    if isinstance(generator, SharedStream):
        uniform = generator.uniform(len(total)).to(total.device)
    else:
        uniform = torch.rand(len(total), 1, dtype=torch.float64, generator=generator).to(total.device)
    # right=True finds the first sum strictly above the number, and so skips indices of probability 0.
    return torch.searchsorted(cumulative, uniform * total, right=True)[:, 0]
