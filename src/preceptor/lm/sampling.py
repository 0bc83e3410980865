"""The distribution that tokens are sampled from, as log-probabilities: what is recorded is what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.errors import ConfigError, NumericError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    The truncations apply in this order: suppressed tokens, temperature, top-k, then top-p of what top-k left.

    Attributes:
        temperature: divides the logits, finite and > 0; 0 is greedy (all probability on the first largest logit).
        top_k: only the k largest logits keep probability, and those that tie with the k-th; 0 keeps all.
        top_p: only the smallest set of most probable tokens whose probability reaches p keeps probability (Holtzman et
            al. 2020, arXiv 1904.09751); of tokens that tie at its edge, those with the smaller ids; 1 keeps all.
        suppressed: token ids that are never drawn (control tokens).

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
        """Log-probabilities in nats of the truncated, renormalised distribution; −inf for tokens that cannot be drawn.

        Carries gradient into ``logits`` (none when greedy); which tokens are kept is a constant.

        Args:
            logits: float32 logits of the model.
            drawn: tokens drawn earlier from the same distribution. They always keep their probability, so that a logit
                that moved by a rounding error across the edge of the truncation never gets −inf.

        >>> Sampling(top_k=2).log_probs(torch.tensor([3.0, 3.0, 1.0])).exp()
        tensor([0.5000, 0.5000, 0.0000])
        """
        if self.suppressed:
            logits = logits.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)
        if self.temperature == 0:
            greedy = logits.argmax(-1) if drawn is None else drawn
            return torch.full_like(logits, -torch.inf).scatter(-1, greedy[..., None], 0.0)
        if self.temperature != 1:  # relative to the largest, so that a tiny temperature cannot overflow
            logits = (logits - logits.detach().amax(-1, keepdim=True)) / self.temperature
        if self.top_k or self.top_p < 1:
            allowed = self._allowed(logits.detach())
            if drawn is not None:
                allowed = allowed.scatter(-1, drawn[..., None], True)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits.log_softmax(-1)

    def _allowed(self, logits: Tensor) -> Tensor:
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if 0 < self.top_k < logits.shape[-1]:
            allowed = logits >= logits.topk(self.top_k, dim=-1).values[..., -1:]
        if self.top_p < 1:
            probabilities = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
            ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            allowed = allowed & torch.zeros_like(allowed).scatter(-1, indices, before < self.top_p)
        return allowed


def draw(log_probs: Float[Tensor, "batch choices"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    """One index per row by inversion: the first whose cumulative probability exceeds a uniform number.

    The uniform numbers come from a CPU generator and the sums are in float64, so that a run draws alike on every
    device. An index of log-probability −inf is never drawn.

    Raises:
        NumericError: a row is not a distribution (NaN).
    """
    cumulative = log_probs.detach().double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    if not bool((total > 0).all()):
        raise NumericError("a distribution to draw from is NaN or empty; the model's weights may be damaged")
    uniform = torch.rand(len(total), 1, dtype=torch.float64, generator=generator).to(total.device)
    return torch.searchsorted(cumulative, uniform * total, right=True)[:, 0]
