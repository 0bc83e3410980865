"""The state of a run: what a checkpoint holds, what methods are said to cost, and the plateau."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.runs.tensors import join_state, split_state
from preceptor.systems.surgery.evaluate import evaluate
from preceptor.systems.surgery.state import PlateauWatch, State
from tests.systems.surgery.small import phase_of, small_state


def through_a_checkpoint(state: State) -> dict[str, object]:
    """Its state as it comes back from a file: tensors apart, the rest through JSON."""
    tensors, rest = split_state(state.state_dict())
    restored: dict[str, object] = join_state(tensors, json.loads(json.dumps(rest)))
    return restored


def test_a_checkpoint_holds_what_was_counted(tmp_path: Path) -> None:
    saved, loaded = small_state(tmp_path), small_state(tmp_path)
    saved.phase = phase_of(saved, "learned")
    saved.plateau.measure(4, 3.0)
    saved.plateau.measure(8, 2.0)
    saved.learned_actions = [[0.5, -0.25]]
    saved.records = [{"arm": "no_edit", "log_prob": -2.0}]
    saved.num_edits, saved.num_committed = 5, 2
    saved.surgeon = saved.new_surgeon(saved.phase)
    loaded.load_state_dict(through_a_checkpoint(saved))
    assert loaded.phase == saved.phase
    assert loaded.plateau.state_dict() == saved.plateau.state_dict() == {"points": [[4, 3.0], [8, 2.0]], "step": None}
    assert (loaded.learned_actions, loaded.records) == (saved.learned_actions, saved.records)
    assert (loaded.num_edits, loaded.num_committed) == (5, 2)


def test_the_reference_models_training_is_paid_by_those_who_use_it(tmp_path: Path) -> None:
    state = small_state(tmp_path, "learning.partial_reward=0.5")
    reference_lm, student = state.setup.reference_lm, state.student
    assert reference_lm.training_flops > 0
    reference_lm.training_flops = 10**9  # some hundreds of this small student's updates
    student.costs.flops = 7_000_000_000
    state.phase = phase_of(state, "no_edit")
    assert evaluate(state)["gflops"] == pytest.approx(7 + reference_lm.training_flops / 1e9, abs=1e-12)
    state.phase = phase_of(state, "cross_entropy")
    assert evaluate(state)["gflops"] == 7
    # 8 updates of 4 · 16 positions, 6 operations a weight of the student and the reference model's, and its training
    tokens = 4 * 16
    budget = 8 * tokens * (3 * student.flops_per_token + reference_lm.flops_per_token) + reference_lm.training_flops
    assert state.equal_flops_steps("cross_entropy") == budget // (tokens * 3 * student.flops_per_token)


def test_a_falling_loss_is_no_plateau() -> None:
    watch = PlateauWatch(window=3, slope=0.01)
    found = [watch.measure(step, 3.0 - 0.001 * step) for step in range(100, 1100, 100)]
    assert not any(found)
    assert watch.step is None


def test_a_plateau_is_found_once_by_the_line_through_the_last_points() -> None:
    # To catch: the slope per step instead of per hundred.
    watch = PlateauWatch(window=3, slope=0.1)
    losses = [3.0, 2.0, 1.9, 1.9, 1.9]  # per 100 steps: -0.55, then -0.05
    assert [watch.measure(100 * n, loss) for n, loss in enumerate(losses, start=1)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    again = PlateauWatch(window=3, slope=0.1)
    again.load_state_dict(watch.state_dict())
    assert again.state_dict() == watch.state_dict()
