"""Controls: mixtures that never move, the loss itself, and two published rules, Exp3 (ODM) and scaling laws (ADO)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.objectives.mixture_rules import Difficulty, State, check_ranges


@dataclass(frozen=True)
class ByDifficulty:
    """Weights in proportion to the mean loss: the harder, the more. A control, since noise is hardest of all.

    >>> zeros = torch.zeros(2)
    >>> measured = Difficulty(torch.tensor([3.0, 1.0]), zeros, zeros, zeros)
    >>> ByDifficulty().preferences(measured, {}, tokens=zeros, weights=zeros, num_updates=0)[0]
    tensor([3., 1.], dtype=torch.float64)
    """

    def initial_state(self, num_datasets: int) -> State:
        """Nothing is remembered."""
        return {}

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        return difficulty.mean.double(), state


@dataclass(frozen=True)
class Fixed:
    """The weights as they are: ``uniform``, ``proportional``, ``static`` and ``targets`` differ in where they start.

    >>> weights, zeros = torch.tensor([0.75, 0.25]), torch.zeros(2)
    >>> measured = Difficulty(zeros, zeros, zeros, zeros)
    >>> Fixed().preferences(measured, {}, tokens=zeros, weights=weights, num_updates=0)[0]
    tensor([0.7500, 0.2500])
    """

    def initial_state(self, num_datasets: int) -> State:
        """Nothing is remembered."""
        return {}

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        return weights, state


@dataclass(frozen=True)
class Exp3:
    """Online Data Mixing: an Exp3 bandit whose arms are the datasets and whose reward is their loss.

    After update t, with K datasets and the exploration rate E_t = min(1/K, √(ln K / (K·t))):

        R ← α·R + (1 − α)·loss/weight   for each dataset that was trained on (the others keep R)
        w = (1 − K·E_t)·softmax(E_{t−1}·R) + E_t

    It stays uniform until t exceeds K·ln K. High loss is rewarded, learnable or not, so noise draws weight. The
    exploration of :class:`~preceptor.objectives.mixture.Mixture` comes on top; 0 there is the published rule.

    Source: Albalak et al., arXiv 2312.02406, algorithm 1. Departure: the loss is the measured difficulty, not that of
    the training batches, so that all rules see the same numbers.

    Args:
        smoothing: α in [0, 1).

    Raises:
        ConfigError: an argument out of its range.

    >>> rule, zeros = Exp3(smoothing=0.0), torch.zeros(2)
    >>> measured = Difficulty(torch.tensor([3.0, 1.0]), zeros, zeros, zeros)
    >>> state, half = rule.initial_state(2), torch.full((2,), 0.5)
    >>> rule.preferences(measured, state, tokens=torch.ones(2), weights=half, num_updates=99)[0]
    tensor([0.5520, 0.4480], dtype=torch.float64)
    """

    smoothing: float = 0.9

    def __post_init__(self) -> None:
        check_ranges(("smoothing", self.smoothing, 0 <= self.smoothing < 1, "lie in [0, 1)"))

    def initial_state(self, num_datasets: int) -> State:
        """No reward yet."""
        return {"rewards": torch.zeros(num_datasets, dtype=torch.float64)}

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        # The paper counts updates from 1.
        num_datasets, update = len(tokens), num_updates + 1
        # Importance weighting: a dataset drawn with probability w shows its loss only in a share w of the steps. The
        # tiny floor keeps 0/0 out; a dataset with weight 0 is not trained on, so its estimate is dropped below.
        estimates = difficulty.mean.double() / weights.double().clamp(min=torch.finfo(torch.float64).tiny)
        smoothed = self.smoothing * state["rewards"] + (1 - self.smoothing) * estimates
        rewards = torch.where(tokens > 0, smoothed, state["rewards"])
        # The exponent uses the rate of the update before, the floor that of this one, as in algorithm 1.
        rate, before = self._exploration(update, num_datasets), self._exploration(update - 1, num_datasets)
        return (1 - num_datasets * rate) * torch.softmax(before * rewards, dim=0) + rate, {"rewards": rewards}

    @staticmethod
    def _exploration(update: int, num_datasets: int) -> float:
        # K·E ≤ 1 by the first bound, so the softmax's share is never negative.
        return min(1 / num_datasets, math.sqrt(math.log(num_datasets) / (num_datasets * max(update, 1))))


@dataclass(frozen=True)
class Ado:
    """Adaptive Data Optimization: prefer the dataset whose fitted scaling law forecasts the fastest fall of its loss.

    To the losses of each dataset so far the law L(n) = E + B·n^(−A) is fitted, n the tokens trained on in all. With
    h the running share of the dataset in those tokens and μ the prior,

        ρ ∝ μ·√h·A·B·n^(−A−1),   w = γ·ρ + (1 − γ)·(mean of all ρ so far, the prior first)

    Until ``min_points`` measurements lie behind it the weights stay as they are.

    Source: Jiang et al., arXiv 2410.11820, section 3, with its γ = 0.1. Departures: least squares on the loss over a
    grid of A in [0.05, 0.8], E ≥ 0 and B ≥ 0, in place of a Huber loss of its logarithm from a grid of starts (one
    exact answer, nothing to tune); measured losses in place of those of the batches; the floor is the mixture's;
    the prior counts once in the mean of ρ (a weight of 1/(k + 1) after k fits), where the paper's code takes it in at
    every step of its warm-up, and so leaves it later.

    Args:
        prior: μ, a share for each dataset; empty: uniform.
        mixing: γ in (0, 1].
        history_rate: of the running share, in (0, 1].
        min_points: measurements with training behind them before the first fit, at least 3.

    Raises:
        ConfigError: an argument out of its range.

    >>> rule, zeros, half = Ado(mixing=1.0, min_points=3), torch.zeros(2), torch.ones(2) / 2
    >>> state = rule.initial_state(2)
    >>> for n in (1.0, 2.0, 3.0):  # the first falls like 1 + n^(-1/2), the second not at all
    ...     measured = Difficulty(torch.tensor([1 + n**-0.5, 5.0]), zeros, zeros, zeros)
    ...     preferences, state = rule.preferences(measured, state, tokens=half, weights=half, num_updates=int(n) - 1)
    >>> preferences
    tensor([1., 0.], dtype=torch.float64)
    """

    prior: tuple[float, ...] = ()
    mixing: float = 0.1
    history_rate: float = 0.1
    min_points: int = 5

    def __post_init__(self) -> None:
        check_ranges(
            ("mixing", self.mixing, 0 < self.mixing <= 1, "lie in (0, 1]"),
            ("history_rate", self.history_rate, 0 < self.history_rate <= 1, "lie in (0, 1]"),
            ("min_points", self.min_points, self.min_points >= 3, "be at least 3"),
        )

    def initial_state(self, num_datasets: int) -> State:
        """An empty history; the running mean of ρ is the prior."""
        empty = torch.zeros(0, num_datasets, dtype=torch.float64)
        prior = torch.tensor(self.prior or [1 / num_datasets] * num_datasets, dtype=torch.float64)
        return {"tokens": empty, "losses": empty, "share": prior, "mean_preference": prior}

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        if not tokens.any():  # a law of n has nothing to say at n = 0
            return weights, state
        tokens = tokens.double()
        # Exponential average of the dataset's share.
        share = state["share"] + self.history_rate * (tokens / tokens.sum() - state["share"])
        state = state | {
            "tokens": torch.cat([state["tokens"], tokens[None]]),
            "losses": torch.cat([state["losses"], difficulty.mean.double()[None]]),
            "share": share,
        }
        if len(state["losses"]) < self.min_points:
            return weights, state
        trained_on = state["tokens"].sum(dim=1).cumsum(dim=0)  # [step], n of the law: all datasets together
        speed = forecast_fall(state["losses"], trained_on)
        prior = torch.tensor(self.prior or [1.0] * len(tokens), dtype=torch.float64)
        preference = prior * share.sqrt() * speed  # [choices]
        # No loss is forecast to fall: the mixture then falls back to uniform weights.
        if not preference.any():
            return torch.zeros_like(preference), state
        preference = preference / preference.sum()
        # Mean of the preferences *before* this one.
        mean = state["mean_preference"]
        num_fits = len(state["losses"]) - self.min_points + 1
        # The +1 counts the prior, which stands in as the first of them.
        state["mean_preference"] = mean + (preference - mean) / (num_fits + 1)
        return self.mixing * preference + (1 - self.mixing) * mean, state


# 76 exponents. Published ones for data lie inside: 0.095 (Kaplan et al. 2020), 0.28 (Hoffmann et al. 2022).
_EXPONENTS = torch.arange(0.05, 0.801, 0.01, dtype=torch.float64)


def forecast_fall(
    losses: Float[Tensor, "step choices"], num_tokens: Float[Tensor, " step"]
) -> Float[Tensor, " choices"]:
    """−dL/d(ln n) at the last step under the law L(n) = E + B·n^(−A) fitted to each column; at least 0, nats.

    Least squares: exact in E ≥ 0 and B ≥ 0 for each A of a grid over [0.05, 0.8], the best A taken.

    >>> n = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    >>> forecast_fall((2 + n**-0.5)[:, None], n)  # A·B·n^(−A) = 0.5·16^(−0.5)
    tensor([0.1250], dtype=torch.float64)
    """
    # Another unit of n changes B and nothing else.
    relative = num_tokens.double() / num_tokens[-1]  # so that B is the part of the last loss that can still fall
    powers = relative[:, None, None] ** -_EXPONENTS  # step, 1, exponent
    targets = losses.double()[:, :, None]  # step, choices, 1
    # Simple linear regression of the loss on n^(−A), for each dataset and each exponent at once: [choices, exponent].
    mean_power, mean_target = powers.mean(dim=0), targets.mean(dim=0)
    spread = (powers - mean_power).square().sum(dim=0)
    slope = ((powers - mean_power) * (targets - mean_target)).sum(dim=0) / spread.clamp(min=1e-300)
    # A loss that rises is no progress: slope 0, and the floor is the mean.
    slope = slope.clamp(min=0)
    floor = mean_target - slope * mean_power
    # Where the intercept comes out negative the best E is its bound 0, and the line goes through the origin.
    through_zero = (powers * targets).sum(dim=0) / powers.square().sum(dim=0)
    slope, floor = torch.where(floor < 0, through_zero, slope), floor.clamp(min=0)
    error = (targets - floor - slope * powers).square().sum(dim=0)
    # [choices, 1], the exponent with the least squared error.
    best = error.argmin(dim=1, keepdim=True)
    # n is 1 at the last step after scaling, so A·B·n^(−A) is A·B.
    return _EXPONENTS[best[:, 0]] * slope.gather(1, best)[:, 0]
