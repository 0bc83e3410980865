"""The study as an environment of Gymnasium, and a policy of one weight per similarity, trained with REINFORCE.

Run: python examples/gymnasium_study.py [number of updates]
"""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import torch

import preceptor.environments  # noqa: F401  # registers the environments

EPISODES = 16


def main(num_updates: int = 8) -> list[float]:
    env = gymnasium.make("Preceptor/Study-v0", mode="asked", overrides={"study.judged_by": "table"})
    weights = torch.zeros(env.observation_space["query_channels"].shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    means = []
    for update in range(num_updates):
        rewards, log_probs = [], []
        for episode in range(EPISODES):
            observation, info = env.reset(seed=EPISODES * update + episode)
            total, over = torch.zeros(()), False
            while not over:
                scores = torch.from_numpy(observation["query_channels"]) @ weights  # [candidates]
                scores = scores.masked_fill(torch.from_numpy(info["action_mask"]) == 0, -torch.inf)
                action = torch.multinomial(scores.softmax(0), 1, generator=generator)
                total = total + scores.log_softmax(0)[action[0]]
                observation, reward, over, _, info = env.step(np.int64(action.item()))
            rewards.append(reward)  # of the whole episode: before its last step an environment pays 0
            log_probs.append(total)
        advantages = torch.tensor(rewards) - np.mean(rewards)
        optimizer.zero_grad()
        (-(advantages * torch.stack(log_probs)).mean()).backward()
        optimizer.step()
        means.append(float(np.mean(rewards)))
        print(f"update {update + 1}: gain {means[-1]:.4f} nats a token, weights {weights.detach().numpy().round(2)}")
    return means


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
