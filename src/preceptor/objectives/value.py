"""Learning and judging a value function."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.objectives.aggregation import aggregate
from preceptor.objectives.statistics import check_same_shape, masked_variance


def value_loss(
    values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"],
    old_values: Float[Tensor, "batch time"] | None = None,
    clip_epsilon: float | None = None,
    aggregation: str = "token_mean",
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """½ (V − R)², aggregated; with a clip ½ max((V − R)², (clip(V, V_old ± ε) − R)²).

    Like PPO's, the clip cuts the gradient of a value that has moved more than ε towards its target. No
    gradient into ``returns`` and ``old_values``; what is masked out may be anything.

    Args:
        values: of the present value function, in the unit of the rewards.
        returns: its targets, e.g. the advantages of ``gae`` plus the values that went into it.
        mask: True = counts.
        old_values: of the value function at sampling time; with ``clip_epsilon`` alone.
        clip_epsilon: > 0, in the unit of the rewards; ``None`` for no clip.
        aggregation: see ``aggregate``.
        divisor: see ``aggregate``.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: ``clip_epsilon`` is not positive, or given without ``old_values``, or the reverse.

    Source: OpenAI baselines PPO2; "The 37 Implementation Details of PPO" (2022), detail 9.

    >>> values, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> value_loss(values, torch.tensor([[3.0, 3.0]]), mask=mask)  # ½ (4 + 1) / 2
    tensor(1.2500)
    """
    if (old_values is None) != (clip_epsilon is None):
        raise ConfigError("clip_epsilon and old_values belong together; give both for a clipped loss, or neither.")
    check_same_shape(values=values, returns=returns, mask=mask)
    # Masked here too, although `aggregate` masks the errors: the gradient of a square at NaN is NaN, even times 0.
    values, returns = values.masked_fill(~mask, 0.0), returns.detach()
    squared_errors = (values - returns).square()
    if old_values is not None and clip_epsilon is not None:
        if not clip_epsilon > 0:
            raise ConfigError(f"clip_epsilon must be positive, got {clip_epsilon}.")
        check_same_shape(values=values, old_values=old_values)
        old_values = old_values.detach().masked_fill(~mask, 0.0)
        clipped = old_values + (values - old_values).clamp(-clip_epsilon, clip_epsilon)
        # The larger error, as in PPO: clipping may only take progress away.
        squared_errors = torch.maximum(squared_errors, (clipped - returns).square())
    return aggregate(0.5 * squared_errors, mask, aggregation=aggregation, divisor=divisor)


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R) over ``mask``: 1 is perfect, 0 as good as a constant, below 0 worse; no gradient.

    Returns without any variance (or fewer than two of them) leave nothing to explain; the result is then 0.

    Raises:
        ShapeError: the shapes differ.

    >>> returns = torch.tensor([1.0, 2.0, 3.0])
    >>> explained_variance(returns / 2, returns, torch.ones(3, dtype=torch.bool))
    tensor(0.7500)
    """
    check_same_shape(values=values, returns=returns, mask=mask)
    # No gradient: this is a diagnostic.
    values, returns = values.detach(), returns.detach()
    total = masked_variance(returns, mask)
    if total == 0:
        return torch.zeros_like(total)
    return 1 - masked_variance(returns - values, mask) / total
