"""Weighted sums of a step's metrics, of which the means are told at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from preceptor.runs.world import World


@dataclass
class Sums:
    """Weighted sums of a step's metrics, for their means at its end."""

    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Adds ``value`` with ``weight``."""
        self.totals[name] += float(value) * weight
        self.weights[name] += weight

    def copy(self) -> Sums:
        """The same numbers, to be added to apart."""
        return Sums(self.totals.copy(), self.weights.copy())

    def shared(self, world: World) -> Sums:
        """The same over the processes of ``world``, which have the same names."""
        return Sums(world.sums(self.totals), world.sums(self.weights)) if world.size > 1 else self

    def means(self) -> Mapping[str, float]:
        """The weighted mean of every metric."""
        return {name: total / self.weights[name] for name, total in self.totals.items() if self.weights[name]}
