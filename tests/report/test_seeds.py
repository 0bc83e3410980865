"""Curves of several runs as one, and the page of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.report.curves import Curve, series_panel
from preceptor.report.sections import Series, declared_figures
from preceptor.report.seeds import interpolated, merged_charts
from preceptor.result import write_page
from preceptor.systems import find_system
from tests.report.systems import write_system_run


def run(folder: Path, values: list[float], *, charts: tuple[dict[str, Any], ...] = ()) -> Path:
    folder.mkdir()
    rows = [{"step": k + 1, "reward": value, "tokens_per_second": 7.0} for k, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({"system": "bandit", "arms": {}, "charts": list(charts)}))
    return folder


def test_the_line_is_the_mean_of_the_runs_and_the_band_their_range(tmp_path: Path) -> None:
    paths = [run(tmp_path / "a", [0.0, 2.0, 4.0]), run(tmp_path / "b", [2.0, 6.0])]
    (chart,) = merged_charts([("", path) for path in paths])
    assert (chart["title"], chart["x"]) == ("Reward", [1, 2, 3])
    # The second run has ended after two steps: what follows is the first alone.
    assert chart["lines"] == {"reward": [1.0, 4.0, 4.0]}
    assert chart["bands"] == {"reward": [[0.0, 2.0, 4.0], [2.0, 6.0, 4.0]]}
    (figure,) = declared_figures([chart])
    assert isinstance(figure, Series)
    panel = series_panel(figure)
    assert panel is not None
    assert panel.curves[0].low == [0.0, 2.0, 4.0]


def test_groups_stay_apart_and_matrices_are_averaged(tmp_path: Path) -> None:
    matrix = {"kind": "matrix", "title": "M", "unit": "u", "rows": ["r"], "columns": ["c", "d"], "low": 0, "high": 1}
    paths = [
        run(tmp_path / "a", [1.0], charts=({**matrix, "values": [[0.0, None]]},)),
        run(tmp_path / "b", [3.0], charts=({**matrix, "values": [[1.0, 1.0]]},)),
    ]
    chart, table = merged_charts([("", path) for path in paths])
    assert (table["title"], table["values"]) == ("M, mean of 2 runs", [[0.5, None]])
    chart, *_ = merged_charts([("lr=1", paths[0]), ("lr=2", paths[1])])
    assert chart["lines"] == {"reward (lr=1)": [1.0], "reward (lr=2)": [3.0]}


def test_series_that_results_declare_are_averaged_too(tmp_path: Path) -> None:
    chart = {"kind": "series", "title": "Regret", "unit": "reward", "x_label": "round", "x": [1, 2]}
    paths = [
        run(tmp_path / name, [1.0], charts=({**chart, "lines": {"learned": values}},))
        for name, values in (("a", [0.0, 2.0]), ("b", [1.0, 4.0]))
    ]
    _, regret = sorted(merged_charts([("", path) for path in paths]), key=lambda merged: merged["title"] == "Regret")
    assert (regret["title"], regret["x"], regret["lines"]) == ("Regret", [1, 2], {"learned": [0.5, 3.0]})


def test_a_curve_is_linear_between_its_points_and_nothing_outside() -> None:
    curve = Curve("x", [2, 4, 10], [0.0, 1.0, -2.0], [], [], 0)
    assert [interpolated(curve, step) for step in (1, 2, 3, 7, 10, 11)] == [None, 0.0, 0.5, -0.5, -2.0, None]


@pytest.mark.parametrize("system", ["bandit", "curriculum", "surgery"])
def test_the_curves_of_every_system_merge(system: str, tmp_path: Path) -> None:
    paths = [write_system_run(tmp_path / str(k), system, num_steps=90, seed=k) for k in range(2)]
    sections = find_system(system).sections
    charts = merged_charts([("", path) for path in paths], sections)
    assert charts == merged_charts([("", path) for path in paths], sections)
    assert {"Speed", "Peak memory"}.isdisjoint(chart["title"] for chart in charts)
    assert all(chart["kind"] != "series" or chart["bands"].keys() == chart["lines"].keys() for chart in charts)


def test_the_page_of_a_comparison_has_differences_bands_and_no_empty_section(tmp_path: Path) -> None:
    def estimate(mean: float) -> dict[str, Any]:
        interval = {"iqm": mean, "low": mean - 0.1, "high": mean + 0.1}
        return {
            "mean": mean, "low": mean - 0.1, "high": mean + 0.1, "unit": "nats", "n": 5, "interquartile_mean": interval,
        }  # fmt: skip

    compared = {
        "arm": "learned", "baseline": "<b>random</b>", "metric": "gain", "split": "train", "mean": 0.5, "low": 0.4,
        "high": 0.6, "unit": "nats", "n": 5, "num_seeds": 5, "claimed": True,
        "improvement": {"probability": 0.9, "low": 0.7, "high": 1.0},
    }  # fmt: skip
    arms = {"learned": {"gain": estimate(0.6)}, "<b>random</b>": {"gain": estimate(0.1)}}
    comparison = {
        "system": "bandit", "level": 0.95, "runs": ["a", "b"], "arms": {"train": arms}, "comparisons": [compared],
        "groups": [{"label": "", "runs": ["a", "b"]}],
    }  # fmt: skip
    charts = merged_charts([("", run(tmp_path / name, [1.0, 2.0])) for name in ("a", "b")])
    result = {"system": "bandit", "status": "finished", "seeds": [0, 1], "arms": arms, "charts": charts}
    for name, content in (("comparison", comparison), ("result", result), ("seconds", {"runs": {"a": 1.5, "b": None}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "bandit · comparison" in page
    assert "1 of 1" in page
    assert "0.50 (0.40 to 0.60)" in page
    assert "0.90 (0.70 to 1.00)" in page
    assert "<b>" not in page
    assert "Over the seeds" in page
    assert 'class="band series-0"' in page or "bands go from" in page
    assert ">Training</h2>" not in page
    assert "step by step" not in page
