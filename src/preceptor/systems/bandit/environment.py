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
