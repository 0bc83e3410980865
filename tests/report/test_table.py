from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from preceptor.report.arms import Arms, arms_tables


def rendered(result: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=StringIO())
    for table in arms_tables(Arms.of(result), width=width):
        console.print(table)
    return console.export_text()


def test_arms_are_ordered_with_intervals_and_units(build_run: Callable[..., Path], tmp_path: Path) -> None:
    result = json.loads((build_run(tmp_path / "run", num_steps=2) / "result.json").read_text())
    lines = rendered(result, 160).splitlines()
    order = [line.split("  ")[0].strip() for line in lines if "[" in line]
    assert order[:4] == ["exhaustive oracle", "beam oracle", "greedy oracle", "learned"]
    assert order[-1] == "reverse"
    assert len(order) == 14
    learned = next(line for line in lines if line.strip().startswith("learned"))
    estimate = result["arms"]["learned"]["order_gain"]
    assert f"0.198 [{estimate['low']:.3f},{estimate['high']:.3f}]" in learned
    assert "nats per value token" in " ".join(lines)


def test_a_missing_metric_is_a_dash_and_a_missing_interval_a_mean() -> None:
    arms: dict[str, dict[str, dict[str, object]]] = {
        "learned": {"order_gain": {"mean": 0.5, "low": None, "high": None, "unit": "nats", "n": 1}},
        "[red]odd[/red]": {"model_calls": {"mean": 12345.0, "low": None, "high": None, "unit": "calls", "n": 1}},
    }
    text = rendered({"arms": arms}, 100)
    assert "0.500" in text
    assert "[red]odd[/red]" in text  # an arm's name is not markup
    assert "12,345" in text
    odd = next(line for line in text.splitlines() if "odd" in line)
    assert odd.split()[1:] == ["-", "12,345"]


def test_a_narrow_terminal_breaks_before_the_bracket(build_run: Callable[..., Path], tmp_path: Path) -> None:
    result = json.loads((build_run(tmp_path / "run", num_steps=2) / "result.json").read_text())
    lines = rendered(result, 70).splitlines()
    assert max(map(len, lines)) <= 70
    assert any(line.split()[:1] and line.split()[0].startswith("[") for line in lines)


def test_of_a_loss_less_is_more_and_the_short_table_chooses_columns() -> None:
    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": None, "high": None, "unit": "nats", "n": 1}

    arms = {name: {"loss": estimate(loss), "held_out_loss": estimate(-loss)} for name, loss in (("a", 2.0), ("b", 1.0))}
    text = rendered({"arms": arms, "lower_is_better": ["loss"], "table": ["loss", "absent"]}, 100)
    assert [line.split()[0] for line in text.splitlines() if ".000" in line] == ["b", "a"]
    assert "held out" not in text
    assert Arms.of({"arms": arms, "lower_is_better": ["loss"]}).ordered("held_out_loss") == ["a", "b"]


def test_words_stay_whole_in_eighty_columns_and_the_rest_goes_to_another_table() -> None:
    metrics = {f"metric_{k}": {"mean": k, "low": -1.0, "high": 1.0, "unit": "nats/value token"} for k in range(7)}
    text = rendered({"arms": {"farthest_first": metrics, "learned": metrics}}, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert sum(line.split()[:1] == ["arm"] for line in text.splitlines()) == 3
    assert [f"{k}.000" in text for k in range(7)] == [True] * 7


def test_what_was_taught_is_the_learned_arm_in_each_of_its_forms_or_else_the_compared_one() -> None:
    estimate = {"loss": {"mean": 1.0, "low": None, "high": None, "unit": "nats", "n": 1}}
    arms = dict.fromkeys(("random", "learned", "learned (a=1)", "learned_greedy"), estimate)
    assert Arms.of({"arms": arms}).taught == {"learned", "learned (a=1)"}
    others = dict.fromkeys(("uniform", "alignment", "fixed"), estimate)
    comparisons = [{"arm": "alignment", "baseline": "uniform"}]
    assert Arms.of({"arms": others, "comparisons": comparisons}).taught == {"alignment"}
