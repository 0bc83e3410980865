"""The audit of an engine: what it said of its tokens beside what the model that is trained says of them.

An engine computes the same distribution by other kernels, in another precision, or with weights that are a step old.
Then the tokens are off-policy, and a policy gradient that takes them for its own is biased. Truncated importance
weights ``min(π(token) / q(token), C)`` correct for it, token by token (Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; Ionides 2008 for the truncation). They cannot mend an engine that samples
from another model, another temperature or other tokens, so beyond a bound nothing is corrected and the run stops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ModelError


@dataclass(frozen=True)
class Audit:
    """How far an engine is from the model, over the tokens that count.

    Attributes:
        gap: mean absolute difference of the two log-probabilities, nats per token.
        max_gap: the largest one, nats.
        kl: KL(engine ‖ model), estimated by k3, nats per token.
        truncated: share of tokens whose weight was cut.
        weights: truncated importance weights, 1 where nothing counts; no gradient.
    """

    gap: float
    max_gap: float
    kl: float
    truncated: float
    weights: Float[Tensor, "batch token"]

    def metrics(self) -> dict[str, float]:
        """As a step's row has them."""
        return {
            "generator_gap": self.gap,
            "generator_max_gap": self.max_gap,
            "generator_kl": self.kl,
            "generator_truncated": self.truncated,
            "generator_weight": float(self.weights.double().mean()),
        }


@torch.no_grad()
def audit(
    sampled: Float[Tensor, "batch token"],
    scored: Float[Tensor, "batch token"],
    *,
    mask: Bool[Tensor, "batch token"],
    max_weight: float,
    max_gap: float,
    engine: str,
) -> Audit:
    """Compares ``sampled``, the engine's log-probabilities of its tokens, with ``scored``, the model's, in nats.

    Args:
        sampled: of each token under the distribution that the engine says it sampled from.
        scored: of the same tokens under the model that is trained.
        mask: True = the token counts.
        max_weight: C, the largest importance weight, at least 1.
        max_gap: bound of the mean absolute difference, nats per token.
        engine: as the message calls it.

    Raises:
        ModelError: the mean difference is above ``max_gap``, or is no number.

    >>> own, far = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -0.5]])
    >>> found = audit(own, far, mask=torch.tensor([[True, True]]), max_weight=2.0, max_gap=1.0, engine="an engine")
    >>> found.gap, found.weights.tolist()
    (0.75, [[1.0, 2.0]])
    """
    difference = (scored - sampled).double().masked_fill(~mask, 0.0)
    num_tokens = mask.sum().clamp_min(1)
    gap = float(difference.abs().sum() / num_tokens)
    if not gap <= max_gap:  # NaN too
        raise ModelError(
            f"{engine} and the model that is trained are {gap:.3g} nats a token apart on {int(mask.sum())} sampled "
            f"tokens, {max_gap:.3g} are allowed (ppo.generator_max_gap); give the engine the model's present weights, "
            "tokens and temperature, and let it report the probabilities that it samples from"
        )
    ratio = difference.exp()  # 1 where nothing counts
    return Audit(
        gap=gap,
        max_gap=float(difference.abs().max()) if difference.numel() else 0.0,
        kl=float((torch.expm1(difference) - difference).sum() / num_tokens),
        truncated=float((ratio > max_weight).sum() / num_tokens),
        weights=ratio.clamp_max(max_weight).to(scored.dtype),
    )
