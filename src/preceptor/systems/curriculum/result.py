"""``result.json``: arms × metrics with intervals, the share of the gap that each rule closes, a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.evaluation.summary import Comparison, Gap, compare, gap_closed, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claimable
from preceptor.systems.curriculum.arms import FROZEN
from preceptor.systems.curriculum.measures import macro_curve, units_of

TABLE = ("loss_fall", "macro_loss", "loss_auc", "steps_to_uniform", "reward_gain", "kl", "model_calls")
"""Metrics that the terminal shows; the page shows all."""

LOWER_IS_BETTER = ("macro_loss", "loss_auc", "steps_to_uniform", "kl")

ADAPTIVE = ("second_order", "learning_progress", "difficulty", "exp3", "ado")
"""Rules whose weights move."""

_SPLIT = "held_out"


def curriculum_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The result of one run, or of several over the same arms, from their records.

    Args:
        records: of every arm, item and seed (:func:`~preceptor.systems.curriculum.measures.arm_records`).
        config: the resolved configuration.
        seeds: of the runs.
    """
    units = units_of(records)
    arms = summarise(records, units=units, split=_SPLIT)
    comparisons = list(_comparisons(records, arms=list(arms), units=units))
    gaps = {rule: _gap(records, rule, arms=list(arms)) for rule in ADAPTIVE if rule in arms and "uniform" in arms}
    return {
        "system": "curriculum",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": arms,
        "table": [metric for metric in TABLE if any(metric in metrics for metrics in arms.values())],
        "baseline": "uniform",
        "lower_is_better": list(LOWER_IS_BETTER),
        "comparisons": comparisons,
        "static_gap_closed": gaps,
        "verdict": verdict(comparisons, gaps),
        "records": list(records),
    }


def _comparisons(
    records: Sequence[Mapping[str, Any]], *, arms: Sequence[str], units: Mapping[str, str]
) -> list[Comparison]:
    """Every arm against uniform in loss, and the arms that write against the frozen policy and against not writing."""
    wanted = [(arm, "uniform", metric) for arm in arms for metric in ("loss_fall", "loss_auc") if arm != "uniform"]
    wanted = [(arm, baseline, metric) for arm, baseline, metric in wanted if FROZEN not in (arm, baseline)]
    for arm in arms:
        if arm != FROZEN and any(r["arm"] == arm and "reward" in r for r in records):
            terms = [name for name, unit in units.items() if unit == "reward" and not name.endswith("_gain")]
            wanted += [(arm, FROZEN, name) for name in terms]
            wanted.append((arm, arm.removesuffix("+ppo"), "loss_fall"))
    return [
        compare(records, metric=metric, arm=arm, baseline=baseline, unit=units[metric], split=_SPLIT)
        for arm, baseline, metric in wanted
        if baseline in arms and arm != baseline
    ]


def _gap(records: Sequence[Mapping[str, Any]], rule: str, *, arms: Sequence[str]) -> Gap:
    """The share that ``rule`` closes of the gap from uniform to the best static mixture of each seed.

    The best is chosen by the very losses that it is judged by, which favours it: the share is rather too small.
    """
    static = [arm for arm in arms if arm.startswith("static") or arm in ("uniform", "proportional")]
    return gap_closed(
        records, metric="loss_fall", learned=rule, lower="uniform", upper=static, optimum="", split=_SPLIT
    )


# ---- in words -------------------------------------------------------------------------------------------------------


