"""The result of a run: outcomes of the methods, records, methods × metrics with intervals, a verdict and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from preceptor.evaluation.summary import GAP_UNIT, Comparison, Gap, compare, gap_closed, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, NOTHING_COMPARED, claims, family, opening
from preceptor.systems.curriculum.baselines import FROZEN_POLICY

TABLE = ("loss_fall", "macro_loss", "loss_auc", "steps_to_uniform", "reward_gain", "kl", "model_calls")
"""Metrics that the terminal shows; the page shows all."""

LOWER_IS_BETTER = ("macro_loss", "loss_auc", "steps_to_uniform", "kl")

ADAPTIVE_RULES = (
    "second_order",
    "learning_progress",
    "progress_on_targets",
    "alignment",
    "difficulty",
    "exp3",
    "ado",
)
"""Rules whose weights move."""

NO_STATIC_MIXTURE = "none"
"""The oracle of a gap where no static mixture was run."""

MACRO = "macro mean"
"""Item of the records that hold the mean over all targets."""

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
    "forward_passes": "rows",
}
"""Of every metric but the reward's terms, which :func:`units_of` adds."""

_SPLIT = "held_out"


@dataclass
class Outcome:
    """What a method achieved and what it cost, as plain values.

    Attributes:
        curve: (step of the method, validation loss of each dataset in nats per token), from step 0.
        rewards: on held-out prompts at each of these steps: ``step``, ``reward``, ``kl`` and the reward's terms; empty
            without a policy gradient.
        mixtures: the weights of the datasets after each measurement of difficulty.
        counts: ``tokens`` trained on, ``rollout_tokens`` sampled, ``model_calls`` (rows), ``forward_passes`` (rows, one
            with a gradient counted three times) and ``rewards_excluded``.
    """

    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    rewards: list[dict[str, float]] = field(default_factory=list)
    mixtures: list[list[float]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("tokens", "rollout_tokens", "model_calls", "forward_passes", "rewards_excluded"), 0
        )
    )


# ---- records --------------------------------------------------------------------------------------------------------


def outcome_records(outcomes: Mapping[str, Outcome], *, targets: Mapping[str, bool], seed: int) -> list[dict[str, Any]]:
    """The records of one run: for each method one of the macro mean over the targets, and one of each dataset.

    - ``macro_loss``: validation loss after the last step, mean over the targets; ``worst_loss``: the largest of them;
      ``loss_fall``: macro loss before training minus after it;
    - ``loss_auc``: area under the macro loss over the steps, divided by their number, so the mean over training;
    - ``steps_to_uniform``: the step at which the curve first reaches uniform's final macro loss, interpolated between
      validations; the last step if it never does, and then ``reached_uniform`` is 0;
    - ``dataset_loss``: of each dataset, target or not;
    - ``reward``, ``kl`` and the terms of the reward: on held-out prompts after the last step; ``…_gain``: minus before;
    - ``tokens``: trained on; ``rollout_tokens``: sampled; ``model_calls``: rows read, sampled or measured by a model;
      ``forward_passes``: the same rows, one with a gradient counted three times.

    Args:
        outcomes: of each method, by name.
        targets: of each dataset, whether it counts in the macro mean.
        seed: of the run.
    """
    curves = {method: macro_curve(outcome.curve, targets) for method, outcome in outcomes.items()}
    records = []
    for method, outcome in outcomes.items():
        shared = {"arm": method, "split": _SPLIT, "seed": seed}
        losses = outcome.curve[-1][1]
        macro: dict[str, Any] = {
            "loss_fall": curves[method][0][1] - curves[method][-1][1],
            "macro_loss": curves[method][-1][1],
            "loss_auc": mean_height(curves[method]),
            "worst_loss": max(loss for name, loss in losses.items() if targets[name]),
            **_against_uniform(curves[method], curves.get("uniform")),
            **_reward_metrics(outcome.rewards),
            **{name: outcome.counts[name] for name in ("tokens", "rollout_tokens", "model_calls", "forward_passes")},
        }
        records.append({**shared, "item": MACRO, **macro})
        records += [{**shared, "item": name, "dataset_loss": loss} for name, loss in losses.items()]
    return records


def macro_mean(losses: Mapping[str, float], targets: Mapping[str, bool]) -> float:
    """The mean loss of the datasets that are targets, each with the same weight."""
    target_losses = [loss for name, loss in losses.items() if targets[name]]
    return sum(target_losses) / len(target_losses)


def macro_curve(
    curve: Sequence[tuple[int, Mapping[str, float]]], targets: Mapping[str, bool]
) -> list[tuple[int, float]]:
    """(step, mean loss of the targets) at each validation."""
    return [(step, macro_mean(losses, targets)) for step, losses in curve]


