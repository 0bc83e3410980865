"""Kullback-Leibler divergence: exact over a vocabulary, estimated from samples, and a coefficient that holds it.

Direction: KL(p‖q) = Σ p ln(p/q), "how far p, from which we sample, has moved from the reference q".

What an estimator's *gradient* is, when it stands in a loss and is averaged over tokens sampled from p itself, differs
from what its *value* is (arXiv 2510.01555, arXiv 2512.21852). For one categorical choice, the sample held fixed and the
gradient taken with respect to p:

==========  =======================  =====================================================
estimator   its mean                 mean of its gradient
==========  =======================  =====================================================
exact       KL(p‖q)                  ∇KL(p‖q)
k1          KL(p‖q), high variance   0, whatever p and q are: it constrains nothing
k2          close to KL(p‖q)         ∇KL(p‖q), exactly
k3          KL(p‖q), low variance    ∇KL(q‖p): the *other* direction
==========  =======================  =====================================================

k1 subtracted from the *reward* gives −∇KL(p‖q) exactly. Over several tokens all per-token losses, the exact one too,
drop the effect of a token on the KL of later ones; k1 in the reward, with the full reward to go, keeps it.

KL to the weights just before the first gradient step has value and gradient zero: let q be older than that.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError
from preceptor.objectives.statistics import check_same_shape


def kl_exact(
    p_logits: Float[Tensor, "*shape vocab"],
    q_logits: Float[Tensor, "*shape vocab"],
    *,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """KL(p‖q) = Σ_v p_v ln(p_v / q_v) in nats at each position, exact over the vocabulary; 0 where ``mask`` is False.

    Log-probabilities are logits too, so both may be given, −∞ included: an outcome that p excludes adds nothing, and
    one that q alone excludes makes the divergence +∞, without a gradient. Otherwise gradients flow into both; detach
    the reference. Only the positions that count are computed: masked ones cost nothing and may hold anything.

    Args:
        p_logits: of the distribution that is being kept near ``q``.
        q_logits: of the reference.
        mask: True = this position counts; ``None`` counts all.

    Raises:
        ShapeError: the shapes do not fit.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> kl_exact(p, q)  # 0.5·ln 2 + 0.5·ln(2/3)
    tensor([0.1438])
    """
    check_same_shape(p_logits=p_logits, q_logits=q_logits)
    if mask is None:
        return _kl(p_logits, q_logits)
    if mask.shape != p_logits.shape[:-1]:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}; these logits need {tuple(p_logits.shape[:-1])}")
    # [counted, vocab]: the vocabulary is the large axis, so masked positions are dropped before it is touched.
    counted = _kl(p_logits[mask], q_logits[mask])
    return counted.new_zeros(mask.shape).masked_scatter(mask, counted)


def kl_k1(p_log_probs: Float[Tensor, "*shape"], q_log_probs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k1 = ln p − ln q per sampled token, nats: the mean over samples of p is KL(p‖q), the variance is high.

    In a loss its mean gradient is **zero** (the score function has mean 0): use it in the reward, where, with the
    full reward to go, the gradient is that of KL(p‖q). Source: joschu.net/blog/kl-approx.html.

    Raises:
        ShapeError: the shapes differ.

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    check_same_shape(p_log_probs=p_log_probs, q_log_probs=q_log_probs)
    return p_log_probs - q_log_probs


def kl_k2(p_log_probs: Float[Tensor, "*shape"], q_log_probs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k2 = ½ (ln p − ln q)² per sampled token, nats: biased but of low variance while p and q are near.

    In a loss, on samples of p itself, its mean gradient is **exactly** that of KL(p‖q); it is the one to put in
    a loss. Source: joschu.net/blog/kl-approx.html; arXiv 2510.01555.

    Raises:
        ShapeError: the shapes differ.

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    # (ln p − ln q) · ∇ln p is its gradient: the score function weighted by the log-ratio, which is ∇KL(p‖q) in the
    # mean.
    return 0.5 * kl_k1(p_log_probs, q_log_probs).square()


def kl_k3(p_log_probs: Float[Tensor, "*shape"], q_log_probs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k3 = q/p − 1 − ln(q/p) per sampled token, nats: never negative, and its mean is KL(p‖q).

    Its variance is low while p and q are near, so it is the one to *report*. In a loss its mean gradient is that of the
    **forward** KL(q‖p), not of KL(p‖q); GRPO uses it so. Source: joschu.net/blog/kl-approx.html; arXiv 2510.01555.

    Raises:
        ShapeError: the shapes differ.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))  # exp(−0.5) − 1 + 0.5
    tensor([0.1065])
    """
    log_ratio = -kl_k1(p_log_probs, q_log_probs)
    # expm1, since for nearby distributions q/p − 1 would lose all its digits.
    return torch.expm1(log_ratio) - log_ratio


