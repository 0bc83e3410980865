"""Flat records of what the arms of a run achieved: one of each dataset, and one of the macro mean over the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MACRO = "macro mean"
"""The item of the records that speak of all targets together."""

UNITS = {
    "loss_fall": "nats per token",
    "macro_loss": "nats per token",
    "loss_auc": "nats per token",
    "worst_loss": "nats per token",
    "steps_to_uniform": "steps",
    "reached_uniform": "share of seeds",
    "dataset_loss": "nats per token",
    "reward": "reward",
    "reward_gain": "reward",
    "kl": "nats per token",
    "tokens": "tokens",
    "rollout_tokens": "tokens",
    "model_calls": "rows",
}
"""Of every metric; the terms of the reward are added by :func:`units_of`."""


def arm_records(
    finished: Mapping[str, Mapping[str, Any]], *, targets: Mapping[str, bool], seed: int
) -> list[dict[str, Any]]:
    """The records of one run.

    - ``macro_loss``: validation loss after the last step, the mean over the targets; ``worst_loss`` the largest;
      ``loss_fall``: macro loss before training minus after it;
    - ``loss_auc``: area under the curve of the macro loss over the steps, divided by their number: its mean on the way;
    - ``steps_to_uniform``: the step at which the curve first reaches uniform's last macro loss, interpolated between
      validations; the last step where it never does, and then ``reached_uniform`` is 0;
    - ``dataset_loss``: of each dataset, targets or not;
    - ``reward``, ``kl`` and the terms of the reward: on held-out prompts after the last step; ``…_gain``: minus before;
    - ``tokens`` trained on, ``rollout_tokens`` written, ``model_calls``: rows that a model read, written or measured.

    Args:
        finished: of each arm its validation curve, its rewards and its counts.
        targets: of each dataset, whether it counts in the macro mean.
        seed: of the run.
    """
    curves = {arm: macro_curve(measured["curve"], targets) for arm, measured in finished.items()}
    records = []
    for arm, measured in finished.items():
        shared = {"arm": arm, "split": "held_out", "seed": seed}
        losses: Mapping[str, float] = measured["curve"][-1][1]
        macro: dict[str, Any] = {
            "loss_fall": curves[arm][0][1] - curves[arm][-1][1],
            "macro_loss": curves[arm][-1][1],
            "loss_auc": area(curves[arm]),
            "worst_loss": max(loss for name, loss in losses.items() if targets[name]),
            **_against_uniform(curves[arm], curves.get("uniform")),
            **_rewards(measured["rewards"]),
            **{name: measured["counts"][name] for name in ("tokens", "rollout_tokens", "model_calls")},
        }
        records.append({**shared, "item": MACRO, **macro})
        records += [{**shared, "item": name, "dataset_loss": loss} for name, loss in losses.items()]
    return records


def macro_curve(curve: Sequence[Sequence[Any]], targets: Mapping[str, bool]) -> list[tuple[int, float]]:
    """(step, mean loss of the targets) of each validation."""
    points = []
    for step, losses in curve:
        of_targets = [loss for name, loss in losses.items() if targets[name]]
        points.append((int(step), sum(of_targets) / len(of_targets)))
    return points


def area(curve: Sequence[tuple[int, float]]) -> float:
    """The mean height of a piecewise linear curve.

    >>> area([(0, 4.0), (1, 2.0), (3, 2.0)])  # (3 · 1 + 2 · 2) / 3
    2.3333333333333335
    """
    total = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def first_reached(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """Where a piecewise linear curve first comes down to ``level``; None where it never does.

    >>> first_reached([(0, 4.0), (10, 2.0), (20, 1.0)], 3.0)
    5.0
    """
    if curve[0][1] <= level:
        return float(curve[0][0])
    for (start, high), (end, low) in pairwise(curve):
        if low <= level:
            return start + (end - start) * (high - level) / (high - low)
    return None


def _against_uniform(
    curve: Sequence[tuple[int, float]], uniform: Sequence[tuple[int, float]] | None
) -> dict[str, float]:
    if uniform is None:
        return {}
    reached = first_reached(curve, uniform[-1][1])
    return {
        "steps_to_uniform": float(curve[-1][0]) if reached is None else reached,
        "reached_uniform": float(reached is not None),
    }


def _rewards(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not rows:
        return {}
    first, last = rows[0], rows[-1]
    names = [name for name in last if name != "step"]
    gains = {f"{name}_gain": last[name] - first[name] for name in names if name != "kl"}
    return {**{name: last[name] for name in names}, **gains}


def units_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The unit of every metric in ``records``; a term of the reward has the reward's."""
    keys = ("arm", "item", "split", "seed")
    names = dict.fromkeys(name for record in records for name in record if name not in keys)
    return {name: UNITS.get(name, "reward") for name in names}
