"""The arms of a result: how they are named, ordered and marked wherever they are shown, and their table."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

LEARNED = "learned"
COUNTS = ("model_calls", "tokens", "flops", "gflops")
"""Costs: shown as whole numbers and not drawn as intervals."""

_WRITTEN = {
    **{name: name.upper() for name in ("auc", "kl", "ppo", "mmr", "ucb1", "ado", "grpo", "rloo")},
    **{"flops": "FLOPs", "gflops": "GFLOPs", "exp3": "Exp3", "prob": "probability"},
}


@dataclass(frozen=True)
class Arms:
    """The ``arms`` of ``result.json`` and what the result says about them.

    Attributes:
        estimates: arm -> metric -> mean, low, high, unit, n.
        oracles: arms that peek at what they are scored on.
        baseline: the arm whose interval is drawn as a band behind the others.
        lower_is_better: metrics, such as a loss, of which less is more.
        table: metrics of the short table; empty is all.
        taught: arms that the others are controls of.
    """

    estimates: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    oracles: frozenset[str] = frozenset()
    baseline: str = "random"
    lower_is_better: frozenset[str] = frozenset()
    table: tuple[str, ...] = ()
    taught: frozenset[str] = frozenset({LEARNED})

    @classmethod
    def of(cls, result: Mapping[str, Any] | None) -> Arms:
        """The arms of a result, none where there is no result yet."""
        result = result or {}
        estimates = result.get("arms", {})
        compared = {str(comparison.get("arm")) for comparison in result.get("comparisons", ())}
        taught = {arm for arm in estimates if arm == LEARNED or arm.startswith(f"{LEARNED} (")}
        return cls(
            estimates=estimates,
            oracles=frozenset(result.get("oracles", ())),
            baseline=result.get("baseline", "random"),
            lower_is_better=frozenset(result.get("lower_is_better", ())),
            table=tuple(result.get("table", ())),
            taught=frozenset(taught or [arm for arm in estimates if arm in compared][:1]),
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

    def has_interval(self, arm: str) -> bool:
        """Whether the arm is there and any metric of it has an interval."""
        return any(estimate["low"] is not None for estimate in self.estimates.get(arm, {}).values())

    def kind(self, arm: str) -> str:
        """``learned``, ``oracle`` or ``control``."""
        return "learned" if arm in self.taught else "oracle" if arm in self.oracles else "control"

    @staticmethod
    def base_name(metric: str) -> str:
        """The metric without the prefix of its split."""
        return metric.removeprefix("held_out_")


def title_case(name: str) -> str:
    """A name as it is read; what follows in brackets is a configuration's own words and stays as it is.

    >>> title_case("progress_auc"), title_case("held_out_log_prob"), title_case("best_of_n (a_b=c_d)")
    ('progress AUC', 'log probability, held out', 'best of n (a_b=c_d)')
    """
    name, bracket, rest = name.partition(" (")
    if name.startswith("held_out_"):
        return f"{title_case(name.removeprefix('held_out_'))}, held out{bracket}{rest}"
    return re.sub(r"[A-Za-z0-9]+", lambda word: _WRITTEN.get(word[0], word[0]), name.replace("_", " ")) + bracket + rest


# ---- the table for a terminal ---------------------------------------------------------------------------------------


def arms_tables(arms: Arms, *, title: str | None = None, width: int = 80) -> list[Table]:
    """Arms by metrics, each with its interval, best first in the first metric; units stand in the headers.

    The columns are those of ``arms.table``, or all, in as many tables as keep every word whole in ``width`` characters.
    The learned arm is bold, oracles are set in italics (they peek). Print them with ``rich.print``.
    """
    metrics = [metric for metric in arms.table if metric in arms.metrics] or arms.metrics
    ranked = arms.ordered(metrics[0]) if metrics else []
    rows = [*ranked, *(arm for arm in arms.estimates if arm not in ranked)]
    from rich.console import Console

    def measured(chosen: Sequence[str], *, narrow: bool) -> int:
        return console.measure(_table(arms, rows, chosen, narrow=narrow)).maximum

    console = Console(width=10_000)  # what is measured must not be bounded by the terminal at hand
    narrow = measured(metrics, narrow=False) > width
    blocks: list[list[str]] = [[]]
    for metric in metrics:
        wider = [*blocks[-1], metric]
        if blocks[-1] and measured(wider, narrow=narrow) > width:
            blocks.append([metric])
        else:
            blocks[-1] = wider
    return [
        _table(arms, rows, block, narrow=narrow, title=None if index else title) for index, block in enumerate(blocks)
    ]


def _table(arms: Arms, rows: Sequence[str], metrics: Sequence[str], *, narrow: bool, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    columns = [_column(arms, rows, metric, narrow=narrow) for metric in metrics]
    for header, _ in columns:
        table.add_column(Text(header), justify="right")
    for number, arm in enumerate(rows):
        style = {"learned": "bold", "oracle": "italic"}.get(arms.kind(arm), "dim" if arm == arms.baseline else "")
        table.add_row(Text(title_case(arm)), *(Text(cells[number]) for _, cells in columns), style=style)
    return table


def _column(arms: Arms, rows: Sequence[str], metric: str, *, narrow: bool) -> tuple[str, list[str]]:
    """Header (the metric, its unit below) and cells; ``narrow`` breaks them so that the longest word sets the width."""
    name, unit, cells = title_case(metric), arms.unit(metric), [_cell(arms, arm, metric) for arm in rows]
    if narrow:
        unit = unit.replace("/", "/ ")
        cells = [cell.replace(" ", "\n") for cell in cells]
        longest = max(len(word) for text in (name, unit, *cells) for word in text.split())
        name, unit = (textwrap.fill(text, longest) for text in (name, unit))
    return f"{name}\n{unit}", cells


def _cell(arms: Arms, arm: str, metric: str) -> str:
    """``0.124 [0.080,0.171]``: one space, so that a narrow terminal breaks it before the bracket."""
    if (estimate := arms.estimates[arm].get(metric)) is None:
        return "-"
    if metric in COUNTS:
        return f"{estimate['mean']:,.0f}"
    if estimate["low"] is None:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f},{estimate['high']:.3f}]"
