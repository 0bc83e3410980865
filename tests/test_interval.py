"""Intervals: what they hold, what they ask for, and that nothing else passes for one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.interval import Interval

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("notation", "inside", "outside"),
    [
        ("[0, inf)", [0, 0.0, 1e308, 10**400], [-1, -5e-324, INF, -INF, NAN]),
        ("(0, inf)", [5e-324, 1], [0, -0.0, -1, INF, NAN]),
        ("(0, inf]", [5e-324, INF], [0, -INF, NAN]),
        ("(0, 1)", [0.5], [0, 1, NAN]),
        ("[0, 1)", [0, 0.999], [-0.001, 1]),
        ("(0, 1]", [0.001, 1], [0, 1.001]),
        ("[0, 1]", [0, 1], [-0.001, 1.001, INF, -INF]),
        ("(0, 0.5)", [0.25], [0, 0.5]),
        ("[-1.5, 2]", [-1.5, 2], [-1.6, 2.1]),
        ("(-inf, inf)", [-1e308, 0, 1e308], [INF, -INF, NAN]),
        ("(-inf, 0]", [-1e308, 0], [-INF, 0.1]),
    ],
)
def test_a_square_bracket_takes_its_bound_in(notation: str, inside: list[float], outside: list[float]) -> None:
    assert [number in Interval(notation) for number in inside] == [True] * len(inside)
    assert [number in Interval(notation) for number in outside] == [False] * len(outside)


@given(
    low=st.integers(-50, 50),
    length=st.integers(1, 50),
    number=st.integers(-120, 120),
    brackets=st.sampled_from(["[]", "[)", "(]", "()"]),
)
def test_whole_numbers_inside_are_those_of_a_range(low: int, length: int, number: int, brackets: str) -> None:
    high = low + length
    expected = range(low + (brackets[0] == "("), high + (brackets[1] == "]"))
    assert (number in Interval(f"{brackets[0]}{low}, {high}{brackets[1]}")) == (number in expected)


@pytest.mark.parametrize(
    ("notation", "number", "demand"),
    [
        ("[0, inf)", -1, "must be at least 0"),
        ("[0, inf)", INF, "must be at least 0 and finite"),
        ("[0, inf)", -INF, "must be at least 0"),
        ("[0, inf)", NAN, "must be at least 0 and finite"),
        ("[0, inf]", NAN, "must be at least 0"),
        ("(0, inf)", 0, "must be above 0"),
        ("(0, inf)", INF, "must be above 0 and finite"),
        ("(0, inf]", -1, "must be above 0"),
        ("(0, 1]", 1.2, "must lie in (0, 1]"),
        ("(0, 0.5)", 0.6, "must lie in (0, 0.5)"),
        ("(-inf, 0]", 1, "must lie in (-inf, 0]"),
        ("(-inf, inf)", INF, "must be finite"),
    ],
)
def test_what_is_asked_of_a_number_outside(notation: str, number: float, demand: str) -> None:
    assert Interval(notation).demand(number) == demand


@pytest.mark.parametrize(
    "notation",
    [
        *("", "0", "0, 1", "[0, 1", "0, 1]", "{0, 1}", "[0; 1]", "[0,1]", "[0 , 1]", " [0, 1]", "[0, 1]]", "[0, 1, 2]"),
        *("[1, 0]", "[0, 0]", "(0, 0)", "(inf, inf)", "(inf, 0)", "[0, nan]", "[0, x)", "[0, Inf)", "[0, .inf)"),
        *("[0., 1]", "[.5, 1]", "[1e-3, 1]", "[0, 1]\n", "[+0, 1]"),
    ],
)
def test_a_typo_is_no_interval(notation: str) -> None:
    with pytest.raises(ValueError, match=r"^an interval is written like '\[0, inf\)' or '\(0, 1\]', got "):
        Interval(notation)
