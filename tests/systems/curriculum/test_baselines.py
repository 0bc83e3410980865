"""Which methods a configuration asks for, and what sets them apart."""

from __future__ import annotations

import pytest

from preceptor.systems.curriculum.baselines import FROZEN_POLICY, Method, plan_methods, static_grid
from preceptor.systems.curriculum.config import (
    ControlOptions,
    CurriculumConfig,
    MixtureOptions,
    PPOOptions,
    UpdateOptions,
)

BASE = CurriculumConfig(controls=ControlOptions(rules=("uniform", "second_order"), static_grid="none"))


def names(config: CurriculumConfig) -> list[str]:
    return [method.name for method in plan_methods(config)]


def test_the_whole_system_comes_first_and_each_control_takes_one_thing_away() -> None:
    own, frozen, rule, *others = plan_methods(BASE)
    assert own == Method("learning_progress+ppo", "learning_progress", policy_gradient=True)
    assert frozen == Method(FROZEN_POLICY, "learning_progress", policy_gradient=True, learns=False)
    assert rule == Method("learning_progress", "learning_progress")
    assert others == [Method("uniform", "uniform"), Method("second_order", "second_order")]


def test_without_rollouts_there_is_nothing_to_freeze() -> None:
    assert names(BASE.model_copy(update={"ppo": PPOOptions(weight=0.0)})) == [
        "learning_progress",
        "uniform",
        "second_order",
    ]


def test_without_cross_entropy_every_method_has_a_policy_gradient() -> None:
    methods = plan_methods(BASE.model_copy(update={"update": UpdateOptions(cross_entropy_weight=0.0)}))
    assert [method.name for method in methods] == ["learning_progress", FROZEN_POLICY, "uniform", "second_order"]
    assert all(method.policy_gradient for method in methods)


def test_a_rule_is_not_its_own_control() -> None:
    config = BASE.model_copy(update={"mixture": MixtureOptions(rule="uniform"), "ppo": PPOOptions(weight=0.0)})
    assert names(config) == ["uniform", "second_order"]


def test_the_settings_of_the_rule_reach_its_methods_alone() -> None:
    config = BASE.model_copy(update={"mixture": MixtureOptions(settings={"threshold": 3.0})})
    assert [method.settings for method in plan_methods(config)] == [{"threshold": 3.0}] * 3 + [{}] * 2


def test_the_static_grid() -> None:
    grid = static_grid(["a", "b", "c"], doubled=True)
    assert grid == {
        "static_no_a": (0, 1, 1),
        "static_no_b": (1, 0, 1),
        "static_no_c": (1, 1, 0),
        "static_more_a": (2, 1, 1),
        "static_more_b": (1, 2, 1),
        "static_more_c": (1, 1, 2),
    }
    config = BASE.model_copy(
        update={"controls": ControlOptions(rules=(), static_grid="omit"), "ppo": PPOOptions(weight=0.0)}
    )
    assert names(config)[1:] == [f"static_no_{name}" for name in ("code", "manual", "dialogue", "noise")]


@pytest.mark.parametrize(("rule", "measures"), [("uniform", False), ("static", False), ("exp3", True)])
def test_only_rules_that_move_measure(rule: str, measures: bool) -> None:
    assert Method("x", rule).measures_difficulty is measures