def mean_height(curve: Sequence[tuple[int, float]]) -> float:
    """The mean height of a piecewise linear curve.

    >>> mean_height([(0, 4.0), (1, 2.0), (3, 2.0)])  # (3 · 1 + 2 · 2) / 3
    2.3333333333333335
    """
    total = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def first_reached(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """Where a piecewise linear curve first falls to ``level``; None if it never does.

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


def _reward_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not rows:
        return {}
    first, last = rows[0], rows[-1]  # before training and after the last step
    names = [name for name in last if name != "step"]
    gains = {f"{name}_gain": last[name] - first[name] for name in names if name != "kl"}
    return {**{name: last[name] for name in names}, **gains}


def units_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The unit of every metric in ``records``; a term of the reward has the reward's."""
    keys = ("arm", "item", "split", "seed")
    names = dict.fromkeys(name for record in records for name in record if name not in keys)
    return {name: UNITS.get(name, "reward") for name in names}


# ---- result ---------------------------------------------------------------------------------------------------------


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """``result.json`` of one run, or of several runs of the same methods, from their records.

    Args:
        records: of every method, item and seed (:func:`outcome_records`).
        config: the resolved configuration.
        seeds: of the runs.
    """
    units = units_of(records)
    methods = summarise(records, units=units, split=_SPLIT)
    comparisons = list(_comparisons(records, methods=list(methods), units=units))
    rules = [rule for rule in ADAPTIVE_RULES if rule in methods and "uniform" in methods]
    gaps = {rule: _gap(records, rule, methods=list(methods)) for rule in rules}
    return {
        "system": "curriculum",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": methods,
        "table": [metric for metric in TABLE if any(metric in metrics for metrics in methods.values())],
        "baseline": "uniform",
        "lower_is_better": list(LOWER_IS_BETTER),
        "comparisons": comparisons,
        "static_gap_closed": gaps,
        "subject": _subject(comparisons[0]) if comparisons else "",
        "verdict": verdict(comparisons, gaps),
        "records": list(records),
    }


def _comparisons(
    records: Sequence[Mapping[str, Any]], *, methods: Sequence[str], units: Mapping[str, str]
) -> list[Comparison]:
    """Every method against uniform in loss; with a policy gradient also against the frozen policy and against none."""
    learning = [method for method in methods if method != FROZEN_POLICY]
    pairs = [(method, "uniform", metric) for method in learning for metric in ("loss_fall", "loss_auc")]
    for method in learning:
        if any(record["arm"] == method and "reward" in record for record in records):
            terms = [name for name, unit in units.items() if unit == "reward" and not name.endswith("_gain")]
            pairs += [(method, FROZEN_POLICY, name) for name in terms]
            pairs.append((method, method.removesuffix("+ppo"), "loss_fall"))
    return [
        compare(records, metric=metric, arm=method, baseline=baseline, unit=units[metric], split=_SPLIT)
        for method, baseline, metric in pairs
        if baseline in methods and method != baseline
    ]


def _gap(records: Sequence[Mapping[str, Any]], rule: str, *, methods: Sequence[str]) -> Gap:
    """The fraction that ``rule`` closes of the gap from uniform to the best static mixture of each seed.

    The best mixture is chosen by the losses it is then judged by, which favours it, so the fraction is biased down.
    """
    static = [name for name in methods if name.startswith("static") or name in ("uniform", "proportional")]
    if static == ["uniform"]:
        return Gap(
            mean=None, low=None, high=None, unit=GAP_UNIT, n=0, num_seeds=0, num_items=0,
            oracle=NO_STATIC_MIXTURE, reason="no static mixture but uniform was run",
        )  # fmt: skip
    return gap_closed(
        records, metric="loss_fall", learned=rule, lower="uniform", upper=static, optimum="", split=_SPLIT
    )


# ---- verdict --------------------------------------------------------------------------------------------------------


def verdict(comparisons: Sequence[Comparison], gaps: Mapping[str, Gap]) -> str:
    """A paragraph that claims a difference only where all that it names, as a family, allow it (:func:`claims`).

    >>> verdict([], {})
    'Nothing was compared, so no difference can be claimed.'
    """
    if not comparisons:
        return NOTHING_COMPARED
    falls = [c for c in comparisons if c["metric"] == "loss_fall"]
    adaptive = [c for c in falls if c["baseline"] == "uniform" and c["arm"] in ADAPTIVE_RULES]
    reward_gains = [c for c in comparisons if c["baseline"] == FROZEN_POLICY]
    contributions = [c for c in falls if f"{c['baseline']}+ppo" == c["arm"]]
    first, num_seeds = comparisons[0], comparisons[0]["num_seeds"]
    named = family([first, *adaptive, *reward_gains, *contributions])
    claimed = [c for c, claim in zip(named, claims(named), strict=True) if claim]
    sentences = [
        opening(
            first,
            subject=_subject(first),
            claimed=first in claimed,
            lower_is_better=first["metric"] in LOWER_IS_BETTER,
        )
    ]
    if num_seeds < MINIMUM_SEEDS:
        sentences.append(
            f"With {num_seeds} seed{'s' * (num_seeds != 1)} no difference can be claimed, for that takes at least "
            f"{MINIMUM_SEEDS}; what follows was measured."
        )
    if adaptive:
        listed = _listing(adaptive, claimed)
        sentences.append(f"Fall of the macro validation loss against uniform's, nats per token: {listed}.")
    if measured := {rule: gap for rule, gap in gaps.items() if gap["oracle"] != NO_STATIC_MIXTURE}:
        sentences.append(
            "Measured share closed of the gap from uniform to the best static mixture: "
            f"{'; '.join(f'{_words(rule)} {_gap_words(gap)}' for rule, gap in measured.items())}."
        )
    if reward_gains:
        listed = _listing(reward_gains, claimed, metrics=True)
        sentences.append(f"On held-out prompts against the frozen policy: {listed}.")
    if contributions:
        sentences.append(f"What the policy gradient adds to that fall: {_listing(contributions, claimed)}.")
    return " ".join(sentences)


def _listing(comparisons: Sequence[Comparison], claimed: Sequence[Comparison], *, metrics: bool = False) -> str:
    parts = []
    for comparison in comparisons:
        name = _words(comparison["arm"]) + (f" in {_words(comparison['metric'])}" if metrics else "")
        low, high = comparison["low"], comparison["high"]
        interval = "" if low is None or high is None else f" ({low:+.3g} to {high:+.3g})"
        enough = comparison["num_seeds"] >= MINIMUM_SEEDS
        note = ", not to be told from chance" if enough and comparison not in claimed else ""
        parts.append(f"{name} {comparison['mean']:+.3g}{interval}{note}")
    return "; ".join(parts)


def _gap_words(gap: Gap) -> str:
    if gap["mean"] is None:
        return f"is undefined ({gap['reason']})"
    low, high = gap["low"], gap["high"]
    interval = " (no interval)" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"{100 * gap['mean']:.0f} %{interval}"


def _subject(comparison: Comparison) -> str:
    return _words(comparison["arm"]).replace("+ppo", " with PPO")


def _words(name: str) -> str:
    return name.replace("_", " ")


# ---- charts ---------------------------------------------------------------------------------------------------------


def charts(
    outcomes: Mapping[str, Outcome], targets: Mapping[str, bool], *, mixed: Sequence[str]
) -> list[dict[str, Any]]:
    """Charts of one run for the page: macro losses, losses on each dataset, weights, rewards of held-out prompts.

    Args:
        outcomes: of each method, by name.
        targets: of each judged dataset, whether it counts in the macro mean.
        mixed: names of the datasets that are learned from, in the order of the weights.
    """
    curves = {method: macro_curve(outcome.curve, targets) for method, outcome in outcomes.items()}
    names = list(targets)
    values = [[outcome.curve[-1][1][name] for name in names] for outcome in outcomes.values()]  # method × dataset
    drawn: list[dict[str, Any]] = [
        _series("Macro validation loss", "nats per token", curves),
        {
            "kind": "matrix",
            "title": "Validation loss of each dataset after the last step",
            "unit": "nats per token",
            "rows": list(outcomes),
            "columns": names,
            "values": values,
            "low": min(map(min, values)),
            "high": max(map(max, values)),
        },
    ]
    for method, outcome in outcomes.items():
        mixtures = outcome.mixtures
        if any(weights != mixtures[0] for weights in mixtures):
            lines = {
                name: [(number + 1, weights[index]) for number, weights in enumerate(mixtures)]
                for index, name in enumerate(mixed)
            }
            drawn.append(
                _series(f"Weights of the datasets: {_words(method)}", "share of tokens", lines, x_label="measurement")
            )
    rewards = {method: outcome.rewards for method, outcome in outcomes.items() if outcome.rewards}
    if rewards:
        for metric in [name for name in next(iter(rewards.values()))[0] if name != "step"]:
            unit = "nats per token" if metric == "kl" else "reward"
            points = {method: [(int(row["step"]), row[metric]) for row in rows] for method, rows in rewards.items()}
            drawn.append(_series(f"Held-out prompts: {_words(metric)}", unit, points))
    return drawn


def _series(
    title: str,
    unit: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    x_label: str = "step of the arm",
) -> dict[str, Any]:
    return {
        "kind": "series",
        "title": title,
        "unit": unit,
        "x_label": x_label,
        "x": [step for step, _ in next(iter(curves.values()))],
        "lines": {name: [value for _, value in curve] for name, curve in curves.items()},
    }
