"""The surgeon's SAC beside stable-baselines3's on Pendulum-v1: the same seeds, settings and evaluation starts.

    python -m benchmarks.pendulum --seeds 10 --out build/pendulum.jsonl

Both learn from 256 transitions an update for 20,000 steps, with networks of width 256 and a learning rate of 1e-3, and
their last policy is measured by the mean of its actions over 100 fixed starts. A (agent, seed) that the file holds is
not run again. stable-baselines3 is no dependency of the project: pip install --no-deps stable-baselines3 cloudpickle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preceptor.systems.surgery.policy import ReplayBuffer, SacAgent

STEPS, WIDTH, BATCH_SIZE, LEARNING_RATE, RANDOM_STEPS = 20_000, 256, 256, 1e-3, 100
STARTS = range(10_000, 10_100)
OPTIMUM = -126.3
"""Mean return of dynamic programming on a fine grid over the same starts."""

Act = Callable[[Any], Any]
"""From an observation to an action in [-2, 2]."""


def ours(seed: int, *, steps: int = STEPS) -> Act:
    """The policy of our agent after ``steps`` steps."""
    import gymnasium

    world = gymnasium.make("Pendulum-v1")
    generator = torch.Generator().manual_seed(seed)
    agent = SacAgent(
        3,
        1,
        buffer=ReplayBuffer(STEPS, state_dim=3, action_dim=1),
        generator=torch.Generator().manual_seed(seed),
        learning_rate=LEARNING_RATE,
        hidden_dim=WIDTH,
        batch_size=BATCH_SIZE,
        random_steps=RANDOM_STEPS,
    )
    state = torch.from_numpy(world.reset(seed=seed)[0])
    for step in range(steps):
        action = agent.act(state, generator=generator)
        observed, reward, terminated, truncated, _ = world.step(2 * action.numpy())
        next_state = torch.from_numpy(observed)
        agent.observe(state, action, float(reward), next_state, terminated=terminated)
        state = torch.from_numpy(world.reset()[0]) if terminated or truncated else next_state
        if step >= RANDOM_STEPS:
            agent.update(generator=generator)
    return lambda seen: 2 * agent.act(torch.from_numpy(seen), generator=generator, deterministic=True).numpy()


def theirs(seed: int, *, steps: int = STEPS) -> Act:
    """The policy of stable-baselines3's SAC after as many steps and updates."""
    from stable_baselines3 import SAC

    model = SAC(
        "MlpPolicy",
        "Pendulum-v1",
        learning_rate=LEARNING_RATE,
        buffer_size=STEPS,
        learning_starts=RANDOM_STEPS,
        batch_size=BATCH_SIZE,
        policy_kwargs={"net_arch": [WIDTH, WIDTH]},
        seed=seed,
        device="cpu",
    )
    model.learn(total_timesteps=steps)
    return lambda seen: model.predict(seen, deterministic=True)[0]


AGENTS: dict[str, Callable[..., Act]] = {"ours": ours, "stable-baselines3": theirs}


def mean_return(act: Act, starts: Sequence[int] = STARTS) -> float:
    """Over one episode from each of ``starts``."""
    import gymnasium

    world, returns = gymnasium.make("Pendulum-v1"), []
    for start in starts:
        observed, done, total = world.reset(seed=start)[0], False, 0.0
        while not done:
            observed, reward, terminated, truncated, _ = world.step(np.asarray(act(observed)))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return statistics.fmean(returns)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the file lacks, then says how the two are spread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pendulum")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--agents", default=",".join(AGENTS), metavar="A,B")
    parser.add_argument("--out", type=Path, default=Path("build/pendulum.jsonl"), metavar="FILE")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    for seed in range(given.seeds):
        for agent in given.agents.split(","):
            if any((row["agent"], row["seed"], row["steps"]) == (agent, seed, given.steps) for row in rows):
                continue
            began = time.perf_counter()
            found = mean_return(AGENTS[agent](seed, steps=given.steps))
            rows.append({"agent": agent, "seed": seed, "steps": given.steps, "return": found})
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{agent}, seed {seed}: {found:.1f} after {time.perf_counter() - began:.0f} s", flush=True)
    for agent in given.agents.split(","):
        returns = sorted(row["return"] for row in rows if row["agent"] == agent and row["steps"] == given.steps)
        listed = ", ".join(f"{value:.1f}" for value in returns)
        print(f"{agent}: mean {statistics.fmean(returns):.1f}, lowest first {listed}; the optimum is {OPTIMUM}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
