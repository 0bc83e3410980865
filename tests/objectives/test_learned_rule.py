"""The learned rule: what it sees by hand, that names and places are nothing to it, and its files."""

from __future__ import annotations

import pytest
import torch

from preceptor.objectives.learned_rule import FEATURES, LearnedRule, SourcePolicy, source_features
from preceptor.objectives.task_mixture import TaskMixture
from preceptor.objectives.task_rules import Groups


def trained(seed: int = 0) -> SourcePolicy:
    """A policy whose outputs are not 0."""
    policy = SourcePolicy(6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in (policy.score, policy.value):
            layer.weight.copy_(torch.linspace(-2, 2, layer.weight.numel())[None])
    return policy


def batch(sources: list[int], success: list[float], advantage: float = 0.5) -> Groups:
    return Groups(torch.tensor(sources), torch.tensor(success), torch.full((len(sources),), advantage), size=8)


def test_what_the_network_sees_by_hand() -> None:
    # Two levels. First batch: level 1 right 8 of 8. Second: level 1 right 4 of 8, twice.
    # Middle pace (0.8): right 0.8·8 + 8 = 14.4, wrong 8; posterior mean 15.4/24.4. Fast (0.5): right 12, wrong 8;
    # 13/22. Slow (0.95): right 15.6, wrong 8; 16.6/25.6. Level 2: nothing but its prior, a half.
    rule, tasks = LearnedRule(policy=SourcePolicy(2)), [0, 0]
    state = rule.observe(rule.initial_state(tasks), batch([0], [1.0]), tasks)
    state = rule.observe(state, batch([0, 0], [0.5, 0.5], advantage=1.0), tasks)
    first, second = (dict(zip(FEATURES, row, strict=True)) for row in source_features(state, tasks).tolist())
    middle = 15.4 / 24.4
    expected = {
        "level": 0.0,
        "tried": 22.4 / 30.4,
        "success": middle,
        "variance": 4 * middle * (1 - middle),
        "rise": 13 / 22 - middle,
        "slow_rise": middle - 16.6 / 25.6,
        "advantage": (0.8 * 0.5 + 2.0) / 2.8,
        "share": 2 / 3,  # all of the groups, twice an even share
        "below": 1.0,
        "above": 0.5,
    }
    assert first == pytest.approx(expected)
    assert second["level"] == 1.0
    assert second["below"] == pytest.approx(middle)
    assert (second["tried"], second["share"], second["above"], second["success"]) == (0.0, 0.0, 0.0, 0.5)


def test_tasks_may_stand_in_any_order() -> None:
    rule = LearnedRule(policy=trained())
    ours, swapped = TaskMixture(rule, num_levels=[2, 3]), TaskMixture(rule, num_levels=[3, 2])
    for _ in range(3):
        ours.update(batch([0, 1, 2, 4], [1.0, 0.5, 0.25, 0.0]), progress=0.0)
        swapped.update(batch([3, 4, 0, 2], [1.0, 0.5, 0.25, 0.0]), progress=0.0)
    torch.testing.assert_close(ours.weights, swapped.weights[[3, 4, 0, 1, 2]])
    assert ours.weights.max() > 1.5 * ours.weights.min()  # it does prefer


def test_weights_before_training_are_even_and_exploration_is_a_floor() -> None:
    even = TaskMixture(LearnedRule(policy=SourcePolicy(4)), num_levels=[4])
    even.update(batch([0], [1.0]), progress=0.0)
    assert even.weights.tolist() == [0.25] * 4
    policy = trained()
    with torch.no_grad():
        policy.score.weight.mul_(1000)
    sharp = TaskMixture(LearnedRule(policy=policy, exploration=0.2), num_levels=[4])
    assert sharp.update(batch([0], [1.0]), progress=0.0).min().item() == pytest.approx(0.05)
