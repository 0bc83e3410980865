from __future__ import annotations

import pytest
import torch

from preceptor.systems.surgery.edits import Edit
from preceptor.systems.surgery.operation import Surgery, examination_flops, gradient_steps
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.quality import Draws, Examiner
from preceptor.systems.surgery.referee import NGramReferee
from preceptor.systems.surgery.student import window_losses
from preceptor.systems.surgery.targets import attention_targets
from tests.systems.surgery.small import small_patient

WEIGHTS = {"loss": 1.0, "referee": 0.1, "repetition": 0.1, "distinct": 0.1}


def surgery(patient: Patient, *, required_z: float = 0.0, moments: str = "keep") -> Surgery:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (200,), generator=generator)
    examiner = Examiner(
        NGramReferee(tokens, order=2, vocab_size=7),
        tokens=tokens,
        num_prompts=3,
        prompt_tokens=4,
        continuation_tokens=5,
        windows=tokens[:90].view(10, 9),
        weights=WEIGHTS,
    )
    edit = Edit("singular_values", attention_targets(patient.model), rank=2, max_relative_norm=0.2)
    return Surgery(patient, edit, examiner, required_z=required_z, moments=moments)  # type: ignore[arg-type]


def weights(patient: Patient) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in patient.model.parameters()]


def unchanged(patient: Patient, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, weights(patient), strict=True))


def better_and_worse(patient: Patient, table: Surgery, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two edits, one that lowers the loss of ``windows`` and one that raises it."""
    generator, found = torch.Generator().manual_seed(1), {}
    while len(found) < 2:
        action = 2 * torch.rand(table.edit.action_dim, generator=generator) - 1
        snapshot = patient.snapshot()
        before = window_losses(patient.model, windows).mean()
        table.edit.apply_(action)
        found[bool(window_losses(patient.model, windows).mean() < before)] = action
        patient.restore(snapshot)
    return found[True], found[False]


def draws(table: Surgery, seed: int = 3) -> Draws:
    return table._examiner.draw(torch.Generator().manual_seed(seed))


def test_a_trial_leaves_no_trace_and_is_paid_the_difference() -> None:
    # To catch: before and after exchanged, and other prompts after the edit.
    patient = small_patient()
    table, weights_before = surgery(patient), weights(patient)
    action, common = torch.linspace(-1, 1, table.edit.action_dim), draws(table)
    before = table.examine(common)
    trial = table.try_edit(action, before=before, draws=common)
    assert unchanged(patient, weights_before)
    assert trial.before == before == table.examine(common)
    table.edit.apply_(action)
    assert trial.after == table.examine(common)
    assert trial.reward == trial.after.total - before.total != 0
    assert trial.bytes_held == sum(target.view.nbytes for target in table.edit.targets)


def test_no_edit_earns_exactly_nothing() -> None:
    table = surgery(small_patient())
    common = draws(table)
    nothing = torch.zeros(table.edit.action_dim)
    assert table.try_edit(nothing, before=table.examine(common), draws=common).reward == 0.0


def test_the_test_commits_what_is_better_and_nothing_else() -> None:
    patient = small_patient()
    table = surgery(patient)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    better, worse = better_and_worse(patient, table, windows)
    before = weights(patient)
    assert not table.test(worse, windows).passed
    assert unchanged(patient, before)
    losses = window_losses(patient.model, windows)
    found = table.test(better, windows)
    assert found.passed
    assert not unchanged(patient, before)
    assert found.gain == pytest.approx((losses - window_losses(patient.model, windows)).mean().item(), rel=1e-9)


def test_too_small_a_gain_is_not_committed() -> None:
    patient = small_patient()
    table = surgery(patient, required_z=1e6)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    better, _ = better_and_worse(patient, table, windows)
    before = weights(patient)
    assert not table.test(better, windows).passed
    assert unchanged(patient, before)


def test_examinations_are_counted() -> None:
    patient = small_patient()
    table = surgery(patient)
    common = draws(table)
    before = table.examine(common)
    examined = patient.costs.flops
    assert examined == examination_flops(patient, table._examiner)
    table.try_edit(torch.full((table.edit.action_dim,), 0.5), before=before, draws=common)
    assert patient.costs.flops == 2 * examined
    assert patient.costs.evaluations == 1


def test_moments_are_treated_as_configured() -> None:
    for moments in ("keep", "zero"):
        patient = small_patient()
        table = surgery(patient, moments=moments)
        windows = torch.zeros(2, 17, dtype=torch.long)
        learning = patient._learning
        patient.learn(windows, learning=learning, learning_rate=1e-3, step=1, generator=torch.Generator())
        edited = table.edit.targets[0].parameter
        assert patient.optimiser.state[edited]["exp_avg"].abs().sum() > 0
        table.commit(torch.full((table.edit.action_dim,), 0.5))
        assert (patient.optimiser.state[edited]["exp_avg"].abs().sum() == 0) == (moments == "zero")


@pytest.mark.parametrize("moments", ["keep", "zero"])
def test_an_edit_that_passes_the_test_treats_the_moments_as_configured(moments: str) -> None:
    patient = small_patient()
    table = surgery(patient, moments=moments)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    learning = patient._learning
    patient.learn(windows[:2], learning=learning, learning_rate=1e-4, step=1, generator=torch.Generator())
    better, _ = better_and_worse(patient, table, windows)
    assert table.test(better, windows).passed
    moment = patient.optimiser.state[table.edit.targets[0].parameter]["exp_avg"]
    assert bool(moment.any()) == (moments == "keep")


def test_an_examination_costs_what_student_and_referee_compute() -> None:
    """Three prompts of 4 + 5 tokens for both, ten windows of 8 positions for the student; a bigram over 7 tokens."""
    patient = small_patient()
    table = surgery(patient)
    expected = (3 * 9 + 10 * 8) * patient.flops_per_token + 3 * 9 * (2 * 2 * 7)
    assert examination_flops(patient, table._examiner) == expected


def test_a_test_costs_two_readings_of_its_windows() -> None:
    patient = small_patient()
    table = surgery(patient)
    table.test(torch.full((table.edit.action_dim,), 0.5), torch.zeros(5, 17, dtype=torch.long))
    assert patient.costs.flops == 2 * 5 * 16 * patient.flops_per_token


def test_gradient_steps_cost_what_the_edits_cost() -> None:
    patient = small_patient()
    table = surgery(patient)
    step = patient.step_flops(patient._learning, num_tokens=64)
    edit = 2 * examination_flops(patient, table._examiner) + 2 * 128 * patient.flops_per_token
    found = gradient_steps(patient, table._examiner, num_edits=10, acceptance_tokens=128, step_flops=step)
    assert (found - 1) * step < 10 * edit <= found * step
    assert gradient_steps(patient, table._examiner, num_edits=0, acceptance_tokens=1, step_flops=step) == 1