class AdaptiveKLController:
    """A KL coefficient β that is moved until the measured KL meets a target.

    After n samples with mean divergence KL: β ← β · (1 + clip(KL/target − 1, −0.2, 0.2) · n / horizon), where n is more
    than a horizon, horizon by horizon, so that β stays positive.

    Args:
        coefficient: the first β, > 0, in reward units per nat.
        target: > 0, nats, per the unit over which the caller averages.
        horizon: > 0, in samples; at the clip, β changes by 20 % a horizon.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Raises:
        ConfigError: an argument that is not positive.

    >>> controller = AdaptiveKLController(coefficient=0.1, target=6.0, horizon=1000.0)
    >>> controller.update(12.0, num_samples=100)  # clip(2 − 1) = 0.2, times 100/1000
    >>> round(controller.coefficient, 6)
    0.102
    """

    def __init__(self, *, coefficient: float, target: float, horizon: float) -> None:
        arguments = {"coefficient": coefficient, "target": target, "horizon": horizon}
        faults = [
            f"{name} must be positive and finite, got {value}."
            for name, value in arguments.items()
            if not (math.isfinite(value) and value > 0)
        ]
        if faults:
            raise ConfigError(*faults)
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, *, num_samples: int) -> None:
        """Move the coefficient after ``num_samples`` samples whose mean divergence was ``kl`` nats.

        Raises:
            NumericError: ``kl`` is not finite; the coefficient stays as it was.
        """
        if not math.isfinite(kl):
            raise NumericError(f"the KL coefficient cannot follow a divergence of {kl}; skip this step.")
        # Clipped at 20 %, so that one strange batch cannot move the coefficient far.
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # Horizon by horizon: in one step of more than five, 1 − 0.2 · n/horizon would be negative.
        horizons, rest = divmod(num_samples, self.horizon)
        self.coefficient *= (1 + error) ** horizons * (1 + error * rest / self.horizon)

    def state_dict(self) -> dict[str, float]:
        """What changes over a run, as JSON numbers; target and horizon are configuration."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the state over from ``state_dict``.

        Raises:
            CheckpointError: keys are missing or unknown.
        """
        if state.keys() != {"coefficient"}:
            raise CheckpointError(f"a KL controller has the keys {sorted(state)}; expected ['coefficient']")
        self.coefficient = float(state["coefficient"])


def _kl(p_logits: Float[Tensor, "*shape vocab"], q_logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    p_log_probs = torch.log_softmax(p_logits, dim=-1)  # [..., vocab]
    q_log_probs = torch.log_softmax(q_logits, dim=-1)
    # Where p is 0 the term is 0, in value and gradient; (−∞) − q and 0·(−∞) would make NaN of it.
    excluded = p_logits == float("-inf")
    # Where q alone is 0 the divergence is +∞, however small p is there: its exponential may have come out as 0.
    unbounded = (q_logits == float("-inf")) & ~excluded
    left_out = excluded | unbounded
    log_ratios = p_log_probs.masked_fill(left_out, 0.0) - q_log_probs.masked_fill(left_out, 0.0)
    divergence = (p_log_probs.exp() * log_ratios).sum(dim=-1)
    return divergence.masked_fill(unbounded.any(dim=-1), float("inf"))


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
