"""The student: what it learns, costs and how it is put back; and what the surgeon sees of it."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch

from preceptor.errors import CheckpointError, ModelError
from preceptor.lm.edit_targets import attention_targets
from preceptor.runs.tensors import split_state
from preceptor.systems.surgery.config import LearningOptions
from preceptor.systems.surgery.environment import (
    Costs,
    StateFeatures,
    Student,
    head_entropies,
)
from preceptor.systems.surgery.theater import SurgicalTheater
from tests.systems.surgery.small import small_model, small_student


def learn(
    student: Student,
    step: int,
    *,
    windows: torch.Tensor | None = None,
    objective: str = "cross_entropy",
    learning_rate: float = 1e-2,
    notices: list[str] | None = None,
) -> dict[str, float]:
    if windows is None:
        windows = torch.randint(7, (4, 17), generator=torch.Generator().manual_seed(step))
    return student.learn(
        windows,
        objective=objective,
        learning_rate=learning_rate,
        step=step,
        generator=torch.Generator().manual_seed(step),
        notice=[].append if notices is None else notices.append,
    )


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in student.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_snapshot_put_back_learns_on_as_before() -> None:
    # To catch: the snapshot's tensors handed to the optimizer itself, which then writes into them.
    student = small_student()
    learn(student, 1)
    snapshot = student.snapshot()
    parameters = list(student.model.parameters())
    for _ in range(2):
        student.load_state_dict(snapshot)
        learn(student, 2)
        once = weights(student)
        student.load_state_dict(snapshot)
        learn(student, 2)
        assert same(once, weights(student))
    assert all(a is b for a, b in zip(parameters, student.model.parameters(), strict=True))


def test_a_snapshot_is_not_moved_by_what_comes_after() -> None:
    """Weights and moments are copies: learning goes on in the student's own."""
    student = small_student()
    learn(student, 1)
    snapshot = student.snapshot()
    before, _ = split_state(copy.deepcopy(snapshot))
    learn(student, 2)
    student.load_state_dict(snapshot)
    learn(student, 3)
    after, _ = split_state(snapshot)
    assert any(name.startswith("optimizer") for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_update_clips_decays_and_steps_as_configured() -> None:
    """Adam's first mean is (1 − β₁) of the clipped gradient; only matrices decay; a rate of 0 moves nothing."""
    student = small_student(LearningOptions(clip_norm=0.01, weight_decay=0.3))
    before = weights(student)
    metrics = learn(student, 1, learning_rate=0.0)
    assert same(before, weights(student))
    assert metrics["gradient_norm"] > 0.1  # before it is clipped
    means = [state["exp_avg"] for state in student.optimizer.state.values()]
    assert torch.stack([mean.norm() for mean in means]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    for group in student.optimizer.param_groups:
        assert group["lr"] == 0.0
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
    assert sum(len(group["params"]) for group in student.optimizer.param_groups) == len(before)


def test_reset_is_the_beginning() -> None:
    student = small_student()
    first = weights(student)
    after_one = learn(student, 1)
    learn(student, 2)
    assert not same(first, weights(student))
    student.reset()
    assert same(first, weights(student))
    assert student.costs == Costs()
    assert learn(student, 1) == after_one


def test_costs_are_counted() -> None:
    student = small_student()
    learn(student, 1)
    assert (student.costs.tokens, student.costs.evaluations) == (64, 0)
    assert student.costs.flops == 64 * 3 * student.flops_per_token
    learn(student, 2, objective="distil")
    assert student.costs.flops == 64 * (6 * student.flops_per_token + student.reference_flops_per_token)


def test_numbers_that_are_not_finite_skip_the_step() -> None:
    student = small_student()
    with torch.no_grad():
        next(student.model.parameters())[0, 0] = float("nan")
    before = weights(student)
    windows = torch.zeros(2, 17, dtype=torch.long)
    notices: list[str] = []
    metrics = learn(student, 5, windows=windows, notices=notices)
    assert len(notices) == 1
    assert notices[0].startswith("step 5 skipped: gradient of ")
    assert metrics["gradient_norm"] != metrics["gradient_norm"]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, weights(student), strict=True))


def test_skipped_steps_are_part_of_a_snapshot() -> None:
    student = small_student()
    student.guard.skip(1, "planted")
    snapshot = student.snapshot()
    student.guard.skip(2, "planted")
    assert student.guard.num_skipped == 2
    student.load_state_dict(snapshot)
    assert student.guard.num_skipped == 1


def test_an_open_surgery_is_not_copied() -> None:
    student = small_student()
    with (
        SurgicalTheater(student.model, attention_targets(student.model)),
        pytest.raises(ModelError, match="not committed"),
    ):
        student.snapshot()


def test_another_students_snapshot_is_refused() -> None:
    snapshot = small_student(num_layers=1).snapshot()
    with pytest.raises(CheckpointError, match="not this model's"):
        small_student().load_state_dict(snapshot)


WINDOWS = torch.randint(7, (3, 10), generator=torch.Generator().manual_seed(0))


def features(seed: int = 0) -> StateFeatures:
    student = small_model(seed=seed)
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
    student = small_model(num_layers=1)
    with torch.no_grad():
        block = student.transformer.h[0].attn
        block.c_attn.weight.zero_()
        block.c_attn.bias.zero_()
    assert torch.allclose(head_entropies(student, WINDOWS), torch.ones(1, 2), atol=1e-5)


def test_head_entropies_equal_a_slow_reference() -> None:
    student = small_model()
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


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_weights_come_from_the_seed_alone(architecture: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (small_model(architecture=architecture, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_nanogpts_configuration_has_its_size() -> None:
    # nanoGPT says 0.80M for 4 layers, 4 heads, width 128 and 65 characters, without positions; ours has biases too.
    student = small_model(vocab_size=65, num_layers=4, num_heads=4, width=128, block_size=64)
    without_biases = sum(parameter.numel() for parameter in student.parameters() if parameter.ndim == 2)
    assert without_biases - 64 * 128 == 4 * 12 * 128**2 + 65 * 128 == 794_752
