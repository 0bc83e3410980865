from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from preceptor.errors import DataError
from preceptor.report.arms import Arms
from preceptor.report.figures import (
    arms_figure,
    entropy_figure,
    kl_figure,
    passed_figure,
    position_figure,
    reward_figure,
    save,
    write_figures,
)
from preceptor.report.run_folder import read_run


def test_every_figure_of_a_run_is_written_and_repeatable(build_run: Callable[..., Path], tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_steps=30)
    result = json.loads((run / "result.json").read_text())
    arms = {arm: {"order_gain": metrics["order_gain"]} for arm, metrics in result["arms"].items()}
    (run / "result.json").write_text(json.dumps({"arms": arms}))
    written = write_figures(run, tmp_path / "figures")
    names = {"reward", "entropy", "kl", "passed", "reward_by_position", "arms_order_gain"}
    assert {path.name for path in written} == {f"{name}{end}" for name in names for end in (".png", ".svg")}
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    again = save(reward_figure(read_run(run).metrics), tmp_path / "again")[1]
    assert again.read_bytes() == (tmp_path / "figures" / "reward.svg").read_bytes()


def test_curves_carry_the_data(build_run: Callable[..., Path], tmp_path: Path) -> None:
    rows = read_run(build_run(tmp_path / "run", num_steps=12)).metrics
    axes = reward_figure(rows).axes
    assert [a.get_title(loc="left") for a in axes] == ["Reward", "Normalised reward"]
    assert list(axes[1].lines[0].get_ydata()) == [row["normalised_reward"] for row in rows]
    assert axes[0].get_ylabel() == "nats per value token"
    assert [line.get_label() for line in entropy_figure(rows).axes[0].lines] == ["query entropy", "maximum"]
    assert len(kl_figure(rows).axes) == 2
    assert passed_figure(rows).axes[0].get_ylim() == (0.0, 1.0)
    assert len(position_figure(rows).axes[0].lines[0].get_xdata()) == 8


def test_arms_are_drawn_best_on_top(build_run: Callable[..., Path], tmp_path: Path) -> None:
    result = json.loads((build_run(tmp_path / "run", num_steps=2) / "result.json").read_text())
    axes = arms_figure(Arms.of(result), "order_gain").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert (labels[0], labels[-3], labels[-1]) == ("reverse", "greedy oracle", "exhaustive oracle")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["random, interval", "best oracle"]


def test_absent_columns_are_an_error_that_names_them() -> None:
    with pytest.raises(DataError, match="kl, selection_kl"):
        kl_figure([{"step": 1}])
    with pytest.raises(DataError, match="reward_by_position"):
        position_figure([{"step": 1}])
    with pytest.raises(DataError, match="no arm has the metric 'speed'"):
        arms_figure(Arms(), "speed")


def test_hostile_arm_names_stay_text_in_the_svg(tmp_path: Path) -> None:
    estimate = {"mean": 1.0, "low": None, "high": None, "unit": "nats", "n": 1}
    _, svg = save(arms_figure(Arms({"<script>x</script>": {"m": estimate}}), "m"), tmp_path / "arms")
    tree = ElementTree.parse(svg)
    assert not [e for e in tree.iter() if str(e.tag).endswith("script")]
