"""Reward filters: which trajectories of a batch the update may learn from. True = passed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.objectives.statistics import RunningMoments


def above_standard_deviations(
    rewards: Float[Tensor, " batch"],
    *,
    moments: RunningMoments,
    num_standard_deviations: float = 1.0,
    num_warm_up: int = 15,
) -> Bool[Tensor, " batch"]:
    """True for rewards strictly above mean + ``num_standard_deviations`` · standard deviation of all rewards so far.

    Nothing passes while ``moments`` has seen fewer than ``num_warm_up`` rewards, or none. A reward that is not finite
    never passes. ``moments`` is read, not updated: the caller decides whether a batch is among its own "so far"
    (``moments.update(rewards)`` before or after).

    With Gaussian rewards and one standard deviation 84 % of all trajectories are discarded.

    Args:
        rewards: one per trajectory, any unit.
        moments: of all rewards so far, in the same unit.
        num_standard_deviations: finite, dimensionless.
        num_warm_up: ≥ 0, in trajectories.

    Raises:
        ConfigError: an argument out of its range.

    >>> moments = RunningMoments()
    >>> moments.update(torch.tensor([1.0, 2.0, 3.0]))  # mean 2, standard deviation 1
    >>> above_standard_deviations(torch.tensor([2.9, 3.0, 3.1]), moments=moments, num_warm_up=3)
    tensor([False, False,  True])
    """
    faults = []
    if not math.isfinite(num_standard_deviations):
        faults.append(f"num_standard_deviations must be finite, got {num_standard_deviations}.")
    if num_warm_up < 0:
        faults.append(f"num_warm_up must be at least 0, got {num_warm_up}.")
    if faults:
        raise ConfigError(*faults)
    # Before warm-up the moments are too noisy to call a reward exceptional.
    if moments.count < max(num_warm_up, 1):
        return torch.zeros_like(rewards, dtype=torch.bool)
    threshold = moments.mean + num_standard_deviations * moments.standard_deviation
    # In float64 as the moments are; a comparison in float32 would round the threshold first.
    return rewards.isfinite() & (rewards.double() > threshold)


def best_fraction(rewards: Float[Tensor, " batch"], *, fraction: float) -> Bool[Tensor, " batch"]:
    """True for the best ⌈``fraction`` · n⌉ of the n finite rewards; among equal ones the earlier passes first.

    A reward that is not finite never passes and is not among the n; without any finite one nothing passes.

    Args:
        rewards: one per trajectory, any unit.
        fraction: in (0, 1], dimensionless.

    Raises:
        ConfigError: ``fraction`` outside (0, 1].

    >>> best_fraction(torch.tensor([1.0, 5.0, 3.0, float("nan")]), fraction=0.5)
    tensor([False,  True,  True, False])
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction must lie in (0, 1], got {fraction}.")
    finite = rewards.isfinite()
    # 0.07 · 100 is 7.000000000000001 in float64 and means 7, hence the small slack.
    num_passed = math.ceil(fraction * int(finite.sum()) - 1e-9)
    # −∞ sorts last, and a stable sort keeps earlier trajectories first among equals.
    order = rewards.masked_fill(~finite, float("-inf")).argsort(descending=True, stable=True)
    passed = torch.zeros_like(finite)
    passed[order[:num_passed]] = True
    return passed


def everything(rewards: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
    """True for every finite reward: no filter.

    >>> everything(torch.tensor([-3.0, float("nan")]))
    tensor([ True, False])
    """
    return rewards.isfinite()
