"""Every baseline on one small damaged model, against what is known of it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from preceptor.systems.surgery import search
from preceptor.systems.surgery.config import DAMAGES
from preceptor.systems.surgery.patient import Patient
from tests.systems.surgery.small import small_model

TOKENS = torch.randint(7, (400,), generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def patient() -> Patient:
    """A model that depends on its attention, with heads that are far too loud: the loss falls when they are scaled."""
    model = small_model()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return Patient(
        "small", model, train=TOKENS, held_out=TOKENS, block_size=15, roles=("output",), kind="head_scale", rank=1,
        max_factor=6.0,
    )  # fmt: skip


def test_a_patient_is_put_back_bit_for_bit(patient: Patient) -> None:
    windows = patient.windows(4, generator())
    clean, copies = patient.loss(windows), patient.snapshot()
    undo = patient.damage("head_scale", strength=6.0, generator=generator())
    assert patient.loss(windows) != clean
    undo()
    assert patient.loss(windows) == pytest.approx(clean, abs=1e-5)
    patient.restore()
    assert all(torch.equal(a, b) for a, b in zip(patient.snapshot(), copies, strict=True))
    assert patient.loss(windows) == clean


@pytest.fixture
def whole_patient() -> Patient:
    """Any weight of it may be damaged, and two fine-tunes of it are to be merged."""
    patient = Patient(
        "small", small_model(), train=TOKENS, held_out=TOKENS, block_size=15, roles=("query", "output"), mlp=True,
        scope="model", kind="head_scale", rank=1, max_factor=2.0,
    )  # fmt: skip
    clean = patient.snapshot()
    patient.parents = tuple([weight + shift for weight in clean] for shift in (0.25, -0.75))
    return patient


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "merging"])
def test_every_damage_and_edit_is_put_back_bit_for_bit(kind: str) -> None:
    """Nothing of the whole model is left changed, although only the layers are copied."""
    model = small_model(architecture="llama")
    patient = Patient(
        "small", model, train=TOKENS, held_out=TOKENS, block_size=15, roles=("query", "output"), mlp=True,
        scope="layers", kind="head_scale", rank=1, max_factor=2.0,
    )  # fmt: skip
    clean = {name: weight.clone() for name, weight in model.state_dict().items()}
    patient.damage(kind, strength=6.0, generator=generator())
    patient.sites.scale_(torch.ones(patient.sites.action_dim))
    list(search.tuning(patient, lambda step: patient.windows(2, generator(step)), steps=2))
    assert sum(not torch.equal(weight, clean[name]) for name, weight in model.state_dict().items()) >= 14
    patient.restore()
    assert all(torch.equal(weight, clean[name]) for name, weight in model.state_dict().items())


def test_an_edit_of_what_is_not_copied_is_refused() -> None:
    with pytest.raises(AssertionError, match="not put back"):
        Patient(
            "small", small_model(), train=TOKENS, held_out=TOKENS, block_size=15, roles=("output",), mlp=True,
            kind="head_scale", rank=1, max_factor=2.0,
        )  # fmt: skip


def test_a_merge_is_the_average_and_the_better_parent_what_it_is_measured_against(whole_patient: Patient) -> None:
    clean = whole_patient.snapshot()
    undo = whole_patient.damage("merging", strength=6.0, generator=generator())
    for weight, was in zip(whole_patient.snapshot(), clean, strict=True):
        torch.testing.assert_close(weight, was - 0.25)  # (¼ − ¾)/2
    assert len(clean) == len(list(whole_patient.model.parameters()))
    undo()
    assert all(map(torch.equal, whole_patient.snapshot(), whole_patient.parents[0]))
    whole_patient.restore("merging")
    assert all(map(torch.equal, whole_patient.snapshot(), whole_patient.parents[0]))
    whole_patient.restore("round_2")
    assert all(map(torch.equal, whole_patient.snapshot(), clean))


def test_tuning_lowers_the_loss_and_leaves_flags_and_gradients_as_they_were(whole_patient: Patient) -> None:
    frozen = next(whole_patient.model.parameters()).requires_grad_(False)
    windows = whole_patient.windows(4, generator(2))
    before = whole_patient.loss(windows)
    asked: list[int] = []

    def fresh(step: int) -> torch.Tensor:
        asked.append(step)
        return windows

    assert list(search.tuning(whole_patient, fresh, steps=5)) == [1, 2, 3, 4, 5]
    assert asked == [1, 2, 3, 4, 5], "each step on text of its own"
    assert whole_patient.loss(windows) < before
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in list(whole_patient.model.parameters())[1:])
    assert all(parameter.grad is None for parameter in whole_patient.model.parameters())


@pytest.mark.parametrize("method", ["gradient", "evolution", "cma_es", "sac"])
def test_a_search_lowers_the_loss_and_spends_what_it_says(method: str, patient: Patient, tmp_path: Path) -> None:
    if method == "cma_es":
        pytest.importorskip("cma")
    windows = patient.windows(4, generator(2))
    before = patient.loss(windows)
    spent = {
        "gradient": partial(search.gradient, patient, windows),
        "evolution": partial(search.evolution, patient, windows, generator(), evaluations=40),
        "cma_es": partial(search.cma_es, patient, windows, generator(), evaluations=40),
        "sac": partial(search.sac, patient, windows, generator(), evaluations=40, folder=tmp_path, draws=generator),
    }[method]()
    evaluations = list(spent)
    assert patient.loss(windows) < before
    last = {
        "gradient": search.GRADIENT_STEPS,
    }.get(method, 40)
    assert evaluations == list(range(search.LEAPS.get(method, 1), last + 1, search.LEAPS.get(method, 1)))


def test_what_evolution_recommends_never_gets_worse(patient: Patient) -> None:
    windows = patient.windows(4, generator(2))
    losses = [patient.loss(windows)]
    losses += [patient.loss(windows) for _ in search.evolution(patient, windows, generator(), evaluations=40)]
    assert all(later <= earlier for earlier, later in pairwise(losses))


def test_cma_es_leaves_the_global_generator_alone(patient: Patient) -> None:
    import numpy as np

    pytest.importorskip("cma")
    windows = patient.windows(2, generator(2))
    np.random.seed(0)  # noqa: NPY002 - the global generator is what is looked at
    list(search.cma_es(patient, windows, generator(), evaluations=8))
    ours = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert ours == np.random.random()  # noqa: NPY002


def test_norms_become_those_of_the_layer(patient: Patient) -> None:
    assert list(search.norms(patient)) == [1]
    for target in patient.sites.targets:
        logs = patient.sites.log_norms(target)
        torch.testing.assert_close(logs, logs.mean().expand_as(logs))


def test_a_trained_policy_edits_three_times_on_text_of_its_own(patient: Patient) -> None:
    seen = []

    def windows(edit: int) -> torch.Tensor:
        seen.append(edit)
        return patient.windows(2, generator(edit))

    before = [target.matrix() for target in patient.sites.targets]
    edits = search.trained(
        patient, lambda features: torch.full((len(features),), 1 / 3), windows=windows, gradients=False
    )
    assert list(edits) == seen == [1, 2, 3]
    for target, matrix in zip(patient.sites.targets, before, strict=True):
        torch.testing.assert_close(target.matrix(), 6 * matrix)  # three times the third root of 6
