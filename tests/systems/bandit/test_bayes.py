"""The exact optimum against arithmetic by hand, a search without tables, and its published value."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from preceptor.systems.bandit.bayes import (
    TIE,
    OptimalPlayer,
    best_arm_probabilities,
    expected_best_of_two,
)
from preceptor.systems.bandit.environment import BanditFamily


def slow_value(horizon: int, a: int = 1, b: int = 1) -> Fraction:
    """The optimal sum of rewards by searching the tree of all histories, in exact fractions."""

    @cache
    def value(left: int, counts: tuple[int, int, int, int]) -> Fraction:
        if left == 0:
            return Fraction(0)
        worths = []
        for arm in (0, 1):
            successes, failures = counts[2 * arm], counts[2 * arm + 1]
            p = Fraction(successes + a, successes + failures + a + b)
            won, lost = list(counts), list(counts)
            won[2 * arm] += 1
            lost[2 * arm + 1] += 1
            worths.append(p * (1 + value(left - 1, tuple(won))) + (1 - p) * value(left - 1, tuple(lost)))  # type: ignore[arg-type]
        return max(worths)

    return value(horizon, (0, 0, 0, 0))


def test_two_pulls_by_hand() -> None:
    # The first pull pays 1/2. After a success (1/2) the arm's mean is 2/3: stay. After a failure it is 1/3 and the
    # other's still 1/2: switch. 1/2 + 1/2 · 2/3 + 1/2 · 1/2 = 13/12; knowing the better arm would earn 2 · 2/3.
    player = OptimalPlayer(2)
    assert player.value == pytest.approx(13 / 12)
    assert player.regret == pytest.approx(4 / 3 - 13 / 12, abs=1e-6)
    assert player.decisions[0][0, 0, 0] == TIE
    assert player.decisions[1][1, 0, 0] == 0, "a success of arm 0"
    assert player.decisions[1][0, 1, 0] == 1, "a failure of arm 0"
    assert player.decisions[1][0, 0, 1] == 1, "a success of arm 1"
    assert player.decisions[1][0, 0, 0] == 0, "a failure of arm 1: the fourth count follows from the pulls"


@pytest.mark.parametrize(("horizon", "a", "b"), [(1, 1, 1), (3, 1, 1), (8, 1, 1), (7, 2, 8)])
def test_the_value_is_that_of_a_search_over_all_histories(horizon: int, a: int, b: int) -> None:
    assert OptimalPlayer(horizon, a=a, b=b).value == pytest.approx(float(slow_value(horizon, a, b)), abs=1e-12)


def test_the_optimum_of_a_hundred_pulls() -> None:
    player = OptimalPlayer(100)
    assert player.regret == pytest.approx(1.748, abs=1e-3)
    tables = BanditFamily().sample(2000, 100, torch.Generator().manual_seed(0))
    actions = player.play(tables.rewards, generator=torch.Generator().manual_seed(0))
    regret = (tables.expected.amax(1, keepdim=True) - tables.expected.gather(1, actions)).sum(1)
    # Three standard errors: what it plays is worth what its tables say.
    assert float(regret.mean()) == pytest.approx(player.regret, abs=3 * float(regret.std()) / 2000**0.5)


def test_a_player_that_forgets_the_future_is_worse() -> None:
    """A planted fault: without the value of what a pull teaches, the best player is the greedy one."""

    class Myopic(OptimalPlayer):
        def _action_values(self, t: int, following: np.ndarray) -> np.ndarray:
            return super()._action_values(t, np.zeros_like(following))

    tables = BanditFamily().sample(2000, 100, torch.Generator().manual_seed(1))

    def regret(player: OptimalPlayer) -> float:
        actions = player.play(tables.rewards, generator=torch.Generator().manual_seed(0))
        return float((tables.expected.amax(1, keepdim=True) - tables.expected.gather(1, actions)).sum(1).mean())

    assert regret(Myopic(100)) > 1.5 * regret(OptimalPlayer(100))


def test_the_player_sees_only_what_it_pulls() -> None:
    tables = BanditFamily().sample(50, 12, torch.Generator().manual_seed(2))
    player = OptimalPlayer(12)
    actions = player.play(tables.rewards, generator=torch.Generator().manual_seed(0))
    others = torch.ones_like(tables.rewards, dtype=torch.bool).scatter(2, actions[..., None], False)
    changed = torch.where(others, 1 - tables.rewards, tables.rewards)
    assert torch.equal(player.play(changed, generator=torch.Generator().manual_seed(0)), actions)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 8.0), (3.0, 2.0)])
def test_the_mean_of_the_better_arm_by_sampling(a: float, b: float) -> None:
    draws = stats.beta(a, b).rvs((400_000, 2), random_state=0).max(1)
    assert expected_best_of_two(a, b) == pytest.approx(draws.mean(), abs=4 * draws.std() / 400_000**0.5)


def test_beliefs_by_hand_and_by_sampling() -> None:
    # One success of arm 0 against nothing: P(p0 > p1) = ∫ 2x · x dx = 2/3.
    known = best_arm_probabilities(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
    torch.testing.assert_close(known[:, 0], torch.tensor([2 / 3, 0.5], dtype=torch.float64), atol=1e-5, rtol=0)
    successes, failures = torch.tensor([7.0, 3.0, 0.0]), torch.tensor([5.0, 1.0, 2.0])
    generator = np.random.default_rng(0)
    draws = generator.beta(1 + successes.numpy(), 1 + failures.numpy(), (200_000, 3)).argmax(1)
    shares = np.bincount(draws, minlength=3) / len(draws)
    assert best_arm_probabilities(successes, failures).numpy() == pytest.approx(shares, abs=0.005)
