"""The arms of a result: how they are named, ordered and marked wherever they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEARNED = "learned"
COUNTS = ("model_calls", "tokens", "flops")
"""Costs: shown as whole numbers and not drawn as intervals."""


@dataclass(frozen=True)
class Arms:
    """The ``arms`` of ``result.json`` and what the result says about them.

    Attributes:
        estimates: arm -> metric -> mean, low, high, unit, n.
        oracles: arms that peek at what they are scored on.
        baseline: the arm whose interval is drawn as a band behind the others.
        lower_is_better: metrics, such as a loss, of which less is more.
        table: metrics of the short table; empty is all.
    """

    estimates: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    oracles: frozenset[str] = frozenset()
    baseline: str = "random"
    lower_is_better: frozenset[str] = frozenset()
    table: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: Mapping[str, Any] | None) -> Arms:
        """The arms of a result, none where there is no result yet."""
        result = result or {}
        return cls(
            estimates=result.get("arms", {}),
            oracles=frozenset(result.get("oracles", ())),
            baseline=result.get("baseline", "random"),
            lower_is_better=frozenset(result.get("lower_is_better", ())),
            table=tuple(result.get("table", ())),
        )

    @property
    def metrics(self) -> list[str]:
        """Every metric of any arm, in order of first appearance, costs last."""
        names = list(dict.fromkeys(metric for metrics in self.estimates.values() for metric in metrics))
        return sorted(names, key=lambda name: name in COUNTS)

    def unit(self, metric: str) -> str:
        """The unit of a metric, as the first arm that has it says."""
        return str(next(metrics[metric]["unit"] for metrics in self.estimates.values() if metric in metrics))

    def ordered(self, metric: str) -> list[str]:
        """The arms that have ``metric``, best first."""
        sign = 1 if self.base_name(metric) in self.lower_is_better else -1
        present = [arm for arm, metrics in self.estimates.items() if metric in metrics]
        return sorted(present, key=lambda arm: sign * self.estimates[arm][metric]["mean"])

    def best_oracle(self, metric: str) -> float | None:
        """The best mean of an oracle, if there is one."""
        oracles = [arm for arm in self.ordered(metric) if arm in self.oracles]
        return float(self.estimates[oracles[0]][metric]["mean"]) if oracles else None

    def kind(self, arm: str) -> str:
        """``learned``, ``oracle`` or ``control``."""
        return "learned" if arm == LEARNED else "oracle" if arm in self.oracles else "control"

    @staticmethod
    def base_name(metric: str) -> str:
        """The metric without the prefix of its split."""
        return metric.removeprefix("held_out_")


def spelled(name: str) -> str:
    """A name as it is read: ``progress_auc`` becomes ``progress AUC``."""
    return name.replace("_", " ").replace("auc", "AUC")
