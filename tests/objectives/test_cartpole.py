"""The parts of PPO together, on a task that the field knows: CartPole-v1 in 100,000 steps.

Constants are those that rl-baselines3-zoo publishes for PPO on CartPole-v1 (8 environments, 32 steps, 20 epochs,
γ = 0.98, λ = 0.8, learning rate and clip falling linearly from 0.001 and 0.2); it reports a return of 500.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from preceptor.objectives.advantages import gae
from preceptor.objectives.policy_gradient import ppo_clip_loss
from preceptor.objectives.statistics import whiten
from preceptor.objectives.value import value_loss

gymnasium = pytest.importorskip("gymnasium", reason="CartPole is in gymnasium, of the test extra")

NUM_ENVIRONMENTS, NUM_STEPS, TOTAL_STEPS = 8, 32, 100_000


def network(num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_outputs))


class Actors:
    """Environments that begin again when an episode is over."""

    def __init__(self, seed: int) -> None:
        self.environments = [gymnasium.make("CartPole-v1") for _ in range(NUM_ENVIRONMENTS)]
        self.states = np.stack([e.reset(seed=seed * 100 + i)[0] for i, e in enumerate(self.environments)])

    def step(self, actions: list[int]) -> tuple[np.ndarray, list[float], list[bool], list[bool]]:
        """States after the actions (before a new beginning), rewards, and which episodes fell or were cut."""
        after, rewards, fell, cut = [], [], [], []
        for index, (environment, action) in enumerate(zip(self.environments, actions, strict=True)):
            state, reward, terminated, truncated, _ = environment.step(action)
            after.append(state)
            rewards.append(float(reward))
            fell.append(terminated)
            cut.append(truncated and not terminated)
            self.states[index] = environment.reset()[0] if terminated or truncated else state
        return np.stack(after), rewards, fell, cut


def train(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy, critic = network(2), network(1)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    actors = Actors(seed)
    batch = NUM_ENVIRONMENTS * NUM_STEPS
    for update in range(TOTAL_STEPS // batch):
        left = 1 - update * batch / TOTAL_STEPS
        rows: dict[str, list[Tensor]] = {name: [] for name in ("states", "after", "actions", "rewards", "fell", "cut")}
        with torch.no_grad():
            for _ in range(NUM_STEPS):
                states = torch.tensor(actors.states, dtype=torch.float32)
                actions = torch.multinomial(policy(states).softmax(-1), 1, generator=generator)[:, 0]
                after, rewards, fell, cut = actors.step(actions.tolist())
                for name, value in zip(rows, (states, after, actions, rewards, fell, cut), strict=True):
                    rows[name].append(torch.as_tensor(np.asarray(value)))
            states, after, actions, rewards, fell, cut = (torch.stack(column, dim=1) for column in rows.values())
            mask = torch.ones_like(fell)
            old_log_probs = policy(states).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
            values, next_values = critic(states)[..., 0], critic(after.float())[..., 0].masked_fill(fell, 0.0)
            advantages = gae(
                rewards.float(),
                values,
                mask=mask,
                discount=0.98,
                gae_lambda=0.8,
                next_values=next_values,
                ends_episode=fell | cut,
            )
            returns = advantages + values
        for _ in range(20):
            log_probs = policy(states).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
            loss = ppo_clip_loss(
                log_probs,
                old_log_probs,
                whiten(advantages, mask),
                mask=mask,
                clip_epsilon_low=0.2 * left,
                clip_epsilon_high=0.2 * left,
            ) + value_loss(critic(states)[..., 0], returns, mask=mask)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * left
            optimiser.step()
    return policy


@torch.no_grad()
def mean_return(policy: nn.Sequential, *, num_episodes: int) -> float:
    environment = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(num_episodes):
        state, over, total = environment.reset(seed=10_000 + episode)[0], False, 0.0
        while not over:
            action = int(policy(torch.tensor(state)).argmax())
            state, reward, terminated, truncated, _ = environment.step(action)
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


@pytest.mark.slow
def test_three_seeds_solve_cartpole() -> None:
    returns = [mean_return(train(seed), num_episodes=50) for seed in range(3)]
    assert np.mean(returns) >= 475, returns
