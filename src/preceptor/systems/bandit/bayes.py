"""The Bayes-optimal player of two Bernoulli arms for a known horizon, exactly, by dynamic programming.

What is known of the arms is four counts: successes and failures of each. Their beta posteriors follow from them, and so
the value of a state is the larger of what either arm pays now plus the expected value of the state that it leads to
(Bellman 1956). With t pulls made there are at most (t + 1)³ states, since the fourth count follows from the others.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

TIE = 2
"""In a table of decisions: both arms are worth the same."""

MAX_HORIZON = 200
"""The tables of this horizon take 0.4 GB; they grow with its fourth power."""


class OptimalPlayer:
    """What to pull in every state of two arms with independent Beta(``a``, ``b``) means.

    Args:
        horizon: number of pulls in all, at most ``MAX_HORIZON``.
        a, b: parameters of the prior of each arm's mean.

    Attributes:
        value: expected sum of rewards.
        regret: expected sum of what its pulls forgo, 1.748 for a horizon of 100 and uniform means.

    >>> player = OptimalPlayer(2)
    >>> round(player.value, 6)  # 1/2 and then: after a success 2/3, after a failure the other arm's 1/2
    1.083333
    """

    def __init__(self, horizon: int, *, a: float = 1.0, b: float = 1.0) -> None:
        assert 1 <= horizon <= MAX_HORIZON
        self.horizon, self.a, self.b = horizon, a, b
        # decisions[t][s0, f0, s1]: the arm to pull after s0 successes and f0 failures of arm 0, s1 successes of arm 1.
        self.decisions: list[np.ndarray] = [np.empty(0)] * horizon
        following = np.zeros((horizon + 1,) * 3)  # nothing is left to earn after the last pull
        for t in reversed(range(horizon)):
            values = self._action_values(t, following)
            is_tie = np.abs(values[0] - values[1]) < 1e-9
            self.decisions[t] = np.where(is_tie, TIE, values.argmax(0)).astype(np.int8)
            following = values.max(0)
        self.value = float(following.item())
        self.regret = horizon * expected_best_of_two(a, b) - self.value

    def _action_values(self, t: int, following: np.ndarray) -> np.ndarray:
        """What each arm is worth after ``t`` pulls, [2, t + 1, t + 1, t + 1].

        ``following`` holds the values of the states after one more pull, [t + 2, t + 2, t + 2].
        """
        s0, f0, s1 = np.ogrid[: t + 1, : t + 1, : t + 1]
        f1 = np.maximum(t - s0 - f0 - s1, 0)  # where the counts exceed t there is no such state, and nobody looks
        p0 = (s0 + self.a) / (s0 + f0 + self.a + self.b)
        p1 = (s1 + self.a) / (s1 + f1 + self.a + self.b)
        first = p0 * (1 + following[1:, :-1, :-1]) + (1 - p0) * following[:-1, 1:, :-1]
        # A failure of arm 1 leaves the three counts as they are: only the number of pulls grows.
        second = p1 * (1 + following[:-1, :-1, 1:]) + (1 - p1) * following[:-1, :-1, :-1]
        return np.stack([first, second])

    def play(self, rewards: Float[Tensor, "runs pulls 2"], *, generator: torch.Generator) -> Int[Tensor, "runs pulls"]:
        """The arms that it pulls, ties broken at random; of ``rewards`` it sees its own pulls alone."""
        runs, pulls, _ = rewards.shape
        assert pulls <= self.horizon
        successes, failures = (torch.zeros(runs, 2, dtype=torch.long) for _ in range(2))
        chosen = torch.empty(runs, pulls, dtype=torch.long)
        for t in range(pulls):
            decisions = torch.from_numpy(self.decisions[t])
            arm = decisions[successes[:, 0], failures[:, 0], successes[:, 1]].long()
            coin = torch.randint(2, (runs,), generator=generator)
            arm = torch.where(arm == TIE, coin, arm)[:, None]
            reward = rewards[:, t].gather(1, arm).long()  # [runs, 1]
            successes.scatter_add_(1, arm, reward)
            failures.scatter_add_(1, arm, 1 - reward)
            chosen[:, t] = arm[:, 0]
        return chosen


@lru_cache(maxsize=4)
def optimal_player(horizon: int, a: float = 1.0, b: float = 1.0) -> OptimalPlayer:
    """The player, computed once."""
    return OptimalPlayer(horizon, a=a, b=b)


def expected_best_of_two(a: float, b: float, *, num_points: int = 100_000) -> float:
    """E max(X, Y) of independent Beta(a, b) variables, as 1 − ∫ F(x)² dx; 2/3 for uniform ones.

    >>> round(expected_best_of_two(1.0, 1.0), 6)
    0.666667
    """
    x = (np.arange(num_points) + 0.5) / num_points  # midpoints
    density = x ** (a - 1) * (1 - x) ** (b - 1)
    cumulative = np.cumsum(density)
    # F at a midpoint holds half of its own cell.
    distribution = (cumulative - density / 2) / cumulative[-1]
    return float(1 - np.mean(distribution**2))


def best_arm_probabilities(
    successes: Float[Tensor, "*shape arms"],
    failures: Float[Tensor, "*shape arms"],
    *,
    a: float = 1.0,
    b: float = 1.0,
    num_points: int = 400,
) -> Float[Tensor, "*shape arms"]:
    """What a player who knows the prior believes: the probability of each arm to be the best, by quadrature.

    P(k is best) = ∫ f_k(x) Π_{j≠k} F_j(x) dx with the beta posteriors' densities f and distribution functions F.

    >>> best_arm_probabilities(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))[0].item() > 0.66
    True
    """
    x = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points  # midpoints, [points]
    first, second = successes.double()[..., None] + a, failures.double()[..., None] + b  # [..., arms, 1]
    log_density = (first - 1) * x.log() + (second - 1) * (1 - x).log()
    density = (log_density - log_density.amax(-1, keepdim=True)).exp()  # [..., arms, points]
    density = density / density.sum(-1, keepdim=True)
    distribution = (density.cumsum(-1) - density / 2).clamp_min(1e-300)
    log_distribution = distribution.log()
    others = (log_distribution.sum(-2, keepdim=True) - log_distribution).exp()  # Π_{j≠k} F_j
    probabilities = (density * others).sum(-1)
    return probabilities / probabilities.sum(-1, keepdim=True)