def verdict(comparisons: Sequence[Comparison], gaps: Mapping[str, Gap]) -> str:
    """A paragraph that claims a difference only where its interval excludes zero and the seeds suffice.

    >>> verdict([], {})
    'Nothing was compared, so no difference can be claimed.'
    """
    if not comparisons:
        return "Nothing was compared, so no difference can be claimed."
    num_seeds = comparisons[0]["num_seeds"]
    sentences = []
    if num_seeds < MINIMUM_SEEDS:
        sentences.append(
            f"With {num_seeds} seed{'s' * (num_seeds != 1)} no difference can be claimed, for that takes at least "
            f"{MINIMUM_SEEDS}; what follows was measured."
        )
    rules = [c for c in comparisons if c["metric"] == "loss_fall" and c["baseline"] == "uniform"]
    if adaptive := [c for c in rules if c["arm"] in ADAPTIVE]:
        sentences.append(f"Fall of the macro validation loss against uniform's, nats per token: {_listed(adaptive)}.")
    if gaps:
        sentences.append(
            "Share closed of the gap from uniform to the best static mixture: "
            f"{'; '.join(f'{_spelled(rule)} {_gap_words(gap)}' for rule, gap in gaps.items())}."
        )
    if rewards := [c for c in comparisons if c["baseline"] == FROZEN]:
        sentences.append(f"On held-out prompts against the frozen policy: {_listed(rewards, metrics=True)}.")
    if prices := [c for c in comparisons if c["metric"] == "loss_fall" and f"{c['baseline']}+ppo" == c["arm"]]:
        sentences.append(f"What the policy gradient adds to that fall: {_listed(prices)}.")
    return " ".join(sentences)


def _listed(comparisons: Sequence[Comparison], *, metrics: bool = False) -> str:
    parts = []
    for comparison in comparisons:
        name = _spelled(comparison["arm"]) + (f" in {_spelled(comparison['metric'])}" if metrics else "")
        low, high = comparison["low"], comparison["high"]
        interval = "" if low is None or high is None else f" ({low:+.3g} to {high:+.3g})"
        enough = comparison["num_seeds"] >= MINIMUM_SEEDS
        note = ", not to be told from chance" if enough and not claimable(comparison) else ""
        parts.append(f"{name} {comparison['mean']:+.3g}{interval}{note}")
    return "; ".join(parts)


def _gap_words(gap: Gap) -> str:
    if gap["mean"] is None:
        return f"is undefined ({gap['reason']})"
    low, high = gap["low"], gap["high"]
    interval = " (no interval)" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"{100 * gap['mean']:.0f} %{interval}"


def _spelled(name: str) -> str:
    return name.replace("_", " ")


# ---- figures --------------------------------------------------------------------------------------------------------


def charts(finished: Mapping[str, Mapping[str, Any]], targets: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Figures of one run for the page: the arms' curves, their losses on each dataset, what held-out prompts earned."""
    curves = {arm: macro_curve(measured["curve"], targets) for arm, measured in finished.items()}
    names = list(targets)
    last = {arm: measured["curve"][-1][1] for arm, measured in finished.items()}
    values = [[last[arm][name] for name in names] for arm in finished]
    drawn: list[dict[str, Any]] = [
        _series("Macro validation loss", "nats per token", curves),
        {
            "kind": "matrix",
            "title": "Validation loss of each dataset after the last step",
            "unit": "nats per token",
            "rows": list(finished),
            "columns": names,
            "values": values,
            "low": min(map(min, values)),
            "high": max(map(max, values)),
        },
    ]
    for arm, measured in finished.items():
        mixtures = measured["mixtures"]
        if any(weights != mixtures[0] for weights in mixtures):
            lines = {
                name: [(number + 1, weights[index]) for number, weights in enumerate(mixtures)]
                for index, name in enumerate(names)
            }
            drawn.append(
                _series(f"Weights of the datasets: {_spelled(arm)}", "share of tokens", lines, x_label="measurement")
            )
    writing = {arm: measured["rewards"] for arm, measured in finished.items() if measured["rewards"]}
    if writing:
        for metric in [name for name in next(iter(writing.values()))[0] if name != "step"]:
            unit = "nats per token" if metric == "kl" else "reward"
            points = {arm: [(int(row["step"]), row[metric]) for row in rows] for arm, rows in writing.items()}
            drawn.append(_series(f"Held-out prompts: {_spelled(metric)}", unit, points))
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
        "lines": {arm: [value for _, value in curve] for arm, curve in curves.items()},
    }
