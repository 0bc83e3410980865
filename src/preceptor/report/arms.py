"""How arms are named, ordered and marked wherever they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEARNED, RANDOM = "learned", "random"
ORACLES = ("exhaustive", "local_search", "beam", "greedy", "probe_greedy")
COUNTS = ("model_calls",)
"""Costs: shown as whole numbers and not drawn as intervals."""

Arms = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""The ``arms`` of ``result.json``: arm -> metric -> mean, low, high, unit, n."""


def is_oracle(arm: str) -> bool:
    """Whether an arm peeks at what it is scored on.

    >>> is_oracle("greedy_oracle"), is_oracle("best_of_n")
    (True, False)
    """
    return arm.startswith(ORACLES)


def spelled(name: str) -> str:
    """A name as it is read: ``progress_auc`` becomes ``progress AUC``."""
    return name.replace("_", " ").replace("auc", "AUC")


def metric_names(arms: Arms) -> list[str]:
    """Every metric of any arm, in order of first appearance, costs last."""
    names = list(dict.fromkeys(metric for metrics in arms.values() for metric in metrics))
    return sorted(names, key=lambda name: name in COUNTS)


def unit_of(arms: Arms, metric: str) -> str:
    """The unit of a metric, as the first arm that has it says."""
    return str(next(metrics[metric]["unit"] for metrics in arms.values() if metric in metrics))


def ordered(arms: Arms, metric: str) -> list[str]:
    """The arms that have ``metric``, best first."""
    return sorted((arm for arm in arms if metric in arms[arm]), key=lambda arm: -arms[arm][metric]["mean"])
