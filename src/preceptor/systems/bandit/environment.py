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
        pays: success probability (bernoulli) or mean (gaussian) of every arm.
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
        """Expected reward of every arm."""
        return self.base_reward * torch.tensor(self.pays, dtype=torch.float64)

    @property
    def best(self) -> int:
        """The arm of the highest expected reward (the first of equals)."""
        return int(self.expected.argmax())

    def rewards(self, num_pulls: int, generator: torch.Generator) -> Float[Tensor, "pulls arms"]:
        """What each arm pays at each pull. All arms are drawn, so that every policy meets the same chance."""
        shape = (num_pulls, len(self.words))
        pays = torch.tensor(self.pays, dtype=torch.float64)
        if self.kind == "bernoulli":
            draws = (torch.rand(shape, dtype=torch.float64, generator=generator) < pays).double()
        else:
            draws = pays + self.deviation * torch.randn(shape, dtype=torch.float64, generator=generator)
        return self.base_reward * draws

    def permuted(self, order: Tensor) -> Bandit:
        """The bandit whose i-th word pays what the ``order[i]``-th paid."""
        pays = tuple(self.pays[index] for index in order.tolist())
        return Bandit(self.name, self.words, self.kind, self.base_reward, pays, self.deviation)
