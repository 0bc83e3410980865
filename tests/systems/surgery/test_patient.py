from __future__ import annotations

import itertools

import pytest
import torch

from preceptor.errors import CheckpointError, ModelError
from preceptor.systems.surgery.config import LearningOptions
from preceptor.systems.surgery.patient import Costs, Patient, Snapshot, scheduled_rate
from preceptor.systems.surgery.targets import attention_targets
from preceptor.systems.surgery.theatre import SurgicalTheater
from tests.systems.surgery.small import small_patient

LEARNING = LearningOptions(objective="cross_entropy", warm_up_steps=0)


def learn(patient: Patient, step: int, *, learning: LearningOptions = LEARNING) -> dict[str, float]:
    windows = torch.randint(7, (4, 17), generator=torch.Generator().manual_seed(step))
    metrics, _ = patient.learn(
        windows, learning=learning, learning_rate=1e-2, step=step, generator=torch.Generator().manual_seed(step)
    )
    return metrics


def weights(patient: Patient) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in patient.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_snapshot_put_back_learns_on_as_before() -> None:
    # To catch: the snapshot's tensors handed to the optimiser itself, which then writes into them.
    patient = small_patient()
    learn(patient, 1)
    snapshot = patient.snapshot()
    parameters = list(patient.model.parameters())
    for _ in range(2):
        patient.restore(snapshot)
        learn(patient, 2)
        once = weights(patient)
        patient.restore(snapshot)
        learn(patient, 2)
        assert same(once, weights(patient))
    assert all(a is b for a, b in zip(parameters, patient.model.parameters(), strict=True))


def test_a_snapshot_is_not_moved_by_what_comes_after() -> None:
    """Weights and moments are copies: learning goes on in the patient's own."""
    patient = small_patient()
    learn(patient, 1)
    snapshot = patient.snapshot()
    before = {group: {n: t.clone() for n, t in tensors.items()} for group, tensors in snapshot.tensors.items()}
    learn(patient, 2)
    patient.restore(snapshot)
    learn(patient, 3)
    assert before["optimiser"]
    for group, tensors in before.items():
        assert all(torch.equal(tensor, snapshot.tensors[group][name]) for name, tensor in tensors.items())


def test_an_update_clips_decays_and_steps_as_configured() -> None:
    """Adam's first mean is (1 − β₁) of the clipped gradient; only matrices decay; a rate of 0 moves nothing."""
    patient = small_patient(LearningOptions(objective="cross_entropy", clip_norm=0.01, weight_decay=0.3))
    before = weights(patient)
    windows = torch.randint(7, (4, 17), generator=torch.Generator().manual_seed(0))
    metrics, _ = patient.learn(
        windows, learning=LEARNING, learning_rate=0.0, step=1, generator=torch.Generator().manual_seed(0)
    )
    assert same(before, weights(patient))
    assert metrics["gradient_norm"] > 0.1  # before it is clipped
    means = [state["exp_avg"] for state in patient.optimiser.state.values()]
    assert torch.stack([mean.norm() for mean in means]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    for group in patient.optimiser.param_groups:
        assert group["lr"] == 0.0
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
    assert sum(len(group["params"]) for group in patient.optimiser.param_groups) == len(before)


def test_reset_is_the_beginning() -> None:
    patient = small_patient()
    first = weights(patient)
    after_one = learn(patient, 1)
    learn(patient, 2)
    assert not same(first, weights(patient))
    patient.reset()
    assert same(first, weights(patient))
    assert patient.costs == Costs()
    assert learn(patient, 1) == after_one


def test_costs_are_counted() -> None:
    patient = small_patient()
    learn(patient, 1)
    assert (patient.costs.tokens, patient.costs.evaluations) == (64, 0)
    assert patient.costs.flops == 64 * 3 * patient.flops_per_token
    learn(patient, 2, learning=LearningOptions(objective="distil"))
    assert patient.costs.flops == 64 * (6 * patient.flops_per_token + patient.referee_flops_per_token)


def test_numbers_that_are_not_finite_skip_the_step() -> None:
    patient = small_patient()
    with torch.no_grad():
        next(patient.model.parameters())[0, 0] = float("nan")
    before = weights(patient)
    windows = torch.zeros(2, 17, dtype=torch.long)
    metrics, notice = patient.learn(windows, learning=LEARNING, learning_rate=1e-2, step=5, generator=torch.Generator())
    assert notice is not None
    assert notice.startswith("step 5 skipped: gradient of ")
    assert metrics["gradient_norm"] != metrics["gradient_norm"]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, weights(patient), strict=True))


def test_an_open_surgery_is_not_copied() -> None:
    patient = small_patient()
    with SurgicalTheater(patient.model, attention_targets(patient.model)), pytest.raises(ModelError, match="open"):
        patient.snapshot()


def test_another_students_snapshot_is_refused() -> None:
    snapshot = small_patient(num_layers=1).snapshot()
    with pytest.raises(CheckpointError, match="not this one's"):
        small_patient().restore(Snapshot(snapshot.tensors, snapshot.state))


def test_the_learning_rate_ends_where_it_should() -> None:
    learning = LearningOptions(learning_rate=1.0, final_learning_rate=0.1, warm_up_steps=10)
    rates = [scheduled_rate(step, 110, learning) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)  # half the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
