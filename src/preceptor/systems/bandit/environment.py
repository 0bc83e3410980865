"""Bandits: arms that pay by chance, and what every arm would have paid at every pull."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Bandit:
    """Words that pay by chance.

    Attributes:
        name: of the bandit.
        words: its arms.
        kind: ``"bernoulli"`` or ``"gaussian"``.
        base_reward: what one unit of ``pays`` is worth.
        pays: success probability (bernoulli) or mean (gaussian) of each arm.
        deviation: standard deviation of a gaussian arm, in base rewards.
    """

    name: str
    words: tuple[str, ...]
    kind: str
    base_reward: float
    pays: tuple[float, ...]
    deviation: float = 1.0

    @property
    def expected(self) -> Float[Tensor, " arms"]:
        """Expected reward of each arm."""
        return self.base_reward * torch.tensor(self.pays, dtype=torch.float64)

    @property
    def best(self) -> int:
        """The arm of the highest expected reward (the first of equals)."""
        return int(self.expected.argmax())

    def rewards(self, num_pulls: int, generator: torch.Generator) -> Float[Tensor, "pulls arms"]:
        """What each arm pays at each pull. All arms are drawn, so that every policy meets the same luck."""
        shape = (num_pulls, len(self.words))
        pays = torch.tensor(self.pays, dtype=torch.float64)
        # float64, so that a replay compares equal to what JSON holds.
        if self.kind == "bernoulli":
            # Uniform below p is a success, with probability p.
            draws = (torch.rand(shape, dtype=torch.float64, generator=generator) < pays).double()
        else:
            draws = pays + self.deviation * torch.randn(shape, dtype=torch.float64, generator=generator)
        return self.base_reward * draws

    def permuted(self, order: Tensor) -> Bandit:
        """The bandit whose i-th word pays what the ``order[i]``-th word of this one pays."""
        pays = tuple(self.pays[index] for index in order.tolist())
        return Bandit(self.name, self.words, self.kind, self.base_reward, pays, self.deviation)


@dataclass(frozen=True)
class EpisodeTables:
    """A batch of bandits, one for each episode, that differ in which word pays what.

    Attributes:
        rewards: what each word would pay in each round.
        expected: the expected reward of each word.
    """

    rewards: Float[Tensor, "episodes rounds arms"]
    expected: Float[Tensor, "episodes arms"]


def sample_tables(bandit: Bandit, *, num_episodes: int, num_rounds: int, generator: torch.Generator) -> EpisodeTables:
    """``bandit`` with its payments dealt to its words anew for each episode."""
    # All permutations are drawn before the first reward.
    dealt = [bandit.permuted(torch.randperm(len(bandit.words), generator=generator)) for _ in range(num_episodes)]
    return EpisodeTables(
        rewards=torch.stack([one.rewards(num_rounds, generator) for one in dealt]),
        expected=torch.stack([one.expected for one in dealt]),
    )


@dataclass(frozen=True)
class BanditFamily:
    """Bandits to be sampled: every one has its own means, so that only its own rewards tell which arm is best.

    Attributes:
        num_arms: of each bandit.
        kind: ``"bernoulli"`` or ``"gaussian"`` (of standard deviation 1).
        prior: of the means. ``"uniform"`` on [0, 1], ``"low"`` is Beta(2, 8), ``"three_in_four"`` deals 3/4 to one arm
            and 1/4 to the others, ``"close"`` likewise 0.6 and 0.4, ``"certain"`` 1 and 0; ``"normal"`` (gaussian
            alone) is N(0, 1).
    """

    num_arms: int = 2
    kind: str = "bernoulli"
    prior: str = "uniform"

    @property
    def beta(self) -> tuple[float, float] | None:
        """Parameters of the beta prior of each arm's mean; None where the means are not independent betas."""
        return {"uniform": (1.0, 1.0), "low": (2.0, 8.0)}.get(self.prior)

    @property
    def dealt(self) -> tuple[float, float] | None:
        """Mean of the one good arm and of the others, where the prior deals them."""
        return {"three_in_four": (0.75, 0.25), "close": (0.6, 0.4), "certain": (1.0, 0.0)}.get(self.prior)

    def sample_means(self, num_bandits: int, generator: torch.Generator) -> Float[Tensor, "bandits arms"]:
        """The means of ``num_bandits`` bandits."""
        shape = (num_bandits, self.num_arms)
        if self.prior == "normal":
            return torch.randn(shape, dtype=torch.float64, generator=generator)
        if self.beta is not None:
            a, b = (torch.full(shape, value, dtype=torch.float64) for value in self.beta)
            return sample_beta(a, b, generator)
        assert self.dealt is not None
        good, bad = self.dealt
        best = torch.randint(self.num_arms, (num_bandits, 1), generator=generator)
        return torch.full(shape, bad, dtype=torch.float64).scatter(1, best, good)

    def sample(
        self, num_bandits: int, num_rounds: int, generator: torch.Generator, *, sharpness: float = 1.0
    ) -> EpisodeTables:
        """Unrelated bandits with what every arm would pay in every round.

        Args:
            num_bandits: one for each episode.
            num_rounds: of an episode.
            generator: of the means, then of the rewards.
            sharpness: factor of the log-odds of Bernoulli means; far above 1 makes rewards nearly certain.
        """
        means = self.sample_means(num_bandits, generator)  # [bandits, arms]
        shape = (num_bandits, num_rounds, self.num_arms)
        if self.kind == "gaussian":
            noise = torch.randn(shape, dtype=torch.float64, generator=generator)
            return EpisodeTables(rewards=means[:, None] + noise, expected=means)
        if sharpness != 1.0:
            means = torch.sigmoid(sharpness * torch.logit(means, eps=1e-6))
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
        return EpisodeTables(rewards=(uniforms < means[:, None]).double(), expected=means)


def sample_beta(a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
    """Draws from Beta(a, b) as a ratio of gammas, since torch's own Beta takes no generator."""
    first, second = torch._standard_gamma(a, generator=generator), torch._standard_gamma(b, generator=generator)
    return first / (first + second)
