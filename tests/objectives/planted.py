"""Worlds in which the best schedule of a mixture is known: losses are formulas in the tokens that took effect.

A dataset has an amount of skill; its loss falls with it. Training on a mixture adds to the skills at a speed that the
world defines: a prerequisite gates what comes after it, duplicates share one skill, one dataset helps another, what is
not practised fades. ``best`` is the macro loss of the targets under the best schedule of eight pieces that gradient
descent finds (:func:`best_schedule`); no mixture can do better than that by more than the pieces' coarseness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from preceptor.objectives import Mixture, document_difficulty

UPDATES = 40
STEPS = 10
"""Of the differential equation within an update."""


@dataclass(frozen=True)
class World:
    """``loss(skill)`` and ``speed(weights, skill)``, both one number a dataset; ``budget`` tokens in all."""

    loss: Callable[[torch.Tensor], torch.Tensor]
    speed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    targets: tuple[bool, ...]
    budget: float
    best: float
    judged: Callable[[torch.Tensor], torch.Tensor] | None = None  # where the target is no dataset of the mixture

    def macro(self, skill: torch.Tensor) -> torch.Tensor:
        if self.judged is not None:
            return self.judged(skill)
        return self.loss(skill)[torch.tensor(self.targets)].mean()

    def advance(self, skill: torch.Tensor, weights: torch.Tensor, tokens: float) -> torch.Tensor:
        for _ in range(STEPS):
            skill = (skill + self.speed(weights, skill) * tokens / STEPS).clamp(min=0)
        return skill

    def follow(self, weights: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The macro loss after the whole budget."""
        skill = torch.zeros(len(self.targets), dtype=torch.float64)
        for update in range(UPDATES):
            skill = self.advance(skill, weights(update, skill), self.budget / UPDATES)
        return self.macro(skill)

    def alignment(self, skill: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """What a token of each dataset lowers the macro loss by, with a tenth of the largest as noise."""
        values = []
        for index in range(len(self.targets)):
            only = torch.zeros(len(self.targets), dtype=torch.float64)
            only[index] = 1.0
            ahead = skill + self.speed(only, skill) * 0.2 * self.budget / UPDATES
            values.append(self.macro(skill) - self.macro(ahead.clamp(min=0)))
        exact = torch.stack(values)
        return exact + 0.1 * exact.abs().max() * torch.from_numpy(random.standard_normal(len(exact)))

    def under(self, mixture: Mixture, *, seed: int = 0) -> float:
        """The macro loss under a mixture that measures 100 documents (the same each time) at each update."""
        random = np.random.default_rng(seed)
        documents = 0.05 * random.standard_normal((len(self.targets), 100))
        previous: list[list[torch.Tensor]] = []

        def weights(update: int, skill: torch.Tensor) -> torch.Tensor:
            jitter = 0.02 * random.standard_normal(documents.shape)
            losses = list(self.loss(skill)[:, None] + torch.from_numpy(documents + jitter))
            measured = document_difficulty(losses, previous=previous[-1] if previous else losses)
            previous.append(losses)
            return mixture.update(replace(measured, alignment=self.alignment(skill, random)))

        return float(self.follow(weights))

    def uniform(self) -> float:
        even = torch.full((len(self.targets),), 1 / len(self.targets), dtype=torch.float64)
        return float(self.follow(lambda update, skill: even))

    def gap_closed(self, mixture: Mixture, *, seed: int = 0) -> float:
        """Share of the gap from uniform to the best schedule."""
        uniform = self.uniform()
        return (uniform - self.under(mixture, seed=seed)) / (uniform - self.best)


def best_schedule(world: World, *, pieces: int = 8, steps: int = 300) -> float:
    """The macro loss under the best schedule of so many pieces that Adam finds from three starts."""
    results = []
    for start in range(3):
        generator = torch.Generator().manual_seed(start)
        logits = (0.1 if start == 0 else 1.5) * torch.randn(
            pieces, len(world.targets), generator=generator, dtype=torch.float64
        )
        if start == 1:  # one dataset after another
            order = torch.linspace(0, len(world.targets) - 1e-6, pieces).long()
            logits = 4 * torch.eye(len(world.targets), dtype=torch.float64)[order]
        logits.requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(steps):
            weights = logits.softmax(-1)
            loss = world.follow(lambda update, _, weights=weights: weights[update * pieces // UPDATES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            results.append(float(loss.detach()))
    return min(results)


# ---- the worlds ------------------------------------------------------------------------------------------------------

FLOOR = torch.tensor([1.0, 1.3, 0.8, 1.5], dtype=torch.float64)
SCALE = torch.tensor([3.0, 1.5, 6.0, 2.0], dtype=torch.float64)
EXPONENT = torch.tensor([0.3, 0.15, 0.45, 0.25], dtype=torch.float64)


def _laws(skill: torch.Tensor) -> torch.Tensor:
    return FLOOR + SCALE * (1 + skill) ** -EXPONENT


def _letters(skill: torch.Tensor) -> torch.Tensor:
    """Noise to a model from scratch: steep while it learns which letters there are, then nothing."""
    return 4.75 + 3.65 * torch.exp(-skill / 25)


def _exponential(skill: torch.Tensor) -> torch.Tensor:
    return 1 + 3 * torch.exp(-skill / 300)


def _chained(weights: torch.Tensor, skill: torch.Tensor) -> torch.Tensor:
    """Each dataset can be learned as far as the one before it is mastered."""
    mastered = torch.sigmoid((1 - torch.exp(-skill / 300) - 0.75) / 0.05)
    return weights * torch.cat([torch.ones(1, dtype=torch.float64), mastered[:-1].cumprod(0)])


def _copies(weights: torch.Tensor, skill: torch.Tensor) -> torch.Tensor:
    return torch.cat([weights[:4].sum().expand(4), weights[4:]])


def _copy_laws(skill: torch.Tensor) -> torch.Tensor:
    """Four copies of the first law, then the other three."""
    places = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    return FLOOR[places] + SCALE[places] * (1 + skill) ** -EXPONENT[places]


def _plain(weights: torch.Tensor, skill: torch.Tensor) -> torch.Tensor:
    return weights


def _fading(weights: torch.Tensor, skill: torch.Tensor) -> torch.Tensor:
    return weights - skill / 2000


HELP = torch.tensor([0.1, 0.8, 0.3, 0.0, 0.0], dtype=torch.float64)


CHAIN = World(_exponential, _chained, (True,) * 4, 2400.0, best=1.5683)
NOISE = World(
    lambda s: torch.cat([_laws(s[:4]), _letters(s[4:])]), _plain, (True,) * 4 + (False,) * 4, 4000.0, best=1.5325
)
COPIES = World(_copy_laws, _copies, (False, False, False, True, True, True, True), 4000.0, best=1.5322)
FAR = World(
    lambda s: torch.cat([_laws(s[:4]), _letters(s[4:])]),
    _plain,
    (False,) * 5,
    4000.0,
    best=1.2668,
    judged=lambda s: 1 + 3 * (1 + (s * HELP).sum()) ** -0.3,
)
FORGETTING = World(
    lambda s: torch.cat([_laws(s[:4]), _letters(s[4:])]), _fading, (True,) * 4 + (False,) * 2, 8000.0, best=1.6108
)
WORLDS = {"chain": CHAIN, "noise": NOISE, "copies": COPIES, "far": FAR, "forgetting": FORGETTING}
