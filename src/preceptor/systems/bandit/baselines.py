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

from preceptor.lm.sampling import draw
from preceptor.systems.bandit.environment import BanditFamily, sample_beta

Rewards = Float[Tensor, "runs pulls arms"]
Pulls = Int[Tensor, "runs pulls"]


def uniform(rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Each arm with the same probability."""
    runs, pulls, arms = rewards.shape
    return torch.randint(arms, (runs, pulls), generator=generator)


def greedy(rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Each arm once, then the arm of the best mean so far."""
    return _by_index(rewards, lambda means, counts, pull: means, generator=generator)


def epsilon_greedy(rewards: Rewards, *, generator: torch.Generator, epsilon: float = 0.05) -> Pulls:
    """As :func:`greedy`, but with probability ``epsilon`` any arm at random."""

    def index(means: Tensor, counts: Tensor, pull: int) -> Tensor:
        explores = torch.rand(len(means), 1, generator=generator) < epsilon
        return torch.where(explores, torch.zeros_like(means), means)  # equal indices are a random arm

    return _by_index(rewards, index, generator=generator)


def ucb1(rewards: Rewards, *, generator: torch.Generator, width: float = 2.0) -> Pulls:
    """Each arm once, then the largest mean + √(c ln t / n), c = ``width`` (Auer et al. 2002, where it is 2).

    Its bound needs rewards in [0, 1].
    """
    return _by_index(
        rewards, lambda means, counts, pull: means + (width * math.log(pull) / counts).sqrt(), generator=generator
    )


def thompson(rewards: Rewards, *, generator: torch.Generator, kind: str = "bernoulli", deviation: float = 1.0) -> Pulls:
    """The best of one draw from each arm's posterior (Thompson 1933).

    Bernoulli arms have a Beta(1, 1) prior; gaussian ones a flat prior and the known ``deviation``, after one pull each.
    """

    def index(means: Tensor, counts: Tensor, pull: int) -> Tensor:
        if kind == "bernoulli":
            successes = means * counts  # [runs, arms], as are all statistics here
            return sample_beta(1 + successes, 1 + counts - successes, generator)
        noise = torch.randn(means.shape, dtype=means.dtype, generator=generator)
        return means + deviation * noise / counts.sqrt()

    return _by_index(rewards, index, generator=generator, each_arm_first=kind != "bernoulli")


def thompson_for(family: BanditFamily, rewards: Rewards, *, generator: torch.Generator) -> Pulls:
    """Thompson sampling that knows the prior from which the bandits of ``family`` are drawn."""

    def index(means: Tensor, counts: Tensor, pull: int) -> Tensor:
        return posterior_draws(family, means * counts, counts, generator)

    return _by_index(rewards, index, generator=generator, each_arm_first=False)


def posterior_draws(
    family: BanditFamily,
    sums: Float[Tensor, "*shape arms"],
    counts: Float[Tensor, "*shape arms"],
    generator: torch.Generator,
) -> Float[Tensor, "*shape arms"]:
    """One draw of the means of each bandit from its posterior, given sum and number of each arm's rewards."""
    if family.prior == "normal":  # N(0, 1) means and unit noise: posterior N(sum / (n + 1), 1 / (n + 1))
        noise = torch.randn(sums.shape, dtype=sums.dtype, generator=generator)
        return sums / (counts + 1) + noise / (counts + 1).sqrt()
    if family.beta is not None:
        a, b = family.beta
        return sample_beta(a + sums, b + counts - sums, generator)
    assert family.dealt is not None
    # One arm is good. Its log-odds are linear in its successes and failures; draw which one it is.
    good, bad = family.dealt
    floor = 1e-9  # what certain rewards rule out is all but impossible, so that no log-odds are infinite
    of_success, of_failure = (math.log(max(p, floor) / max(q, floor)) for p, q in ((good, bad), (1 - good, 1 - bad)))
    log_odds = sums * of_success + (counts - sums) * of_failure
    best = draw(log_odds.flatten(0, -2).log_softmax(-1), generator).view(sums.shape[:-1])  # one for every bandit
    return torch.full_like(sums, bad).scatter(-1, best[..., None], good)


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
