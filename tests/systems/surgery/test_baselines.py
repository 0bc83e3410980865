from __future__ import annotations

import math

import pytest
import torch

from preceptor.runs.tensors import join_state, split_state
from preceptor.systems.surgery.baselines import BestOfNSurgeon, EvolutionSurgeon, RandomSurgeon, SacSurgeon, Surgeon
from preceptor.systems.surgery.policy import ReplayBuffer, SacAgent

STATE = torch.zeros(3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sac(*, shuffled: bool = False, **options: float) -> SacSurgeon:
    agent = SacAgent(
        3,
        2,
        buffer=ReplayBuffer(100, state_dim=3, action_dim=2),
        generator=generator(),
        hidden_dim=8,
        batch_size=4,
        random_steps=2,
        **options,  # type: ignore[arg-type]
    )
    return SacSurgeon(agent, updates_per_edit=2, shuffled=shuffled)


def stored_rewards(surgeon: SacSurgeon) -> list[float]:
    buffer = surgeon._agent.buffer
    draws = buffer.sample(400, generator=generator())
    return sorted(set(draws.rewards.tolist()))


def operate(surgeon: Surgeon, rewards: list[float]) -> list[torch.Tensor]:
    actions = []
    for step, reward in enumerate(rewards):
        action = surgeon.propose(STATE + step, generator=generator(step))
        surgeon.observe(STATE + step, action, reward, committed=False, generator=generator(100 + step))
        actions.append(action)
    return actions


def test_sac_is_paid_in_units_of_the_running_root_mean_square() -> None:
    # To catch: the deviation from the mean, which would pay a bad edit among worse ones.
    surgeon = sac()
    operate(surgeon, [0.003, -0.004, 0.0, 0.0])
    expected = [1.0, -0.004 / math.sqrt((0.003**2 + 0.004**2) / 2), 0.0]
    assert stored_rewards(surgeon) == pytest.approx(sorted(expected), rel=1e-6)


def test_a_transition_leads_to_the_next_state_and_never_ends() -> None:
    surgeon = sac()
    operate(surgeon, [0.1, 0.2, 0.3])
    found = surgeon._agent.buffer.sample(50, generator=generator())
    assert torch.equal(found.next_states, found.states + 1)
    assert not found.terminated.any()


def test_rewards_that_are_all_zero_pay_nothing() -> None:
    surgeon = sac()
    operate(surgeon, [0.0, 0.0])
    assert stored_rewards(surgeon) == [0.0]


def test_shuffled_rewards_are_the_same_rewards_elsewhere() -> None:
    rewards = [float(n) for n in range(1, 41)]
    true, shuffled = sac(), sac(shuffled=True)
    operate(true, [*rewards, 0.0])
    operate(shuffled, [*rewards, 0.0])
    # Undo the scale, which is the same for both: it is that of the true rewards.
    squares = [sum(r**2 for r in rewards[: n + 1]) / (n + 1) for n in range(40)]
    buffer = shuffled._agent.buffer.sample(2000, generator=generator())
    steps = buffer.states[:, 0].long().tolist()
    paid = {
        step: reward * math.sqrt(squares[step]) for step, reward in zip(steps, buffer.rewards.tolist(), strict=True)
    }
    assert all(round(reward) in range(1, step + 2) for step, reward in paid.items())
    agreeing = sum(round(reward) == step + 1 for step, reward in paid.items())
    assert agreeing < 10  # Σ 1/n = 4.3 are expected of 40


def test_random_edits_are_as_large_as_their_actions() -> None:
    actions = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0]])
    surgeon = RandomSurgeon(actions)
    for model, action in zip(actions, operate(surgeon, [1.0, 1.0]), strict=True):
        assert action.abs().sort().values.tolist() == model.sort().values.tolist()
    found = torch.stack([RandomSurgeon(actions).propose(STATE, generator=generator(seed)) for seed in range(2000)])
    assert found.mean(0).abs().max() < 0.04  # four standard errors of √(0.11 / 2000)


