"""Bandit algorithms: by hand on tables without chance, against a slow loop, and against published curves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from preceptor.systems.bandit.baselines import (
    gradient_bandit,
    greedy,
    play_all,
    posterior_draws,
    thompson,
    ucb1,
    uniform,
)
from preceptor.systems.bandit.environment import BanditFamily


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def certain(*pays: float, pulls: int = 12) -> Tensor:
    """One run in which every arm always pays the same."""
    return torch.tensor(pays, dtype=torch.float64).expand(1, pulls, len(pays)).contiguous()


def test_greedy_tries_every_arm_once_and_stays_with_the_best() -> None:
    pulls = greedy(certain(0.2, 0.9, 0.1), generator=generator())[0].tolist()
    assert sorted(pulls[:3]) == [0, 1, 2]
    assert set(pulls[3:]) == {1}


def test_ucb1_pulls_by_mean_and_bonus() -> None:
    """Arms that pay 1 and 0: by hand the second is next when sqrt(2 ln t / n₁) exceeds 1 + sqrt(2 ln t / n₀)."""
    pulls = ucb1(certain(1.0, 0.0, pulls=60), generator=generator())[0].tolist()
    counts, expected = [0, 0], []
    for pull in range(60):
        if pull < 2:
            arm = pulls[pull]
        else:
            index = [
                mean + math.sqrt(2 * math.log(pull) / count) for mean, count in zip((1.0, 0.0), counts, strict=True)
            ]
            arm = index.index(max(index))
        counts[arm] += 1
        expected.append(arm)
    assert pulls == expected
    assert 2 < pulls.count(1) < 12


def test_uniform_is_uniform() -> None:
    pulls = uniform(certain(1.0, 0.0, 0.0, 0.0, pulls=40_000), generator=generator())
    assert torch.bincount(pulls[0]).tolist() == pytest.approx([10_000] * 4, abs=260)  # three standard deviations


def test_thompson_draws_an_arm_as_often_as_it_is_the_best_of_its_posterior() -> None:
    """Beta(1, 1) against Beta(1, 1) is a fair coin; after (1 success) against (1 failure) it is Beta(2, 1) against
    Beta(1, 2): P(x > y) = ∫ 2x (1 − (1 − x)²) dx = 5/6."""
    table = certain(1.0, 0.0, pulls=1).expand(30_000, 1, 2)
    assert thompson(table, generator=generator()).double().mean().item() == pytest.approx(0.5, abs=0.01)
    table = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64).expand(60_000, 3, 2)
    pulls = thompson(table, generator=generator())
    both = pulls[:, :2].sum(1) == 1  # each arm once
    assert 1 - pulls[both, 2].double().mean().item() == pytest.approx(5 / 6, abs=0.01)


def test_gradient_bandit_is_the_textbook_loop() -> None:
    table = torch.randn(3, 40, 4, dtype=torch.float64, generator=generator(1))
    for baseline in (True, False):
        pulls = gradient_bandit(table, generator=generator(5), step_size=0.3, baseline=baseline)
        draws = generator(5)
        preferences, means = [[0.0] * 4 for _ in range(3)], [0.0] * 3
        for pull in range(40):
            policies = [
                [math.exp(h) / sum(map(math.exp, preferences[run])) for h in preferences[run]] for run in range(3)
            ]
            arms = torch.multinomial(torch.tensor(policies, dtype=torch.float64), 1, generator=draws)[:, 0].tolist()
            assert arms == pulls[:, pull].tolist()
            for run, arm in enumerate(arms):
                reward = float(table[run, pull, arm])
                means[run] += (reward - means[run]) / (pull + 1)
                advantage = reward - means[run] * baseline
                for other in range(4):
                    preferences[run][other] += 0.3 * advantage * ((other == arm) - policies[run][other])


SUTTON = [(0.1, True, 84.2), (0.4, True, 73.5), (0.1, False, 48.5), (0.4, False, 29.3)]


@pytest.mark.slow
@pytest.mark.parametrize(("step_size", "baseline", "expected"), SUTTON)
def test_gradient_bandit_reproduces_sutton_and_barto(step_size: float, baseline: bool, expected: float) -> None:
    """Figure 2.5: 10 arms of mean N(4, 1), noise N(0, 1); optimal actions in the last 100 of 1,000 pulls.

    The expected figures are another implementation's over 2,000 runs, whose standard error is up to 1.1 points; here
    8,000 runs have half of that, so the two may differ by 3 · sqrt(1.1² + 0.55²) = 3.7 points by chance alone. The bar
    is 2.
    """
    source = generator(0)
    means = 4 + torch.randn(8000, 1, 10, generator=source, dtype=torch.float64)
    table = means + torch.randn(8000, 1000, 10, generator=source, dtype=torch.float64)
    pulls = gradient_bandit(table, generator=source, step_size=step_size, baseline=baseline)
    optimal = (pulls == means[:, 0].argmax(-1)[:, None]).double()
    assert 100 * optimal[:, -100:].mean().item() == pytest.approx(expected, abs=2.0)


def test_the_order_of_merit_on_the_predecessors_bandit() -> None:
    """750 to 250 in 1,000 pulls, 300 runs: Thompson below UCB1 below uniform, as published."""
    table = (torch.rand(300, 1000, 2, dtype=torch.float64, generator=generator()) < torch.tensor([0.75, 0.25])).double()
    expected = torch.tensor([0.75, 0.25]).double().expand(300, 2)
    played = play_all(table, expected, kind="bernoulli", deviation=1.0, generator=generator(1))
    regret = {method: ((pulls == 1).double().sum(1) * 0.5).mean().item() for method, pulls in played.items()}
    assert regret["optimum"] == 0
    assert regret["thompson"] == pytest.approx(4.35, abs=0.6)
    assert regret["ucb1"] == pytest.approx(18.2, abs=1.0)
    assert regret["uniform"] == pytest.approx(250, abs=3)
    assert regret["gradient_bandit"] < regret["uniform"] / 3


def test_ties_are_broken_at_random() -> None:
    firsts = {greedy(certain(0.0, 0.0, 0.0), generator=generator(seed))[0, 0].item() for seed in range(20)}
    assert firsts == {0, 1, 2}


def test_posteriors_of_several_draws_a_round_are_each_drawn_apart() -> None:
    """One arm pays 3/4, the other 1/4. After a success of the first it is the good one with probability 3/4."""
    family = BanditFamily(prior="three_in_four")
    sums, counts = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # [round, arm]
    shape = (2000, 3, *sums.shape)  # [draw, episode, round, arm]
    draws = posterior_draws(family, sums.expand(shape), counts.expand(shape), torch.Generator().manual_seed(0))
    assert draws.shape == shape
    assert torch.equal(draws.sum(-1), torch.ones(shape[:-1]))
    first_is_good = (draws[..., 0] == 0.75).double().mean(0)  # [episode, round]
    torch.testing.assert_close(first_is_good[:, 0], torch.full((3,), 0.75).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(first_is_good[:, 1], torch.full((3,), 0.5).double(), atol=0.04, rtol=0)
