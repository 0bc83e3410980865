"""Which methods a configuration asks for, and what sets them apart."""

from __future__ import annotations

import pytest

from preceptor.systems.curriculum.baselines import FROZEN_POLICY, Method, plan_methods, static_grid
from preceptor.systems.curriculum.config import (
    DEFAULT_DATASETS,
    ControlOptions,
    CurriculumConfig,
    DataOptions,
    DatasetOptions,
    DifficultyOptions,
    MixtureOptions,
    PPOOptions,
    UpdateOptions,
)

BASE = CurriculumConfig(controls=ControlOptions(rules=("uniform", "second_order"), static_grid="none"))


def names(config: CurriculumConfig) -> list[str]:
    return [method.name for method in plan_methods(config)]


def test_the_whole_system_comes_first_and_each_control_takes_one_thing_away() -> None:
    steps = BASE.update.steps
    own, frozen, rule, *others = plan_methods(BASE)
    assert own == Method("learning_progress+ppo", "learning_progress", policy_gradient=True, num_steps=steps)
    assert frozen == Method(FROZEN_POLICY, "learning_progress", policy_gradient=True, learns=False, num_steps=steps)
    assert rule == Method("learning_progress", "learning_progress", num_steps=steps)
    assert others == [Method(name, name, num_steps=steps) for name in ("uniform", "second_order")]


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


def test_uniform_at_equal_cost_takes_more_steps() -> None:
    # 60 steps of 1,024 tokens; 6 measurements of 24 rows of 4 datasets, 128 tokens each: 73,728 tokens, 72 steps.
    controls = ControlOptions(rules=("uniform",), static_grid="none", equal_cost=("rows", "flops"))
    config = CurriculumConfig(controls=controls, ppo=PPOOptions(weight=0.0))
    assert {method.name: method.num_steps for method in plan_methods(config)} == {
        "learning_progress": 60,
        "uniform": 60,
        "uniform_equal_rows": 60 + 72,
        "uniform_equal_flops": 60 + 24,
    }
    # Gradients of 2 rows of 4 datasets and 3 targets cost the same in both currencies: 10,752 tokens, 11 steps.
    aligned = config.model_copy(
        update={"mixture": MixtureOptions(rule="alignment"), "difficulty": DifficultyOptions(alignment_rows=2)}
    )
    assert [method.num_steps for method in plan_methods(aligned)] == [60, 60, 71, 71]
    # From the training batch they cost nothing.
    free = config.model_copy(update={"mixture": MixtureOptions(rule="alignment")})
    assert {method.num_steps for method in plan_methods(free)} == {60}


def test_a_dataset_that_is_only_judged_is_in_no_mixture() -> None:
    datasets = (*DEFAULT_DATASETS, DatasetOptions(name="far", location="builtin:salad", train=False))
    config = CurriculumConfig(
        data=DataOptions(datasets=datasets),
        ppo=PPOOptions(weight=0.0),
        controls=ControlOptions(rules=(), static_grid="omit", mixtures={"two": (1.0, 1.0, 0.0, 0.0)}),
    )
    assert "static_no_far" not in names(config)
    assert plan_methods(config)[-1].weights == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(("rule", "measures"), [("uniform", False), ("static", False), ("exp3", True)])
def test_only_rules_that_move_measure(rule: str, measures: bool) -> None:
    assert Method("x", rule).measures_difficulty is measures
