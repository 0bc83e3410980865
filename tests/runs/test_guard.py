from __future__ import annotations

import json
import math

import pytest
import torch

from preceptor.errors import CheckpointError, ConfigError, NumericError
from preceptor.runs.guard import NonFiniteGuard, first_nonfinite, guarded_step


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_with_such_a_number_is_named(value: float, kind: str, dtype: torch.dtype) -> None:
    tensors = {name: torch.zeros(3, 4, dtype=dtype) for name in "abc"} | {"count": torch.ones(2, dtype=torch.int64)}
    assert first_nonfinite(tensors) is None
    tensors["c"][0, 0] = math.nan
    tensors["b"][2, 3] = value
    assert first_nonfinite(tensors) == f"b is {kind}"
    assert first_nonfinite(iter(tensors.items())) == f"b is {kind}"


def test_largest_numbers_are_finite_though_their_sum_is_not() -> None:
    assert first_nonfinite({"w": torch.full((4,), torch.finfo(torch.float32).max)}) is None


def test_missing_gradients_are_no_fault() -> None:
    model = torch.nn.Linear(2, 2)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert first_nonfinite(gradients) is None
    model.bias.grad = torch.tensor([0.0, math.nan])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert first_nonfinite(gradients) == "bias is NaN"
    assert first_nonfinite([]) is None


def test_skipping_counts_and_the_sixth_in_a_row_is_fatal() -> None:
    guard = NonFiniteGuard(limit=5)
    assert guard.skip(117, "reward is NaN") == "step 117 skipped: reward is NaN (1 of 5 allowed in a row)"
    expected = "step 118 skipped: gradient of layers.3.weight is NaN (2 of 5 allowed in a row)"
    assert guard.skip(118, "gradient of layers.3.weight is NaN") == expected
    guard.ok()
    for step in range(5):
        guard.skip(step, "loss is NaN")
    with pytest.raises(
        NumericError, match=r"step 9: loss is NaN; 6 steps in a row were not finite, 5 are allowed"
    ) as e:
        guard.skip(9, "loss is NaN")
    assert e.value.exit_code == 3
    assert guard.num_skipped == 8


def test_no_skip_allowed() -> None:
    with pytest.raises(NumericError):
        NonFiniteGuard(limit=0).skip(1, "loss is NaN")
    with pytest.raises(ConfigError, match="must be at least 0, got -1"):
        NonFiniteGuard(limit=-1)


def test_counters_are_state() -> None:
    guard = NonFiniteGuard(limit=2)
    guard.skip(1, "x is NaN")
    guard.skip(2, "x is NaN")
    other = NonFiniteGuard(limit=2)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(NumericError):
        other.skip(3, "x is NaN")
    with pytest.raises(CheckpointError, match="counters differ"):
        other.load_state_dict({"num_in_a_row": 1})


def test_a_finite_step_ends_the_row_and_one_that_is_not_changes_no_weight() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard, said = NonFiniteGuard(limit=1), list[str]()

    def step(number: int, gradient: float) -> float:
        model.weight.grad = torch.full_like(model.weight, gradient)
        return guarded_step(
            guard, optimizer, dict(model.named_parameters()), step=number, clip_norm=0.5, notice=said.append
        )

    torch.nn.init.constant_(model.weight, 3.0)
    # With a limit of one in a row, a third skipped step is fatal only where the finite ones between did not count.
    for number, gradient in enumerate([math.nan, 2.0, math.nan, 2.0, math.inf]):
        norm = step(number, gradient)
        assert norm == 2.0 if gradient == 2.0 else math.isnan(norm)
        assert model.weight.grad is None
    assert model.weight.item() == pytest.approx(3.0 - 2 * 0.5, abs=1e-5)  # two steps, each clipped to a norm of 0.5
    assert len(said) == guard.num_skipped == 3
    with pytest.raises(NumericError, match="2 steps in a row"):
        step(5, math.nan)
