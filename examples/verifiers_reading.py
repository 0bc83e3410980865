"""Reading as an environment of verifiers: rollouts of the starter model take turns with it, and GRPO learns from them.

Run: python examples/verifiers_reading.py [number of steps]          (pip install 'preceptor[verifiers]')

prime-rl and other trainers load the same environment: preceptor.environments.verifiers_env.
"""

from __future__ import annotations

import sys

import torch

from preceptor.environments.verifiers_env import generator_client, load_environment
from preceptor.lm.generators.base import OwnGenerator
from preceptor.lm.load import load_language_model
from preceptor.lm.sampling import Sampling
from preceptor.objectives import group_normalised

ROLLOUTS = 8


def main(num_steps: int = 3) -> list[float]:
    env = load_environment("reading", preset="smoke", num_rows=num_steps)
    lm = load_language_model("starter", device=torch.device("cpu"))
    sampling = Sampling(suppressed=lm.never_drawn)
    client = generator_client(
        lm, OwnGenerator(lm), sampling=sampling, num_tokens=6, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW(lm.trainable_parameters().values(), lr=1e-4)
    means = []
    for row in env.get_dataset():
        found = env.generate_sync([row] * ROLLOUTS, client, model="starter", state_columns=["trajectory"])
        rewards = torch.tensor([output["reward"] for output in found["outputs"]])
        losses = []
        for advantage, output in zip(group_normalised(rewards), found["outputs"], strict=True):
            for turn in output["trajectory"]:
                prompt, answer = turn["tokens"]["prompt_ids"], turn["tokens"]["completion_ids"]
                text = torch.tensor([[*prompt, *answer]])
                keep = torch.zeros_like(text, dtype=torch.bool)
                keep[:, len(prompt) - 1 : -1] = True  # position t predicts token t + 1
                log_probs = lm.chosen_log_probs(text, keep=keep, chosen=torch.tensor(answer), sampling=sampling)
                losses.append(-advantage * log_probs.mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        means.append(float(rewards.mean()))
        print(f"reward {means[-1]:.4f} nats a token, spread {float(rewards.std()):.4f}")
    return means


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
