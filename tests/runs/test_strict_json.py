from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from preceptor.runs.metrics import json_fault, row_json


def strict(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_finite_rows_are_plain_json() -> None:
    row = {"step": 1, "reward": 0.1, "parts": [1, 2.5], "name": "ä", "nested": {"a": None, "b": True}}
    assert strict(row_json(row)) == row


def test_scalars_of_torch_and_numpy_are_numbers() -> None:
    row = {"a": torch.tensor(2.5), "b": np.float32(0.5), "c": np.int64(3), "d": torch.tensor(7), "e": np.bool_(True)}
    assert row_json(row) == '{"a": 2.5, "b": 0.5, "c": 3, "d": 7, "e": true}'


@pytest.mark.parametrize("nan", [math.nan, torch.tensor(math.nan), np.float64("nan"), np.float32("nan")])
def test_nonfinite_numbers_are_null_and_named(nan) -> None:
    row = {"step": 4, "loss": nan, "parts": (1.0, -math.inf), "deep": {"x": [math.inf]}, "ok": torch.tensor(1.5)}
    assert strict(row_json(row)) == {
        "step": 4,
        "loss": None,
        "parts": [1.0, None],
        "deep": {"x": [None]},
        "ok": 1.5,
        "nonfinite": {"loss": "nan", "parts.1": "-inf", "deep.x.0": "inf"},
    }


@pytest.mark.parametrize("value", [torch.zeros(2), object(), {1, 2}, b"x"])
def test_other_things_are_a_type_error(value) -> None:
    with pytest.raises(TypeError, match="a row may hold numbers, text, lists and mappings"):
        row_json({"step": 1, "x": value})
    with pytest.raises(TypeError, match="a row may hold"):
        row_json({"step": 1, "nan": math.nan, "x": value})


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({"a": [1, 0.5, "x", None, True, {"b": []}]}, None),
        ({"a": {"b": [0, math.inf]}}, "state['a']['b'][1] is inf"),
        ({"a": (1, 2)}, "state['a'] is a tuple"),
        ({"a": {3: 4}}, "state['a'] has the key 3"),
        ({"a": torch.zeros(())}, "state['a'] is a Tensor"),
        ({"a": np.int64(3)}, "state['a'] is a int64"),
    ],
)
def test_what_would_not_survive_is_named(state, fault) -> None:
    assert json_fault(state, "state") == fault
    if fault is None:
        assert json.loads(json.dumps(state)) == state
