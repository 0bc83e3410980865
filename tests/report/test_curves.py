from __future__ import annotations

import math

import pytest

from preceptor.report.curves import (
    MAXIMUM_POINTS,
    curve,
    other_lines,
    panels,
)
from preceptor.report.sections import GENERAL_LINES


def test_a_short_run_is_drawn_as_it_is() -> None:
    drawn = curve([{"step": 3, "reward": 1.0}, {"step": 5, "reward": 2.0}], "reward", label="reward")
    assert drawn is not None
    assert (drawn.steps, drawn.values, drawn.low, drawn.high) == ([3, 5], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0])


def test_the_window_is_centred_and_the_band_one_standard_deviation() -> None:
    """Forty rows have a window of three: at step 10 of 0, 1, 4, 9, ... it holds 81, 100, 121."""
    drawn = curve([{"step": k, "x": float(k * k)} for k in range(40)], "x", label="x")
    assert drawn is not None
    mean = (81 + 100 + 121) / 3
    deviation = math.sqrt(((81 - mean) ** 2 + (100 - mean) ** 2 + (121 - mean) ** 2) / 3)
    assert (drawn.values[10], drawn.low[10], drawn.high[10]) == pytest.approx(
        (mean, mean - deviation, mean + deviation)
    )


def test_a_long_run_is_thinned_and_keeps_its_ends() -> None:
    drawn = curve([{"step": k, "x": 1.0} for k in range(10_000)], "x", label="x")
    assert drawn is not None
    assert len(drawn.steps) == MAXIMUM_POINTS
    assert (drawn.steps[0], drawn.steps[-1]) == (0, 9_999)


def test_missing_numbers_are_counted_and_absent_columns_named() -> None:
    rows = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 3, "reward": math.nan}, {"step": 4}]
    drawn, left_out = panels(rows, GENERAL_LINES)
    assert [panel.title for panel in drawn] == ["Reward"]
    assert drawn[0].notes == ["reward: no finite value at 2 of the steps"]
    assert left_out == ["KL to the reference", "Policy loss", "Gradient norm", "Speed", "Peak memory"]


def test_arms_that_are_trained_one_after_the_other_share_the_steps_of_an_arm() -> None:
    rows = [
        {"step": k + 1, "arm": "a" if k < 3 else "b", "arm_step": k % 3 + 1, "reward": float(k), "arm_number": 1}
        for k in range(6)
    ]
    (panel,), _ = panels(rows, GENERAL_LINES)
    assert panel.x_label == "step of its own training"
    assert [(c.label, c.steps, c.values) for c in panel.curves] == [
        ("a", [1, 2, 3], [0.0, 1.0, 2.0]),
        ("b", [1, 2, 3], [3.0, 4.0, 5.0]),
    ]
    assert other_lines(rows, GENERAL_LINES) == []  # counters are no curves


def test_entries_named_like_arms_are_drawn_metric_by_metric() -> None:
    rows = [{"step": k, "arm": arm, "stretch_step": 1, arm: {"loss": 1.0 * k}} for k, arm in enumerate("ab")]
    (lines,) = other_lines(rows, [])
    assert (lines.title, lines.columns) == ("loss", {"a.loss": "a", "b.loss": "b"})


def test_a_band_stays_within_what_was_measured() -> None:
    """Forty rows have a window of three, here 0, 0, 9: mean 3, deviation 4.24, and no value below 0."""
    drawn = curve([{"step": k, "x": 9.0 * (k == 20)} for k in range(40)], "x", label="x")
    assert drawn is not None
    assert (drawn.values[20], drawn.low[20]) == (3.0, 0.0)
    assert drawn.high[20] == pytest.approx(3 + math.sqrt(18))


def test_a_chart_of_many_curves_has_fewer_points_and_no_bands() -> None:
    rows = [{"step": k, "arm": f"{k % 20}", "arm_step": k, "reward": float(k)} for k in range(20_000)]
    (panel,), _ = panels(rows, GENERAL_LINES)
    assert sum(len(c.steps) for c in panel.curves) <= 1_200
    assert all(c.low == c.values for c in panel.curves)
