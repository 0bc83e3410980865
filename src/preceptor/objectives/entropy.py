"""Entropy of categorical distributions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def entropy(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """The entropy −Σ p ln p in nats of softmax(``logits``) along the last axis.

    Log-probabilities are logits too, so both may be given. An outcome with logit −∞ adds nothing and gets gradient 0;
    a row of nothing but −∞ has no distribution and gets entropy 0. Gradients flow into ``logits``; they are finite
    everywhere.

    >>> entropy(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
    tensor([0.6931, 0.0000])
    """
    impossible = logits == float("-inf")
    # A row without any outcome is computed as a uniform one and replaced at the end: softmax(−∞, …, −∞) is NaN.
    empty = impossible.all(dim=-1, keepdim=True)
    log_probs = torch.log_softmax(logits.masked_fill(empty, 0.0), dim=-1)
    # 0·ln 0 is 0, in the value and in the gradient; IEEE says 0·(−∞) = NaN.
    surprisal = -log_probs.masked_fill(impossible, 0.0)
    return (log_probs.exp() * surprisal).sum(dim=-1).masked_fill(empty.squeeze(-1), 0.0)
