"""Baselines: bandit algorithms without a language model, on the same draws as the model.

Each takes ``rewards`` [runs, pulls, arms], what every arm would pay at every pull, sees only the rewards of its own
pulls, and gives the arms that it pulls [runs, pulls]. Ties are broken at random. Rewards are in base rewards (a
Bernoulli arm pays 0 or 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rewards = Float[Tensor, "runs pulls arms"]
Pulls = Int[Tensor, "runs pulls"]


def uniform(rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Each arm with the same probability."""
    runs, pulls, arms = rewards.shape
    return torch.randint(arms, (runs, pulls), generator=generator)


def greedy(rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Each arm once, then the arm of the best mean so far."""
    return _by_index(rewards, lambda means, counts, pull: means, generator=generator)


def ucb1(rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Each arm once, then the largest mean + √(2 ln t / n) (Auer et al. 2002); its bound needs rewards in [0, 1]."""
    return _by_index(
        rewards, lambda means, counts, pull: means + (2 * math.log(pull) / counts).sqrt(), generator=generator
    )


def thompson(rewards: Rewards, *, generator: torch.Generator, kind: str = "bernoulli", deviation: float = 1.0) -> Pulls:
    """The best of one draw from each arm's posterior (Thompson 1933).

    Bernoulli arms have a Beta(1, 1) prior; gaussian ones a flat prior and the known ``deviation``, after one pull each.
    """

    def index(means: Tensor, counts: Tensor, pull: int) -> Tensor:
        if kind == "bernoulli":
            successes = means * counts  # [runs, arms], as are all statistics here
            return _beta(1 + successes, 1 + counts - successes, generator)
        noise = torch.randn(means.shape, dtype=means.dtype, generator=generator)
        return means + deviation * noise / counts.sqrt()

    return _by_index(rewards, index, generator=generator, each_arm_first=kind != "bernoulli")


def gradient_bandit(
    rewards: Rewards, *, generator: torch.Generator, step_size: float = 0.1, baseline: bool = True
) -> Pulls:
    """Softmax preferences moved along the gradient of the expected reward (Sutton and Barto 2018, section 2.8).

    The baseline is the mean of the rewards so far, the current one included.
    """
    runs, pulls, arms = rewards.shape
    preferences, mean = torch.zeros(runs, arms, dtype=rewards.dtype), torch.zeros(runs, dtype=rewards.dtype)
    chosen = torch.empty(runs, pulls, dtype=torch.long)
    for pull in range(pulls):
        probabilities = preferences.softmax(-1)
        arm = torch.multinomial(probabilities, 1, generator=generator)  # [runs, 1]
        reward = rewards[:, pull].gather(1, arm)[:, 0]
        mean += (reward - mean) / (pull + 1)
        advantage = reward - mean if baseline else reward
        # The gradient of ln softmax in the preferences: one-hot of the arm minus the probabilities, [runs, arms].
        gradient = torch.zeros_like(probabilities).scatter(1, arm, 1.0) - probabilities
        preferences += step_size * advantage[:, None] * gradient
        chosen[:, pull] = arm[:, 0]
    return chosen


def _by_index(
    rewards: Rewards,
    index: Callable[[Tensor, Tensor, int], Tensor],
    *,
    generator: torch.Generator,
    each_arm_first: bool = True,
) -> Pulls:
    """At each pull the arm of the largest ``index(means, counts, pulls so far)``."""
    runs, pulls, arms = rewards.shape
    counts, sums = torch.zeros(runs, arms, dtype=rewards.dtype), torch.zeros(runs, arms, dtype=rewards.dtype)
    chosen = torch.empty(runs, pulls, dtype=torch.long)
    for pull in range(pulls):
        if each_arm_first and pull < arms:
            arm = _largest((counts == 0).to(rewards.dtype), generator)
        else:
            arm = _largest(index(sums / counts.clamp(min=1), counts, pull), generator)
        reward = rewards[:, pull].gather(1, arm)  # [runs, 1]: all that is seen of this pull
        counts.scatter_add_(1, arm, torch.ones_like(reward))
        sums.scatter_add_(1, arm, reward)
        chosen[:, pull] = arm[:, 0]
    return chosen


def _largest(values: Tensor, generator: torch.Generator) -> Tensor:
    """Index of the largest value of each row, [rows, 1]; where several are equal, one of them at random."""
    is_largest = values == values.amax(-1, keepdim=True)  # exact: equal statistics come from equal counts and sums
    return torch.multinomial(is_largest.double(), 1, generator=generator)


def _beta(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """Draws from Beta(a, b) as a ratio of gammas, since torch's own Beta takes no generator."""
    first, second = torch._standard_gamma(a, generator=generator), torch._standard_gamma(b, generator=generator)
    return first / (first + second)


def play_all(
    rewards: Rewards,
    expected: Float[Tensor, "runs arms"],
    *,
    kind: str,
    deviation: float,
    generator: torch.Generator,
) -> dict[str, Pulls]:
    """Pulls of each algorithm on the same ``rewards``, and of the optimum, which is told the ``expected`` rewards."""
    return {
        "uniform": uniform(rewards, generator=generator),
        "greedy": greedy(rewards, generator=generator),
        "ucb1": ucb1(rewards, generator=generator),
        "thompson": thompson(rewards, generator=generator, kind=kind, deviation=deviation),
        "gradient_bandit": gradient_bandit(rewards, generator=generator),
        "optimum": expected.argmax(-1, keepdim=True).expand(-1, rewards.shape[1]),
    }
