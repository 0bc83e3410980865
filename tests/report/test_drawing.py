from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.report.arms import Arms
from preceptor.report.curves import Panel, curve
from preceptor.report.drawing import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEAST_LABEL,
    LEFT,
    MOST_LABEL,
    RIGHT,
    TOP,
    WIDTH,
    arm_chart,
    clipped,
    line_chart,
    ticks,
)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low: float, width: float) -> None:
    found = ticks(low, low + width, 4)
    assert 2 <= len(found) <= 9
    slack = 1e-6 * max(1.0, abs(low), width)
    assert found[0] <= low + slack
    assert found[-1] >= low + width - slack


def test_a_line_runs_from_corner_to_corner() -> None:
    drawn = curve([{"step": k, "passed_fraction": k / 10} for k in range(11)], "passed_fraction", label="passed")
    assert drawn is not None
    picture = line_chart(Panel("Kept by the filter", "share", [drawn], limits=(0.0, 1.0)), "kept")
    points = re.findall(r"([\d.]+) ([\d.]+)", picture.lines[0].path)
    assert [float(x) for x in points[0]] == [LEFT, HEIGHT - BOTTOM]
    assert [float(x) for x in points[-1]] == [WIDTH - RIGHT, TOP]
    assert picture.data["curves"][0]["values"][5] == 0.5


def test_one_step_is_drawn_in_the_middle() -> None:
    drawn = curve([{"step": 7, "reward": -3.0}], "reward", label="reward")
    assert drawn is not None
    picture = line_chart(Panel("Reward", "nats", [drawn]), "reward")
    assert "nan" not in picture.lines[0].path
    assert picture.lines[0].path.startswith(f"M{LEFT + (WIDTH - LEFT - RIGHT) / 2:.1f} ")


def test_arms_are_ordered_and_placed() -> None:
    def arm(mean: float, low: float | None, high: float | None) -> dict[str, dict[str, object]]:
        return {"order_gain": {"mean": mean, "low": low, "high": high, "unit": "nats", "n": 5}}

    arms = {"random": arm(0.0, -0.1, 0.1), "learned": arm(0.5, 0.4, 0.6), "greedy_oracle": arm(1.0, None, None)}
    chart = arm_chart(Arms(arms, oracles=frozenset({"greedy_oracle"})), "order_gain")
    assert [(row.name, row.kind) for row in chart.rows] == [
        ("greedy oracle", "oracle"),
        ("learned", "learned"),
        ("random", "control"),
    ]
    assert chart.oracle == chart.rows[0].mean
    assert chart.band == (chart.rows[2].low, chart.rows[2].high)
    left, right = chart.x_ticks[0], chart.x_ticks[-1]
    assert (left.at, right.at) == pytest.approx((chart.label, WIDTH - RIGHT))
    # The axis runs from -0.2 to 1.0: 0.5 lies at 7/12 of it.
    assert chart.rows[1].mean == pytest.approx(chart.label + (WIDTH - RIGHT - chart.label) * 0.7 / 1.2, abs=0.1)
    assert chart.rows[0].low is None
    assert chart.rows[0].text == "1 (no interval)"


def test_clipped_says_that_it_clipped() -> None:
    assert clipped("abcdef", 4) == "abc\N{HORIZONTAL ELLIPSIS}"
    assert clipped("abcd", 4) == "abcd"


def test_room_for_names_grows_with_the_longest_within_limits() -> None:
    def label(*names: str) -> float:
        estimate = {"mean": 1.0, "low": None, "high": None, "unit": "nats", "n": 5}
        return arm_chart(Arms({name: {"gain": estimate} for name in ("random", *names)}), "gain").label

    assert label() == LEAST_LABEL
    assert label("x" * 12) == 12 + CHARACTER * 12
    assert label("x" * 12, "y" * 15) == 12 + CHARACTER * 15
    assert label("x" * 24) == label("x" * 60) <= MOST_LABEL  # longer names are broken
