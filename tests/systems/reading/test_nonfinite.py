"""Rewards and gradients that are not finite: the step is skipped, named and counted, the weights stay as they were."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from preceptor.errors import NumericError
from tests.systems.reading.planted import (
    PlantedReader,
    learn,
    planted_config,
    planted_cost,
    planted_run,
    planted_setup,
)


class FaultyReader(PlantedReader):
    """Gives NaN for the values of some episodes at some updates (each update scores twice, once a context)."""

    def __init__(self, cost: Tensor, *, steps: set[int], episodes: slice = slice(None)) -> None:
        super().__init__(cost)
        self.steps, self.episodes, self.num_calls = steps, episodes, 0

    def score(self, sequences: Any) -> Any:
        step = self.num_calls // 2 + 1
        self.num_calls += 1
        scored = super().score(sequences)
        if step in self.steps:
            for index in range(len(scored))[self.episodes]:
                broken = tuple(torch.full_like(values, math.nan) for values in scored[index].log_probs)
                scored[index] = dataclasses.replace(scored[index], log_probs=broken)
        return scored


class Outcome(NamedTuple):
    """Metrics, the weights after each update (first: before any), the notices, and how the run ended."""

    rows: list[dict[str, Any]]
    history: list[dict[str, Tensor]]
    notices: str
    error: NumericError | None


def run_with(
    path: Path,
    *,
    reader_steps: Set[int] = frozenset(),
    gradient_steps: Set[int] = frozenset(),
    episodes: slice = slice(None),
    num_steps: int = 3,
) -> Outcome:
    """A planted run with NaN at these steps."""
    config = planted_config(f"update.steps={num_steps}")
    history: list[dict[str, Tensor]] = []
    with planted_run(path, config) as run:
        setup = planted_setup(config, run)
        reader = FaultyReader(planted_cost(config.seed), steps=reader_steps, episodes=episodes)
        setup = dataclasses.replace(setup, reader=reader)
        weights = setup.policy.parameters()

        def keep() -> None:
            history.append({name: p.detach().clone() for name, p in weights.items()})

        log = run.log

        def logged(step: int, row: Any) -> None:
            log(step, row)
            keep()

        run.log = logged  # type: ignore[method-assign]
        assert setup.policy.projection is not None
        setup.policy.projection.weight.register_hook(
            lambda gradient: gradient * math.nan if len(history) in gradient_steps else gradient
        )
        keep()
        error = None
        try:
            learn(setup)
        except NumericError as raised:
            error = raised
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return Outcome(rows, history, (path / "notices.log").read_text(), error)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["reader_steps", "gradient_steps"])
def test_a_step_that_is_not_finite_is_skipped_named_and_counted(tmp_path: Path, kind: str) -> None:
    rows, history, notices, error = run_with(tmp_path / "run", **{kind: {2}})
    assert error is None
    assert not same(history[0], history[1])
    assert same(history[1], history[2])  # bit for bit
    assert not same(history[2], history[3])
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert [row["rewards_excluded"] for row in rows] == ([0, 16, 16] if kind == "reader_steps" else [0, 0, 0])
    what = "every reward of the batch" if kind == "reader_steps" else "gradient of projection.weight is NaN"
    assert f"step 2 skipped: {what}" in notices
    assert "gradient_norm" in rows[1]["nonfinite"]


@pytest.mark.parametrize("kind", ["reader_steps", "gradient_steps"])
def test_five_in_a_row_are_allowed_and_six_end_the_run(tmp_path: Path, kind: str) -> None:
    five = run_with(tmp_path / "five", num_steps=7, **{kind: {2, 3, 4, 5, 6}})
    assert five.error is None
    assert five.rows[-1]["skipped_steps"] == 5
    six = run_with(tmp_path / "six", num_steps=9, **{kind: {2, 3, 4, 5, 6, 7}})
    assert six.error is not None
    assert "6 steps in a row were not finite" in str(six.error)
    assert six.error.exit_code == 3
    assert len(six.rows) == 6
    assert same(six.history[1], six.history[-1])


def test_a_reward_that_is_nan_is_left_out_and_the_others_still_teach(tmp_path: Path) -> None:
    rows, history, _, _ = run_with(tmp_path / "run", reader_steps={1, 2}, episodes=slice(0, 3), num_steps=4)
    assert [row["rewards_excluded"] for row in rows] == [3, 6, 6, 6]
    assert [row["passed_fraction"] for row in rows] == [13 / 16, 13 / 16, 1.0, 1.0]  # nothing lingers
    assert not any("nonfinite" in row for row in rows)
    assert all(not same(before, after) for before, after in itertools.pairwise(history))
