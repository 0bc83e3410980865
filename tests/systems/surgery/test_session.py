"""A session: what a checkpoint holds, what arms have in common, and what an arm is said to have cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.materials import prepare
from preceptor.systems.surgery.phases import measure, operate, update
from preceptor.systems.surgery.plan import Stretch
from preceptor.systems.surgery.quality import Acceptance
from preceptor.systems.surgery.result import arm_record
from preceptor.systems.surgery.session import Session
from tests.systems.surgery.small import CPU, small_config, write_text


def session(folder: Path, *overrides: str) -> Session:
    config: SurgeryConfig = small_config(write_text(folder), *overrides)
    return Session(config, prepare(config, device=CPU), device=CPU, folder=folder)


def stretch(of: Session, arm: str) -> Stretch:
    return next(stretch for stretch in of.plan if stretch.arm == arm)


def test_a_checkpoint_holds_what_was_counted(tmp_path: Path) -> None:
    saved, loaded = session(tmp_path), session(tmp_path)
    learned = stretch(saved, "learned")
    saved.plateau.measure(4, 3.0)
    saved.plateau.measure(8, 2.0)
    saved.learned_actions = [[0.5, -0.25]]
    saved.records = [{"arm": "no_edit", "log_prob": -2.0}]
    saved.num_edits, saved.num_committed = 5, 2
    saved.surgeon = saved.new_surgeon(learned)
    held: dict[str, Any] = {}
    run = SimpleNamespace(save=lambda step, tensors, state: held.update(tensors=tensors, state=state))
    saved.save(run, 3)  # type: ignore[arg-type]
    checkpoint = SimpleNamespace(tensors=held["tensors"], state=json.loads(json.dumps(held["state"])))
    loaded.load(checkpoint, learned)  # type: ignore[arg-type]
    assert loaded.plateau.state_dict() == saved.plateau.state_dict() == {"points": [[4, 3.0], [8, 2.0]], "step": None}
    assert (loaded.learned_actions, loaded.records) == (saved.learned_actions, saved.records)
    assert (loaded.num_edits, loaded.num_committed) == (5, 2)


def test_arms_of_a_phase_learn_from_the_same_batches(tmp_path: Path) -> None:
    """From the same weights the first update reads the same text: whatever the objective, as much of it is right."""
    one = session(tmp_path, "student.width=32")

    def accuracies(arm: str) -> list[float]:
        one.patient.reset()
        return [update(one, stretch(one, arm), count, count)[0]["accuracy"] for count in (1, 2)]

    assert accuracies("no_edit")[0] == accuracies("cross_entropy")[0]
    assert accuracies("joint") == accuracies("training")
    assert accuracies("training") != accuracies("gradient")


def test_every_edit_is_tested_on_text_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New windows at each edit, the same for every arm, and none of those whose loss the reward is made of."""
    one = session(tmp_path)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for arm in ("evolution", "shuffled"):
        one.surgeon = one.new_surgeon(stretch(one, arm))
        assert one.surgeon is not None
        monkeypatch.setattr(one.surgeon, "candidate", lambda action, reward: action)
        for local in (1, 2):

            def test(action: Any, windows: torch.Tensor, key: tuple[str, int] = (arm, local)) -> Acceptance:
                seen[key] = windows
                return Acceptance(0.0, 0.0, False)

            monkeypatch.setattr(one.surgery, "test", test)
            operate(one, stretch(one, arm), local, local)
    assert torch.equal(seen["evolution", 1], seen["shuffled", 1])
    assert torch.equal(seen["evolution", 2], seen["shuffled", 2])
    assert not torch.equal(seen["evolution", 1], seen["evolution", 2])
    rewarded = {tuple(window) for window in one.materials.examiner._windows.tolist()}
    assert seen["evolution", 1].shape == (8, 17)
    assert {tuple(window) for window in seen["evolution", 1].tolist()} != rewarded


def test_the_last_step_is_measured_and_only_bootstrapping_has_a_plateau(tmp_path: Path) -> None:
    one = session(tmp_path, "evaluation.every=5", "phases.plateau_slope=100", "phases.plateau_window=2")
    own, other = stretch(one, "no_edit"), stretch(one, "cross_entropy")
    assert own.num_steps == 8
    for local in (5, 8):
        measured, notice = measure(one, other, local)
        assert measured
        assert notice is None
    assert one.plateau.state_dict() == {"points": [], "step": None}
    assert [bool(measure(one, own, local)[0]) for local in range(1, 9)] == [False] * 4 + [True] + [False] * 2 + [True]
    assert one.plateau.step == 8  # hardly any loss falls by 100 nats in 100 steps


def test_the_referees_training_is_paid_by_those_who_ask_it(tmp_path: Path) -> None:
    one = session(tmp_path, "learning.partial_reward=0.5")
    referee, patient = one.materials.referee, one.patient
    own, other = stretch(one, "no_edit"), stretch(one, "cross_entropy")
    assert referee.training_flops > 0
    referee.training_flops = 10**9  # some hundreds of this small student's updates
    patient.costs.flops = 7_000_000_000
    assert arm_record(one, own)["gflops"] == pytest.approx(7 + referee.training_flops / 1e9, abs=1e-12)
    assert arm_record(one, other)["gflops"] == 7
    # 8 updates of 4 · 16 positions, 6 operations a weight of the student and the referee's answers, and its training
    tokens = 4 * 16
    budget = 8 * tokens * (3 * patient.flops_per_token + referee.flops_per_token) + referee.training_flops
    assert one._equal_flops_steps("cross_entropy") == budget // (tokens * 3 * patient.flops_per_token)
