"""Means and variances over what a mask counts, and running moments of a stream of rewards; checks of shapes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import CheckpointError, ShapeError


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The mean of ``values`` where ``mask`` is True, Σ m·x / Σ m; exactly 0, with a graph, where the mask is empty.

    What is masked out may be NaN or infinite: it changes neither the result nor the gradient.

    Raises:
        ShapeError: the shapes differ.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    check_same_shape(values=values, mask=mask)
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, unbiased: bool = True
) -> Float[Tensor, ""]:
    """The variance of ``values`` where ``mask`` is True; 0 below two counted values.

    Args:
        values: in any unit; the result has its square.
        mask: True = counts.
        unbiased: divide by n − 1 (the sample variance) instead of n.

    Raises:
        ShapeError: the shapes differ.

    >>> masked_variance(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    # Deviations from the mean first: E[x²] − E[x]² would cancel digits.
    squared_deviations = (values - masked_mean(values, mask)).masked_fill(~mask, 0.0).square().sum()
    # At least 1, so that an empty mask, or one value, gives 0 rather than 0/0.
    return squared_deviations / (mask.sum() - int(unbiased)).clamp(min=1)


def whiten(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, epsilon: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """``values`` shifted to mean 0 and scaled to variance 1 over ``mask``; 0 where the mask is False.

    (x − mean) / √(variance + ε) with the sample variance. Values without any spread become exactly 0, and so does a
    single one. Gradients flow; detach first when whitening advantages.

    Source: "The N Implementation Details of RLHF with PPO" (2023), detail on reward and advantage whitening.

    Raises:
        ShapeError: the shapes differ.

    >>> whiten(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([True, True, False]))
    tensor([-0.7071,  0.7071,  0.0000])
    """
    check_same_shape(values=values, mask=mask)
    if not mask.any():
        return values.masked_fill(~mask, 0.0)
    # Subtracting one of the values first leaves equal values at exactly 0; subtracting their mean leaves rounding
    # errors, which the division by their own standard deviation would blow up.
    shifted = values - values[mask][0].detach()
    deviations = shifted - masked_mean(shifted, mask)
    return (deviations * torch.rsqrt(masked_variance(shifted, mask) + epsilon)).masked_fill(~mask, 0.0)


class RunningMoments:
    """Count, mean and standard deviation of every finite value seen so far, in float64 (Welford 1962).

    A NaN or an infinity is left out and counted in ``num_excluded``: one of them would otherwise turn the mean into
    NaN for the rest of the run, and no comparison with NaN is ever True.

    >>> moments = RunningMoments()
    >>> moments.update(torch.tensor([1.0, 2.0, 6.0, float("nan")]))
    >>> moments.mean, moments.standard_deviation, moments.count, moments.num_excluded
    (3.0, 2.6457513110645907, 3, 1)
    """

    def __init__(self) -> None:
        self.count = 0
        self.num_excluded = 0
        self._mean = 0.0
        self._sum_squared_deviations = 0.0

    @property
    def mean(self) -> float:
        """The mean of the finite values; 0.0 before the first."""
        return self._mean

    @property
    def standard_deviation(self) -> float:
        """The sample standard deviation (divisor n − 1); 0.0 below two values."""
        return math.sqrt(self._sum_squared_deviations / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, values: Float[Tensor, "*shape"]) -> None:
        """Take in every element of ``values``, in order."""
        # In float64 and one at a time, so that the result does not depend on how a stream is cut into batches.
        for value in values.detach().double().flatten().tolist():
            if not math.isfinite(value):
                self.num_excluded += 1
                continue
            self.count += 1
            deviation = value - self._mean
            self._mean += deviation / self.count
            # Welford: the product of the deviations from the old and the new mean.
            self._sum_squared_deviations += deviation * (value - self._mean)

    def state_dict(self) -> dict[str, int | float]:
        """The whole state as JSON numbers; Python writes floats so that they are read back bit for bit."""
        return {
            "count": self.count,
            "num_excluded": self.num_excluded,
            "mean": self._mean,
            "sum_squared_deviations": self._sum_squared_deviations,
        }

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Take the state over from ``state_dict``.

        Raises:
            CheckpointError: keys are missing or unknown; nothing is changed then.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise CheckpointError(f"running moments have the keys {sorted(state)}; expected {sorted(expected)}")
        self.count = int(state["count"])
        self.num_excluded = int(state["num_excluded"])
        self._mean = float(state["mean"])
        self._sum_squared_deviations = float(state["sum_squared_deviations"])


# ---- shapes, which annotations do not enforce -----------------------------------------------------------------------


def check_same_shape(**tensors: Tensor) -> None:
    """Nothing, when all ``tensors`` have one shape; broadcasting would hide a mistake, so it is refused.

    Raises:
        ShapeError: naming the first two that differ.

    >>> import torch
    >>> check_same_shape(rewards=torch.zeros(2), mask=torch.ones(2, dtype=torch.bool))
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)} and {first_name} {tuple(first.shape)}; "
                "they must be equal, expand the smaller one"
            )
