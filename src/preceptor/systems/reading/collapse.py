"""Signs that a policy has stopped learning, said once when they appear and once when they pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FLOOR = 0.01
"""Share of the maximum under which an entropy counts as gone."""

PATIENCE = 5
"""Updates in a row before a sign is said."""

SIGNS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "query_entropy": (
        lambda row: row["query_entropy"] < FLOOR * row["query_entropy_maximum"],
        "the queries have collapsed: their entropy is under 1 % of its maximum; raise update.query_kl_coefficient or "
        "update.query_entropy_coefficient, or lower update.learning_rate",
    ),
    "selection_entropy": (
        lambda row: row["selection_entropy"] < FLOOR,
        "the selection has collapsed: its entropy is under 1 % of ln(remaining), so nothing is explored; lower "
        "update.projection_learning_rate or raise selection.temperature",
    ),
    "gradient": (
        lambda row: row["gradient_norm"] == 0.0,
        "no gradient reaches the policy: its norm is exactly 0; look at passed_fraction and the rewards' spread",
    ),
    "filter": (
        lambda row: row["passed_fraction"] == 0.0,
        "no trajectory passes the filter; lower update.filter_standard_deviations or use another reward_filter",
    ),
}


class CollapseWatch:
    """Counts in how many updates in a row each sign was seen; the counts are state."""

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(SIGNS, 0)

    def watch(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """What to tell after update ``step`` with metrics ``row``; mostly nothing."""
        told = []
        for sign, (seen, text) in SIGNS.items():
            if seen(row):
                self._in_a_row[sign] += 1
                if self._in_a_row[sign] == PATIENCE:
                    told.append(f"step {step}: {text}")
            else:
                if self._in_a_row[sign] >= PATIENCE:
                    told.append(f"step {step}: recovered ({sign})")
                self._in_a_row[sign] = 0
        return told

    def state_dict(self) -> dict[str, int]:
        """JSON-able counts."""
        return dict(self._in_a_row)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self._in_a_row = {sign: int(state[sign]) for sign in SIGNS}
