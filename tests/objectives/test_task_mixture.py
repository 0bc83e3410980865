"""Rules over tasks and levels: by hand, against slow references, and what each must and must not do."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from preceptor.errors import CheckpointError, ConfigError
from preceptor.objectives.learned_rule import SourcePolicy
from preceptor.objectives.task_mixture import TASK_RULES, TaskMixture, make_task_mixture
from preceptor.objectives.task_rules import (
    FrontierRange,
    Groups,
    MeanAdvantage,
    Staged,
    SuccessVariance,
    UpperConfidence,
    is_stalled,
)


def groups(*rows: tuple[int, float], size: int = 8) -> Groups:
    """Groups of (source, success); the advantage is that of ±1 scaled by the deviation, 2√(p(1 − p))."""
    success = torch.tensor([success for _, success in rows], dtype=torch.float64)
    advantage = 2 * (success * (1 - success)).sqrt()
    return Groups(torch.tensor([source for source, _ in rows]), success, advantage, size)


class Learner:
    """Levels of which each is learned only by mixed groups, and helps the next one."""

    def __init__(self, num_levels: int, *, seed: int, coin: bool = False) -> None:
        self.skill = np.zeros(num_levels)
        self.coin = coin
        self.random = np.random.default_rng(seed)

    @property
    def success(self) -> np.ndarray:
        shared = np.concatenate([[3.0], self.skill[:-1]])
        rates = 1 / (1 + np.exp(4 - self.skill - 0.8 * np.minimum(shared, 4)))
        return np.append(rates, 0.5) if self.coin else rates

    def train(self, mixture: TaskMixture, num_steps: int) -> int:
        """Steps to a mean success of 0.8, or ``num_steps``."""
        levels = len(self.skill)
        for step in range(num_steps):
            if self.success[:levels].mean() >= 0.8:
                return step
            if mixture.rule.asks_for_success:
                mixture.tell_success(torch.from_numpy(self.success))
            drawn = self.random.choice(len(mixture.tasks), 8, p=mixture.weights.numpy())
            rates = self.random.binomial(8, self.success[drawn]) / 8
            for source, rate in zip(drawn, rates, strict=True):
                if source < levels:
                    self.skill[source] += 0.6 * rate * (1 - rate)
            mixture.update(groups(*zip(drawn.tolist(), rates.tolist(), strict=True)), progress=step / num_steps)
        return num_steps


# --- the rules by hand ------------------------------------------------------------------------------------------------


def test_success_variance_by_hand():
    # Two levels, decay 0.5, neighbours 0.5. First batch: level 1 right 6 of 8, level 2 0 of 8.
    # Second batch: level 1 4 of 8. Right (0.5·6 + 4, 0) = (7, 0), wrong (0.5·2 + 4, 0.5·8) = (5, 4).
    # With half of the neighbour and one: right (7 + 0 + 1, 0 + 3.5 + 1) = (8, 4.5),
    # wrong (5 + 2 + 1, 4 + 2.5 + 1) = (8, 7.5).
    # 8·8/(16·17) = 0.235294, 4.5·7.5/(12·13) = 0.216346.
    rule, tasks = SuccessVariance(decay=0.5, neighbours=0.5), [0, 0]
    state = rule.observe(rule.initial_state(tasks), groups((0, 0.75), (1, 0.0)), tasks)
    state = rule.observe(state, groups((0, 0.5)), tasks)
    np.testing.assert_allclose(rule.preferences(state, tasks, progress=0.0), [0.235294, 0.216346], atol=1e-6)


def test_neighbours_are_of_the_same_task():
    rule, tasks = SuccessVariance(neighbours=1.0), [0, 1]
    state = rule.observe(rule.initial_state(tasks), groups((0, 1.0)), tasks)
    # The other task has only its prior: 1·1/(2·3).
    assert rule.preferences(state, tasks, progress=0.0)[1].item() == pytest.approx(1 / 6)


def test_frontier_moves_up_one_level_and_stays_at_the_last():
    rule, tasks = FrontierRange(window=2, threshold=0.9, answers=16), [0, 0, 0]
    state, history = rule.initial_state(tasks), []
    for success in (1.0, 0.9, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0):
        state = rule.observe(state, groups(*((level, success) for level in range(3))), tasks)
        history.append(rule.preferences(state, tasks, progress=0.0).tolist())
    # Sixteen answers at the top are two groups: 0.95 moves it; (0.8 + 1)/2 = 0.9 moves it again; then there is no more.
    assert history == [[1, 0, 0]] + [[1, 1, 0]] * 2 + [[0, 1, 1]] * 5


def test_frontier_moves_at_half_right_unless_told_otherwise():
    tasks, batch = [0, 0], groups((0, 0.5), (0, 0.5))
    for rule, expected in ((FrontierRange(answers=16), [1, 1]), (FrontierRange(answers=16, threshold=0.6), [1, 0])):
        state = rule.observe(rule.initial_state(tasks), batch, tasks)
        assert rule.preferences(state, tasks, progress=0.0).tolist() == expected


def test_mean_advantage_by_hand():
    # α = 0.5, τ = 1: advantages 1 and 0 give (0.5, 0); level 3 is not drawn. Softmax e^0.5 : 1 : 1.
    rule, tasks = MeanAdvantage(rate=0.5, temperature=1.0), [0, 0, 0]
    state = rule.observe(rule.initial_state(tasks), groups((0, 0.5), (1, 1.0)), tasks)
    total = math.exp(0.5) + 2
    expected = [math.exp(0.5) / total, 1 / total, 1 / total]
    np.testing.assert_allclose(rule.preferences(state, tasks, progress=0.0), expected)


def test_upper_confidence_by_hand():
    # Three groups of source 0 with advantage 1, none of source 1: means (1, 0), bonuses √(2 ln 4 / 4), √(2 ln 4 / 1).
    rule, tasks = UpperConfidence(temperature=1.0), [0, 0]
    state = rule.observe(rule.initial_state(tasks), groups((0, 0.5), (0, 0.5), (0, 0.5)), tasks)
    scores = [1 + math.sqrt(2 * math.log(4) / 4), math.sqrt(2 * math.log(4))]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(rule.preferences(state, tasks, progress=0.0), expected)


def test_staged_opens_levels_on_schedule():
    tasks = [0, 0, 0, 0]
    opened = [Staged(horizon=0.5).preferences({}, tasks, progress=p).tolist() for p in (0.0, 0.25, 0.3, 0.5)]
    assert opened == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert Staged(hardest_first=1.0).preferences({}, tasks, progress=0.0).tolist() == [0, 0, 0, 1]


def test_oracle_prefers_what_is_half_mastered():
    mixture = make_task_mixture("oracle", num_levels=[3], exploration=0.0)
    mixture.tell_success(torch.tensor([1.0, 0.5, 0.1]))
    weights = mixture.update(groups((0, 1.0)), progress=0.0)
    np.testing.assert_allclose(weights, [0, 0.25 / 0.34, 0.09 / 0.34])


# --- every rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_RULES)
def test_weights_are_shares_and_resume_through_json(name):
    policy = SourcePolicy(4) if name == "learned" else None
    whole, second = (make_task_mixture(name, num_levels=[4, 2], policy=policy) for _ in range(2))
    learner = Learner(6, seed=1)
    learner.train(whole, 25)
    second.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(12):
        batch = groups((0, 0.5), (1, 0.25), (5, 1.0))
        assert torch.equal(whole.update(batch, progress=0.5), second.update(batch, progress=0.5))
    assert whole.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert whole.weights.min() >= 0
    assert whole.state_dict() == second.state_dict()


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="unknown task rule 'frontier'"):
        make_task_mixture("frontier", num_levels=[2])
    with pytest.raises(ConfigError, match=r"no option 'windo' .did you mean 'window'"):
        make_task_mixture("frontier_range", num_levels=[2], windo=2)
    with pytest.raises(ConfigError, match="at least one level"):
        make_task_mixture("uniform", num_levels=[2, 0])
    with pytest.raises(ConfigError, match="threshold must lie in"):
        FrontierRange(threshold=1.0)
    with pytest.raises(ConfigError, match="'learned' needs the policy"):
        make_task_mixture("learned", num_levels=[2])
    with pytest.raises(ConfigError, match="no other rule takes one"):
        make_task_mixture("uniform", num_levels=[2], policy=SourcePolicy(4))
    mixture = make_task_mixture("success_variance", num_levels=[2])
    with pytest.raises(CheckpointError, match="another rule or of other tasks"):
        mixture.load_state_dict(make_task_mixture("success_variance", num_levels=[3]).state_dict())


# --- what they are for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "most"), [("frontier_range", 0, 1.0), ("oracle", 0, 0.9), ("hard_to_easy", 5, 99)]
)
def test_steps_to_learn_a_chain_of_levels_relative_to_uniform(name, least, most):
    ratios = []
    for seed in range(5):
        uniform = Learner(6, seed=seed).train(make_task_mixture("uniform", num_levels=[6]), 9000)
        ratios.append(Learner(6, seed=seed).train(make_task_mixture(name, num_levels=[6]), 9000) / uniform)
    assert least < np.mean(ratios) < most, ratios


def test_stall_is_a_plateau_between_nothing_and_mastery():
    random = np.random.default_rng(0)
    coin = (random.binomial(8, 0.5, 60) / 8).tolist()
    rising = (random.binomial(8, np.linspace(0.2, 0.8, 60)) / 8).tolist()
    assert is_stalled(coin)
    assert not is_stalled(rising)
    assert not is_stalled([1.0] * 60)
    assert not is_stalled(coin[:59])


@pytest.mark.parametrize("name", ["frontier_range", "success_variance"])
def test_a_coin_flip_is_no_trap(name):
    shares = {}
    for stall in (0.1, 1.0):
        mixture = make_task_mixture(name, num_levels=[6, 1], stall=stall)
        learner, weights = Learner(6, seed=0, coin=True), []
        for _ in range(15):
            learner.train(mixture, 10)
            weights.append(mixture.weights[-1].item())
        shares[stall] = np.mean(weights[8:])
    assert shares[0.1] < 0.25
    assert shares[1.0] > 1.5 * shares[0.1]  # the planted fault: nothing is cut
