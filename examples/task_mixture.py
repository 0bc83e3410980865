"""Which tasks, and how hard, should the next batch of your own RL loop be? A rule decides; the loop is yours.

    python examples/task_mixture.py                          # the window of the highest levels reached
    python examples/task_mixture.py --rule success_variance
    python examples/task_mixture.py --policy runs/teacher    # a teacher trained by: run curriculum --preset teacher

The student here is six lines: each level is learned by groups that are partly right, and helps the level above it.
Put your sampler, verifier and update in their place; what a rule needs of them is one `Groups` a batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from preceptor.mixtures import Groups, TaskMixture, load_teacher, make_task_mixture

LEVELS, GROUPS, GROUP_SIZE = 6, 8, 8


def steps_to_learn(mixture: TaskMixture, generator: torch.Generator) -> int:
    """Batches until the mean success over all levels is 0.8 (at most 5,000)."""
    skill = torch.zeros(LEVELS, dtype=torch.float64)
    for step in range(5000):
        below = torch.cat([torch.full((1,), 3.0), skill[:-1].float()])
        success = torch.sigmoid(skill - 4 + 0.8 * below.clamp(max=4))  # [levels]
        if success.mean() >= 0.8:
            return step
        # Your loop: draw levels by the weights, write answers, verify them, update the policy.
        drawn = torch.multinomial(mixture.weights, GROUPS, replacement=True, generator=generator)
        rates = torch.binomial(torch.full((GROUPS,), float(GROUP_SIZE)), success[drawn].float(), generator=generator)
        rates = (rates / GROUP_SIZE).double()
        skill.index_add_(0, drawn, 0.6 * rates * (1 - rates))
        # The rule: which level each group was of, the share that was right, the mean absolute advantage.
        advantages = 2 * (rates * (1 - rates)).sqrt()
        mixture.update(Groups(drawn, rates, advantages, size=GROUP_SIZE), progress=step / 5000)
    return 5000


def main() -> None:
    """Prints the batches that uniform weights and the rule take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="frontier_range")
    parser.add_argument("--policy", type=Path, help="run folder of a trained teacher")
    chosen = parser.parse_args()
    policy = load_teacher(chosen.policy) if chosen.policy else None
    rule = "learned" if policy else chosen.rule
    for name, own in (("uniform", None), (rule, policy)):
        mixture = make_task_mixture(name, num_levels=[LEVELS], policy=own)
        print(f"{name}: {steps_to_learn(mixture, torch.Generator().manual_seed(0))} batches to a success of 0.8")


if __name__ == "__main__":
    main()
