"""A surgeon that sees no gradients, on compressed and merged students of a few thousand weights: the whole run."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.config import load_config
from preceptor.errors import ConfigError, Interrupted
from preceptor.runs.folder import Run, open_run
from preceptor.systems.surgery import merging
from preceptor.systems.surgery.amortised import State, admit, step
from preceptor.systems.surgery.config import REPAIRS, SurgeryConfig
from preceptor.systems.surgery.environment import Student
from preceptor.systems.surgery.loop import train
from preceptor.systems.surgery.patient import Patient, scope_of
from preceptor.systems.surgery.setup import prepare
from preceptor.systems.surgery.site_policy import TrainedSurgeon
from preceptor.systems.surgery.verify import verify
from tests.systems.surgery.small import CPU, small_config, write_text
from tests.systems.surgery.test_amortised import AMORTISED, metrics, trained
from tests.systems.surgery.test_loop import SERVICES, start

COMPRESSION = (
    *AMORTISED, "edit.roles=[query, output]", "edit.mlp=true", "amortised.gradients=false",
    "amortised.damages=[round_2, magnitude_pruning, merging]", "amortised.unseen_damages=[head_pruning, truncation]",
    "amortised.unseen_sizes=[1x2x16]", "amortised.patients=1", "amortised.fine_tune_steps=4",
    "amortised.fine_tune_rate=0.1", "amortised.test_windows=16",
)  # fmt: skip
METHODS = tuple(method for method in REPAIRS if method not in ("cma_es", "sac"))


def config_of(folder: Path, *overrides: str) -> SurgeryConfig:
    repairs = f"amortised.repairs=[{', '.join(METHODS)}]"
    return small_config(write_text(folder), *COMPRESSION, repairs, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurgeryConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compression")
    return trained(config_of(folder), folder)


def test_putting_the_original_back_repairs_all_of_every_damage(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    _, config, result = whole
    for item, repair in result["repair_by_item"].items():
        assert repair["inverse"]["1"]["mean"] == pytest.approx(1.0, abs=1e-6), item
        assert repair["no_edit"]["1"]["mean"] == 0.0, item
        assert set(repair) == set(METHODS), item
        assert list(repair["tuning"]) == list(repair["gradient"]) == ["1", "2", "3", "10"]
        assert all(list(repair[method]) == ["1"] for method in METHODS if method.startswith("calibration"))
    # A student that has hardly learned is not hurt by every damage; those that do no harm have no share.
    assert "unseen_0_1x2x16/merging" in result["repair_by_item"]
    assert {"calibration_norms", "tuning"} <= {compared["baseline"] for compared in result["comparisons"]}
    assert scope_of(config) == "model"


def test_a_stop_leaves_no_trace(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second fine-tune, in training, and among the repairs."""
    folder, config, result = whole
    log, learn, seen = Run.log, Student.learn, {"updates": 0}

    def logging(run: Run, at: int, row: Mapping[str, Any]) -> None:
        if at in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, at, row)

    def learning(student: Student, *args: Any, **options: Any) -> Any:
        seen["updates"] += 1
        if seen["updates"] == 3 * 8 + 6:  # three students of 8 updates, a parent of 4
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(student, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logging)
        patch.setattr(Student, "learn", learning)
        with start(config, tmp_path / "run") as run, pytest.raises(Interrupted):
            train(config, run, SERVICES)
        students = sorted(path.name for path in (tmp_path / "run" / "students").iterdir())
        assert students[:2] == ["student_0_1x2x16", "student_0_1x2x16_parent_0"]
        assert len(students) == 3 + 1
        for _ in range(2):
            with open_run(tmp_path / "run", quiet=True, threads=1) as run, pytest.raises(Interrupted):
                train(config, run, SERVICES)
    with open_run(tmp_path / "run", quiet=True, threads=1) as run:
        assert train(config, run, SERVICES) == result
    assert metrics(tmp_path / "run") == metrics(folder)
    for name in ("decisions.jsonl", "surgeon/surgeon.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_every_reward_is_earned_again(whole: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, config, _ = whole
    replayed = list(verify(config, folder, SERVICES))
    assert len(replayed) == 2 * 2 * 3 * 2 * 2
    assert all(abs(row.recorded - row.recomputed) < 1e-5 for row in replayed)
    assert any(abs(row.recorded) > 1e-4 for row in replayed[1::2])  # rewards that are not all nothing


def test_the_surgeon_is_trained_and_acts_without_any_backward_pass(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = whole
    setup = prepare(config, device=CPU, folder=folder)
    ward = admit(setup)
    state = State(setup, ward)
    surgeon = TrainedSurgeon.load(folder)
    weights = {id(weight) for patient in (*ward.students, *ward.unseen) for weight in patient.model.parameters()}
    slopes = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        assert not any(id(weight) in weights for weight in inputs), "a backward pass through the repaired model"
        return slopes(outputs, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    step(setup, ward, state, 1)
    patient = ward.unseen[0]
    patient.damage("round_2", strength=6.0, generator=torch.Generator())
    features, _ = patient.sites.features(patient.windows(2, torch.Generator()), gradients=surgeon.gradients)
    assert not surgeon.gradients
    patient.sites.apply_(surgeon.act(features))
    # The planted fault: a surgeon that asks for gradients is caught.
    seeing = prepare(config_of(folder, "amortised.gradients=true"), device=CPU, folder=folder)
    with pytest.raises(AssertionError, match="a backward pass"):
        step(seeing, ward, state, 2)


def test_the_better_parent_is_the_one_that_knows_the_text_better(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    folder, config, _ = whole
    setup = prepare(config, device=CPU, folder=folder)
    (patient, *_) = admit(setup).unseen
    windows = patient.windows(merging.COMPARED_WINDOWS, setup.generator(f"better parent of {patient.name}"))
    losses = []
    for parent in patient.parents:
        patient.put(parent)
        losses.append(patient.loss(windows))
    assert losses[0] < losses[1]
    # They are different fine-tunes of the student as it was, on different halves.
    patient.restore()
    clean = patient.snapshot()
    first, second = patient.parents
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True) if one.ndim == 2)
    assert not any(torch.equal(one, other) for one, other in zip(first, clean, strict=True) if one.ndim == 2)


def test_both_parents_begin_with_the_student_and_read_different_halves(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = whole
    setup = prepare(config, device=CPU, folder=folder)
    (patient, *_) = admit(setup).unseen
    clean, texts = patient.snapshot(), []

    def moved(setup: Any, patient: Patient, name: str, tokens: torch.Tensor, stop: Any) -> None:
        assert all(map(torch.equal, patient.snapshot(), clean))
        texts.append(tokens)
        patient.put([weight + 1 for weight in clean])

    monkeypatch.setattr(merging, "_fine_tune", moved)
    merging.find_parents(setup, patient)
    assert torch.equal(torch.cat(texts), setup.corpus.train)
    assert abs(len(texts[0]) - len(texts[1])) <= 1
    assert all(map(torch.equal, patient.snapshot(), clean))


def test_what_is_copied_is_what_the_kinds_of_damage_may_touch(tmp_path: Path) -> None:
    def scope(*overrides: str) -> str:
        return scope_of(load_config(SurgeryConfig, overrides=["training=amortised", *overrides]))

    assert scope() == "attention"
    assert scope("amortised.damages=[round_4]") == scope("amortised.unseen_damages=[truncation]") == "layers"
    assert scope("edit.mlp=true") == "layers"
    assert scope("amortised.unseen_damages=[merging]") == "model"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training=phases", "edit.mlp=true", "edit.kind=singular_values"], "`edit.mlp` needs `training` amortised"),
        (["amortised.damages=[merging]", "amortised.models=[starter]"], "merging is of students alone"),
        (
            ["amortised.damages=[round_2]", "amortised.unseen_damages=[merging]", "amortised.unseen_sizes=[]"],
            "merging is of students alone; give `amortised.unseen_sizes`",
        ),
        (["amortised.fine_tune_steps=0"], "`amortised.fine_tune_steps` must be at least 1"),
        (["amortised.fine_tune_rate=0"], "`amortised.fine_tune_rate` must be above 0"),
        (["amortised.damages=[round_1]"], "must be one of"),
        (["amortised.repairs=[calibrate]"], "must be one of"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, *overrides)
    assert len(error.value.faults) == 1, error.value.faults
    assert message in error.value.faults[0]
    assert "\n" not in error.value.faults[0]


def test_a_pretrained_model_is_not_merged(tmp_path: Path, whole: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    """It is judged under every other kind of damage."""
    folder, _, _ = whole
    student = folder / "students" / "student_0_1x2x16"
    config = config_of(tmp_path, f"amortised.unseen_models=[{student}]", "amortised.unseen_damages=[]")
    os.symlink(folder / "students", tmp_path / "students")
    ward = admit(prepare(config, device=CPU, folder=tmp_path))
    pretrained = [kind for patient, kind in ward.items if patient.name == student.name]
    assert pretrained == ["round_2", "magnitude_pruning"]
    assert all(isinstance(patient, Patient) for patient, _ in ward.items)
    assert [kind for patient, kind in ward.items if patient.name != student.name][-1] == "merging"
