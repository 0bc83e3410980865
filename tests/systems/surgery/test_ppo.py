"""PPO over the sites of any model: it learns what a reward asks for, and by that reward alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from preceptor.errors import CheckpointError
from preceptor.systems.surgery.config import AgentOptions
from preceptor.systems.surgery.ppo import PpoAgent
from preceptor.systems.surgery.site_policy import flat_state
from preceptor.systems.surgery.sites import FEATURE_DIM

SITES, BATCH = 3, 32
OPTIONS = AgentOptions(hidden_dim=32, learning_rate=1e-2)


def shifted_sites(num_sites: int, generator: torch.Generator) -> torch.Tensor:
    features = torch.zeros(num_sites, FEATURE_DIM)
    features[:, 0] = 1
    features[:, 3] = 1.2 * torch.rand(num_sites, generator=generator) - 0.6
    return features


def trained(reward_of: Callable[[torch.Tensor, torch.Tensor], float], *, steps: int = 60) -> PpoAgent:
    draws = torch.Generator().manual_seed(3)
    agent = PpoAgent(OPTIONS, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        for number in range(BATCH):
            features = shifted_sites(1 + number % SITES, draws)
            state = flat_state(features, SITES)
            action = agent.act(state, generator=draws)
            agent.observe(state, action, reward_of(features, action[: len(features)]), state, terminated=True)
        agent.learn(8, generator=draws)
    return agent


def error(agent: PpoAgent) -> float:
    """Mean distance of the mean action from −x, over six sites, twice as many as in training."""
    wider = torch.zeros(6, FEATURE_DIM)
    wider[:, 0] = 1
    wider[:, 3] = torch.linspace(-0.5, 0.5, 6)
    with torch.no_grad():
        action = torch.tanh(agent.actor(wider.flatten()[None])[0, 0, :6])
    return float((action + wider[:, 3]).abs().mean())


def undoing(features: torch.Tensor, action: torch.Tensor) -> float:
    return -float((action + features[:, 3]).square().sum())


def test_it_learns_to_undo_a_shift_of_every_site_and_generalises_to_more_sites() -> None:
    assert error(trained(undoing)) < 0.15  # doing nothing has 0.3


def test_a_reward_of_the_other_sign_teaches_the_opposite() -> None:
    assert error(trained(lambda features, action: -undoing(features, action), steps=20)) > 0.4


def test_the_surgeon_that_is_not_paid_does_not_learn_it() -> None:
    draws = torch.Generator().manual_seed(9)
    assert error(trained(lambda features, action: float(torch.rand(1, generator=draws)), steps=20)) > 0.2


def test_a_loaded_agent_goes_on_as_the_saved_one() -> None:
    saved = trained(undoing, steps=3)
    other = PpoAgent(OPTIONS, generator=torch.Generator().manual_seed(7))
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    results = []
    for agent in (saved, other):
        draws = torch.Generator().manual_seed(11)
        # All of a step's edits are drawn before the first of them is paid.
        states = [flat_state(shifted_sites(2, draws), SITES) for _ in range(4)]
        actions = [agent.act(state, generator=draws) for state in states]
        for state, action in zip(states, actions, strict=True):
            agent.observe(state, action, float(action.sum()), state, terminated=True)
        results.append((agent.learn(2, generator=draws), agent.actor(state[None])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    with pytest.raises(CheckpointError, match="is not this one"):
        other.load_state_dict({"parameters": {}, "optimizer": {}})