def test_evolution_follows_the_one_fifth_rule() -> None:
    # To catch: growth and shrinkage exchanged.
    surgeon = EvolutionSurgeon(2, standard_deviation=0.3)
    for committed in (True, False, False, False, False):
        surgeon.observe(STATE, torch.zeros(2), 1.0, committed=committed, generator=generator())
    assert surgeon.metrics()["standard_deviation"] == pytest.approx(0.3)
    for _ in range(100):
        surgeon.observe(STATE, torch.zeros(2), 1.0, committed=False, generator=generator())
    assert surgeon.metrics()["standard_deviation"] == 0.1


def test_evolution_climbs_a_hill() -> None:
    """On −‖x − 1‖² in ten dimensions, with commits of what improves, it comes near the top."""
    surgeon, place = EvolutionSurgeon(10), torch.zeros(10)
    for step in range(400):
        action = surgeon.propose(STATE, generator=generator(step))
        reward = float((place - 1).square().sum() - (place + action - 1).square().sum())
        committed = surgeon.candidate(action, reward) is not None
        place = place + action if committed else place
        surgeon.observe(STATE, action, reward, committed=committed, generator=generator(step))
    assert (place - 1).square().sum() < 0.1  # from 10; steps of a tenth go no further


def test_best_of_n_names_the_best_of_each_round() -> None:
    surgeon = BestOfNSurgeon(1, n=3)
    actions = [torch.tensor([float(n)]) for n in range(7)]
    named = [surgeon.candidate(*pair) for pair in zip(actions, [0.1, 0.5, 0.2, -1.0, -2.0, -3.0, 0.9], strict=True)]
    assert named == [None, None, actions[1], None, None, None, None]


def test_only_what_earned_something_is_tested() -> None:
    for surgeon in (sac(), RandomSurgeon(torch.ones(1, 2)), EvolutionSurgeon(2)):
        assert surgeon.candidate(torch.ones(2), 0.1) is not None
        assert surgeon.candidate(torch.ones(2), 0.0) is None


@pytest.mark.parametrize("kind", ["sac", "shuffled", "random", "evolution", "best_of_n"])
def test_a_surgeon_goes_on_as_it_would_have(kind: str) -> None:
    makers = {
        "sac": sac,
        "shuffled": lambda: sac(shuffled=True),
        "random": lambda: RandomSurgeon(torch.rand(9, 2, generator=generator())),
        "evolution": lambda: EvolutionSurgeon(2),
        "best_of_n": lambda: BestOfNSurgeon(2, n=4),
    }
    first, second = makers[kind](), makers[kind]()
    operate(first, [0.1, -0.2, 0.3, 0.1, 0.2])
    first.candidate(torch.tensor([0.5, 0.5]), 0.7)
    second.load_state_dict(join_state(*split_state(first.state_dict())))
    assert first.metrics() == second.metrics()
    if isinstance(first, SacSurgeon):
        # What the next reward is paid in depends on all before it; the agent hears of it at the proposal after.
        operate(first, [0.4, 0.0])
        operate(second, [0.4, 0.0])  # type: ignore[arg-type]
        assert stored_rewards(first) == stored_rewards(second)  # type: ignore[arg-type]
    for rewards in ([0.2, 0.1, -0.1], [0.3]):
        for one, other in zip(operate(first, rewards), operate(second, rewards), strict=True):
            assert torch.equal(one, other)


def test_sac_finds_the_better_half() -> None:
    """Paid for one number of the action, a hundredth of a unit at most, its edits come to lie where it pays."""
    surgeon, actions = sac(learning_rate=1e-2, discount=0.0, initial_temperature=0.2), []
    for step in range(150):
        action = surgeon.propose(STATE, generator=generator(step))
        surgeon.observe(STATE, action, 0.01 * float(action[0]), committed=False, generator=generator(1000 + step))
        actions.append(float(action[0]))
    assert sum(actions[-50:]) / 50 > 0.3
