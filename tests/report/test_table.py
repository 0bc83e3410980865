from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console

from preceptor.report import arms_table


def rendered(arms: dict[str, dict[str, dict[str, object]]], width: int) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(arms_table(arms))
    return console.export_text()


def test_arms_are_ordered_with_intervals_and_units(build_run: Callable[..., Path], tmp_path: Path) -> None:
    arms = json.loads((build_run(tmp_path / "run", num_steps=2) / "result.json").read_text())["arms"]
    lines = rendered(arms, 160).splitlines()
    order = [line.split("  ")[0].strip() for line in lines if "[" in line]
    assert order[:4] == ["exhaustive oracle", "beam oracle", "greedy oracle", "learned"]
    assert order[-1] == "reverse"
    assert len(order) == 14
    learned = next(line for line in lines if line.strip().startswith("learned"))
    estimate = arms["learned"]["order_gain"]
    assert f"0.198 [{estimate['low']:.3f},{estimate['high']:.3f}]" in learned
    assert "nats per value token" in " ".join(lines)


def test_a_missing_metric_is_a_dash_and_a_missing_interval_a_mean() -> None:
    arms: dict[str, dict[str, dict[str, object]]] = {
        "learned": {"order_gain": {"mean": 0.5, "low": None, "high": None, "unit": "nats", "n": 1}},
        "[red]odd[/red]": {"model_calls": {"mean": 12345.0, "low": None, "high": None, "unit": "calls", "n": 1}},
    }
    text = rendered(arms, 100)
    assert "0.500" in text
    assert "[red]odd[/red]" in text  # an arm's name is not markup
    assert "12,345" in text
    odd = next(line for line in text.splitlines() if "odd" in line)
    assert odd.split()[1:] == ["-", "12,345"]


def test_a_narrow_terminal_breaks_before_the_bracket(build_run: Callable[..., Path], tmp_path: Path) -> None:
    arms = json.loads((build_run(tmp_path / "run", num_steps=2) / "result.json").read_text())["arms"]
    lines = rendered(arms, 70).splitlines()
    assert max(map(len, lines)) <= 70
    assert any(line.split()[:1] and line.split()[0].startswith("[") for line in lines)
