"""Signs of collapse: said after five updates in a row, once, and again when they have passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.systems.reading.state import CollapseWatch, State
from tests.systems.reading.planted import planted_config, planted_run, planted_setup

HEALTHY: dict[str, Any] = {
    "query_entropy": 3.0,
    "query_entropy_maximum": 6.0,
    "selection_entropy": 0.5,
    "gradient_norm": 0.1,
    "passed_fraction": 0.25,
}
SIGNS = {
    "query_entropy": ({"query_entropy": 0.059}, "the queries have collapsed", {"query_entropy": 0.06}),
    "selection_entropy": ({"selection_entropy": 0.009}, "the selection has collapsed", {"selection_entropy": 0.01}),
    "gradient": ({"gradient_norm": 0.0}, "no gradient reaches the policy", {"gradient_norm": 1e-30}),
    "filter": ({"passed_fraction": 0.0}, "no trajectory passes the filter", {"passed_fraction": 1 / 32}),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_is_said_once_at_the_fifth_update_in_a_row_and_its_end_once(sign: str) -> None:
    gone, text, just_there = SIGNS[sign]
    watch = CollapseWatch()
    told = [watch.warnings(step, {**HEALTHY, **gone}) for step in range(1, 9)]
    assert [bool(lines) for lines in told] == [False] * 4 + [True] + [False] * 3
    assert told[4][0].startswith(f"step 5: {text}")
    assert len(told[4]) == 1
    assert watch.warnings(9, {**HEALTHY, **just_there}) == [f"step 9: recovered ({sign})"]
    assert watch.warnings(10, HEALTHY) == []


@pytest.mark.parametrize("sign", SIGNS)
def test_four_in_a_row_say_nothing(sign: str) -> None:
    gone, _, _ = SIGNS[sign]
    watch = CollapseWatch()
    rows = [{**HEALTHY, **gone}] * 4 + [HEALTHY] + [{**HEALTHY, **gone}] * 4 + [HEALTHY]
    assert [watch.warnings(step, row) for step, row in enumerate(rows)] == [[]] * 10


def test_a_skipped_step_is_not_a_vanished_gradient() -> None:
    watch = CollapseWatch()
    assert [watch.warnings(step, {**HEALTHY, "gradient_norm": float("nan")}) for step in range(8)] == [[]] * 8


def test_the_counts_are_state() -> None:
    watch, other = CollapseWatch(), CollapseWatch()
    row = {**HEALTHY, "selection_entropy": 0.0}
    for step in range(3):
        watch.warnings(step, row)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert [bool(other.warnings(step, row)) for step in range(3, 6)] == [False, True, False]


@pytest.mark.parametrize(("value", "query"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_there_is_a_reference_model_where_either_kl_counts(tmp_path: Path, value: float, query: float) -> None:
    config = planted_config(f"update.value_kl_coefficient={value}", f"update.query_kl_coefficient={query}")
    with planted_run(tmp_path / "run", config) as run:
        setup = planted_setup(config, run)
        state = State(setup.policy, setup.initial_policy.lm, config.update)
    assert (state.reference_model is not None) == bool(value or query)
