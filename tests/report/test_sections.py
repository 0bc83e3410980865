"""Figures that a result asks for."""

from __future__ import annotations

from typing import Any

import pytest

from preceptor.errors import DataError
from preceptor.report.curves import curve, other_lines, panels, series_panel
from preceptor.report.matrix import shaded_table
from preceptor.report.sections import Lines, Matrix, Series, declared_figures

LINES = {
    "kind": "lines", "title": "Weights", "unit": "share", "columns": {"weights.a.b": "books", "weights.c": "code"},
    "constants": {"uniform": 0.5},
}  # fmt: skip
ROWS = [{"step": k, "weights": {"a.b": k / 10, "c": 1 - k / 10}, "loss": 2.0, "name": "x"} for k in range(5)]


def lines_of(chart: dict[str, Any]) -> list[Lines]:
    (figure,) = declared_figures([chart])
    assert isinstance(figure, Lines)
    return [figure]


def matrix_of(chart: dict[str, Any]) -> Matrix:
    (figure,) = declared_figures([chart])
    assert isinstance(figure, Matrix)
    return figure


def test_columns_of_columns_are_drawn_against_level_lines() -> None:
    (panel,), left_out = panels(ROWS, lines_of(LINES))
    assert left_out == []
    assert [(c.label, c.values) for c in panel.curves] == [
        ("books", [0.0, 0.1, 0.2, 0.3, 0.4]),
        ("code", [1.0, 0.9, 0.8, 0.7, 0.6]),
    ]
    assert [(c.label, c.steps, c.values) for c in panel.bounds] == [("uniform", [0, 4], [0.5, 0.5])]


def test_a_name_with_a_dot_is_found_whole_first() -> None:
    drawn = curve([{"step": 1, "a.b": 3.0, "a": {"b": 4.0}}], "a.b", label="x")
    assert drawn is not None
    assert drawn.values == [3.0]
    assert curve([{"step": 1, "a": {"c": 4.0}}], "a.b", label="x") is None


def test_columns_that_nothing_draws_get_a_chart_of_their_own() -> None:
    assert [lines.title for lines in other_lines(ROWS, lines_of(LINES))] == ["loss"]
    assert other_lines([{"step": 1, "seconds": 1.0, "flag": True}], []) == []


def test_series_are_thinned_and_leave_out_what_is_not_finite() -> None:
    chart = {
        "kind": "series", "title": "Regret", "unit": "reward", "x_label": "pull", "x": list(range(1000)),
        "lines": {"a": [float(k) for k in range(1000)], "b": [None] * 1000},
        "bands": {"a": [[k - 1.0 for k in range(1000)], [k + 1.0 for k in range(1000)]]},
    }  # fmt: skip
    (figure,) = declared_figures([chart])
    assert isinstance(figure, Series)
    panel = series_panel(figure)
    assert panel is not None
    (only,) = panel.curves
    assert panel.x_label == "pull"
    assert len(only.steps) == 300
    assert (only.steps[-1], only.values[-1], only.low[-1], only.high[-1]) == (999, 999.0, 998.0, 1000.0)


def test_a_matrix_is_shaded_from_low_to_high_and_says_its_numbers() -> None:
    chart = {
        "kind": "matrix", "title": "Crossing", "unit": "probability", "rows": ["r"], "columns": ["a", "b", "c"],
        "values": [[0.0, 0.5, 1.0]], "low": 0.0, "high": 1.0,
    }  # fmt: skip
    ((name, cells),) = shaded_table(matrix_of(chart)).rows
    assert name == "r"
    assert [(cell.text, cell.shade) for cell in cells] == [("0.000", 0), ("0.500", 4), ("1.000", 7)]
    free = shaded_table(matrix_of({**chart, "low": None, "high": None, "values": [[2.0, float("nan"), 2.0]]})).rows[0][
        1
    ]
    assert [(cell.text, cell.shade) for cell in free] == [("2", 0), ("\N{EN DASH}", None), ("2", 0)]


@pytest.mark.parametrize("chart", [{"kind": "pie", "title": "", "unit": ""}, {"kind": "lines", "title": "x"}, 3])
def test_a_malformed_chart_is_named(chart: object) -> None:
    with pytest.raises(DataError, match=r"a chart of result\.json"):
        declared_figures([chart])
