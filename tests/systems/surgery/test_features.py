from __future__ import annotations

import math
import statistics

import pytest
import torch

from preceptor.errors import CheckpointError
from preceptor.systems.surgery.features import StateFeatures, head_entropies
from preceptor.systems.surgery.targets import attention_targets
from tests.systems.surgery.small import small_student

WINDOWS = torch.randint(7, (3, 10), generator=torch.Generator().manual_seed(0))


def features(seed: int = 0) -> StateFeatures:
    student = small_student(seed=seed)
    return StateFeatures(student, attention_targets(student), windows=WINDOWS, action_dim=4)


def test_a_state_has_a_number_for_everything_it_names() -> None:
    found = features()
    assert found.dim == 2 * 4 + 2 * 2 + 2 + 4 + 2
    assert found.state(loss=1.0).tolist() == [0.0] * found.dim  # nothing has varied yet


def test_features_are_normalised_by_what_came_so_far() -> None:
    # To catch: normalised before the newest value is taken in.
    found = features()
    losses = [3.0, 2.0, 2.5, 1.0]
    position = 2 * 4 + 2 * 2
    for count, loss in enumerate(losses, start=1):
        state = found.state(loss=loss)
        seen = losses[:count]
        expected = 0.0 if count == 1 else (loss - statistics.mean(seen)) / statistics.stdev(seen)
        assert state[position].item() == pytest.approx(expected, abs=1e-6)
    assert state[:position].tolist() == [0.0] * position  # the student has not changed: rounding is no variation


def test_the_last_operation_is_seen() -> None:
    found = features()
    found.state(loss=1.0)
    found.observe(torch.tensor([0.5, -0.5, 0.0, 0.0]), reward=0.2, committed=True)
    state = found.state(loss=1.0)
    # of two different values the second lies 1/√2 standard deviations from their mean
    assert state[-6:].tolist() == pytest.approx([2**-0.5, -(2**-0.5), 0, 0, 2**-0.5, 2**-0.5], abs=1e-5)


def test_outliers_are_cut_off() -> None:
    found = features()
    for _ in range(100):
        found.state(loss=1.0 + 1e-3 * torch.rand(()).item())
    assert found.state(loss=1e6)[2 * 4 + 2 * 2].item() == 5.0


def test_head_entropies_by_hand() -> None:
    """A head whose queries are zero attends to all positions alike; one with a huge diagonal to itself alone."""
    student = small_student(num_layers=1)
    with torch.no_grad():
        block = student.transformer.h[0].attn
        block.c_attn.weight.zero_()
        block.c_attn.bias.zero_()
    assert torch.allclose(head_entropies(student, WINDOWS), torch.ones(1, 2), atol=1e-5)


def test_head_entropies_equal_a_slow_reference() -> None:
    student = small_student()
    attentions = student(input_ids=WINDOWS, output_attentions=True).attentions
    found = head_entropies(student, WINDOWS)
    for layer in range(2):
        for head in range(2):
            shares = []
            for window in range(3):
                for time in range(1, 10):
                    row = attentions[layer][window, head, time].tolist()
                    shares.append(-sum(p * math.log(p) for p in row if p > 0) / math.log(time + 1))
            assert found[layer, head].item() == pytest.approx(statistics.mean(shares), rel=1e-4)


def test_state_is_restored_exactly() -> None:
    first, second = features(), features()
    for loss in (3.0, 2.0):
        first.state(loss=loss)
        first.observe(torch.tensor([0.1, 0.2, 0.3, 0.4]), reward=loss, committed=False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.state(loss=1.5), second.state(loss=1.5))
    with pytest.raises(CheckpointError, match="features"):
        second.load_state_dict(first.state_dict() | {"moments": []})
