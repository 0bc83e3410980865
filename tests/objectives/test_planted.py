"""What each rule must close of the gap from uniform to the best schedule, in worlds where that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from preceptor.objectives import make_mixture
from tests.objectives.planted import CHAIN, FORGETTING, WORLDS, best_schedule

LEAST = {
    # learning_progress keeps half of the weight on the targets, which costs it most where they come one after another.
    "chain": {"learning_progress": 0.4, "second_order": 0.3, "progress_on_targets": 0.6, "alignment": 0.4},
    "noise": {"learning_progress": 0.5, "second_order": 0.5, "progress_on_targets": 0.9, "alignment": 0.9},
    "copies": {"learning_progress": 0.65, "second_order": 0.75, "progress_on_targets": 0.9, "alignment": 0.85},
    # Progress says nothing about a target that no dataset holds.
    "far": {"learning_progress": -0.05, "second_order": -0.05, "progress_on_targets": 0.0, "alignment": 0.65},
    "forgetting": {"learning_progress": 0.85, "second_order": 0.85, "progress_on_targets": 0.85, "alignment": 0.9},
}


@pytest.mark.parametrize("rule", LEAST["chain"])
@pytest.mark.parametrize("world", WORLDS)
def test_share_of_the_gap(world: str, rule: str) -> None:
    mixture = make_mixture(rule, num_datasets=len(WORLDS[world].targets), targets=WORLDS[world].targets)
    assert WORLDS[world].gap_closed(mixture) >= LEAST[world][rule] - 1e-9


def test_the_text_without_its_guard_does_harm_where_things_are_forgotten() -> None:
    """The planted fault: paid for relearning, the rule ends far below uniform."""
    mixture = make_mixture("second_order", num_datasets=6, targets=FORGETTING.targets, guard=0.0)
    assert FORGETTING.gap_closed(mixture) < -0.5


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_the_best_schedule_is_the_best(world: str) -> None:
    # Adam with 120 steps finds the constants to about a thousandth of a nat.
    assert best_schedule(WORLDS[world], steps=120) == pytest.approx(WORLDS[world].best, abs=2e-3)


def test_a_schedule_beats_every_fixed_mixture_of_a_chain() -> None:
    assert best_schedule(replace(CHAIN), pieces=1, steps=60) > CHAIN.best + 0.5
