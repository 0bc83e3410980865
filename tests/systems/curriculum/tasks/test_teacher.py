"""A teacher's PPO: rewards by hand, the gradient against a slow reference, a planted school with a known optimum."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from preceptor.objectives.learned_rule import source_features
from preceptor.objectives.task_mixture import TaskMixture
from preceptor.objectives.task_rules import Groups
from preceptor.systems.curriculum.tasks.config import AmortisedOptions
from preceptor.systems.curriculum.tasks.teacher import Lesson, Teacher, lesson_rewards, log_mixed, spread

OPTIONS = AmortisedOptions(hidden_dim=8, learning_rate=0.02)


def teacher(options: AmortisedOptions = OPTIONS, seed: int = 0) -> Teacher:
    return Teacher(options, generator=torch.Generator().manual_seed(seed))


def school_lesson(rule_of: Teacher, generator: torch.Generator, *, good: int, batches: int = 10) -> Lesson:
    """A student of three sources, of which ``good`` alone teaches: a group of it adds 3 points of success.

    The good source is the one whose own answers are half right; the others' are always wrong or always right. So what
    is good has another number in each lesson, and can only be known by how answers fare.
    """
    mixture, lesson, skill = TaskMixture(rule_of.rule, num_levels=[1, 1, 1]), Lesson(), 0.0
    fares = [0.0, 1.0]
    rates = [0.5 if source == good else fares[(source - good) % 3 - 1] for source in range(3)]
    for number in range(batches):
        lesson.features.append(source_features(mixture.state, mixture.tasks))
        lesson.left.append(1 - number / batches)
        drawn = torch.multinomial(mixture.weights, 4, replacement=True, generator=generator)
        lesson.drawn.append(drawn.tolist())
        skill += 0.03 * (drawn == good).sum().item()
        lesson.measured.append((number, skill))
        success = torch.tensor([rates[source] for source in drawn.tolist()], dtype=torch.float64)
        mixture.update(Groups(drawn, success, 2 * (success * (1 - success)).sqrt(), size=8), progress=0.0)
    return lesson


def schooled(own: Teacher, *, updates: int, shuffled: bool = False, seed: int = 0) -> float:
    """Share of the groups that the good source gets after ``updates``, in the last four batches of six new lessons."""
    generator = torch.Generator().manual_seed(seed)
    last: list[list[float]] = []
    for update in range(updates):
        groups = [[school_lesson(own, generator, good=(update + place) % 3) for _ in range(4)] for place in range(2)]
        rewards = [reward for group in groups for reward in lesson_rewards(group)]
        told, last = (last or [[0.0]] * len(rewards), rewards) if shuffled else (rewards, last)
        own.learn([lesson for group in groups for lesson in group], told)
    good = [lesson for which in range(3) for lesson in (school_lesson(own, generator, good=which) for _ in range(2))]
    of = [which for which in range(3) for _ in range(2)]
    drawn = [
        source == which for lesson, which in zip(good, of, strict=True) for row in lesson.drawn[-4:] for source in row
    ]
    return sum(drawn) / len(drawn)


def test_rewards_by_hand() -> None:
    lessons = [
        Lesson(measured=[(0, 0.2), (3, 0.8)]),
        Lesson(measured=[(1, 0.4), (2, 0.2)]),
        Lesson(measured=[(1, 0.6)]),  # it has one measurement fewer
    ]
    # 0.2 − (0.4 + 0.6)/2 over two measurements; then 0.8 − 0.2. The third: 0.6 − (0.2 + 0.4)/2 over one.
    assert [pytest.approx(row) for row in lesson_rewards(lessons)] == [[-0.15, 0.3], [-0.0, -0.3], [0.3]]
    assert lesson_rewards([Lesson(measured=[(0, 0.5)])] * 3) == [[0.0]] * 3
    lesson = Lesson(drawn=[[0], [0], [0], [0]], measured=[(0, 0.2), (3, 0.8)])
    assert spread(lesson, [-0.15, 0.3]).tolist() == [-0.15, 0.0, 0.0, 0.3]


def test_log_weights_are_those_of_the_mixture() -> None:
    own = teacher()
    with torch.no_grad():
        own.policy.score.weight.copy_(torch.linspace(-3, 3, 8)[None])
    mixture = TaskMixture(own.rule, num_levels=[3, 2])
    mixture.update(Groups(torch.tensor([0, 4]), torch.tensor([0.5, 1.0]), torch.ones(2), size=8), progress=0.0)
    scores, _ = own.policy(source_features(mixture.state, mixture.tasks))
    torch.testing.assert_close(log_mixed(scores, OPTIONS.exploration).exp(), mixture.weights)
    assert log_mixed(scores, 1.0).exp().tolist() == pytest.approx([0.2] * 5)
    torch.testing.assert_close(log_mixed(scores, 0.0), torch.log_softmax(scores, -1))


def test_the_first_step_follows_reinforce() -> None:
    # At ratio 1 the gradient of the scores is REINFORCE's, group by group, with the whitened return as advantage:
    # values are 0 before training, and λ = 1 sums the rewards to come.
    options = OPTIONS.model_copy(update={"epochs": 1, "gae_lambda": 1.0, "entropy_coefficient": 0.0})
    own, generator = teacher(options), torch.Generator().manual_seed(3)
    lessons = [school_lesson(own, generator, good=0, batches=3) for _ in range(2)]
    rewards = lesson_rewards(lessons)
    returns = [[sum(row[step:]) for step in range(3)] for row in rewards]
    flat = torch.tensor(returns, dtype=torch.float64).flatten()
    advantages = ((flat - flat.mean()) / flat.std()).reshape(2, 3).tolist()
    policy = own.policy
    weight = policy.score.weight.detach().clone().requires_grad_()
    terms = []
    for lesson, row in zip(lessons, advantages, strict=True):
        for seen, drawn, advantage in zip(lesson.features, lesson.drawn, row, strict=True):
            encoded = torch.tanh(policy.encoder(seen))
            both = torch.cat([encoded, encoded.mean(0, keepdim=True).expand_as(encoded)], dim=-1)
            soft = torch.softmax((torch.tanh(policy.inner(both)) @ weight.T)[:, 0], 0)
            mixed = (1 - options.exploration) * soft + options.exploration / 3
            terms += [-advantage * mixed[source].log() for source in drawn]
    (gradient,) = torch.autograd.grad(torch.stack(terms).mean(), weight)
    seen_gradients: list[torch.Tensor] = []
    policy.score.weight.register_hook(lambda given: seen_gradients.append(given.clone()))
    own.learn(lessons, rewards)
    torch.testing.assert_close(seen_gradients[0], gradient, rtol=1e-5, atol=1e-8)


def test_learning_rate_zero_moves_nothing_and_what_is_saved_goes_on() -> None:
    still = teacher(OPTIONS.model_copy(update={"learning_rate": 0.0}))
    before = {name: value.clone() for name, value in still.policy.state_dict().items()}
    schooled(still, updates=2)
    assert all(torch.equal(value, before[name]) for name, value in still.policy.state_dict().items())
    first, second = teacher(seed=1), teacher(seed=2)
    schooled(first, updates=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    lessons = [school_lesson(first, torch.Generator().manual_seed(5), good=1) for _ in range(2)]
    assert first.learn(lessons, lesson_rewards(lessons)) == second.learn(lessons, lesson_rewards(lessons))
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_metrics_say_what_moved() -> None:
    own = teacher()
    lessons = [school_lesson(own, torch.Generator().manual_seed(7), good=2) for _ in range(4)]
    metrics = own.learn(lessons, lesson_rewards(lessons))
    assert metrics["entropy"] == pytest.approx(1.0, abs=0.05)  # of its maximum, at the beginning
    assert 0 < metrics["kl"] < 0.5
    assert 0 <= metrics["clip_fraction"] < 1
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_planted_school_is_learned_and_not_by_shuffled_rewards() -> None:
    # The optimum gives everything but the exploration's share to the good source: 0.05·2/3 goes elsewhere.
    shares = [schooled(teacher(seed=seed), updates=30, seed=seed) for seed in range(3)]
    assert min(shares) > 0.85, shares
    control = [schooled(teacher(seed=seed), updates=30, shuffled=True, seed=seed) for seed in range(3)]
    assert sum(control) / 3 < 0.6, control
