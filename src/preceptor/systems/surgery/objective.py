"""The objectives of next-token learning behind one interface: logits and targets in, a loss and a reward out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from preceptor.objectives.kl import kl_exact
from preceptor.objectives.next_token import (
    avatarl_loss,
    expected_reward_loss,
    next_token_rewards,
    sampled_reward_loss,
)
from preceptor.systems.surgery.config import LearningOptions


class Judged(NamedTuple):
    """A batch under an objective: ``loss`` carries gradient; ``reward`` is what the policy earns on average."""

    loss: Float[Tensor, ""]
    reward: float


def needs_referee(learning: LearningOptions) -> bool:
    """Whether the objective asks the referee at every position."""
    if learning.objective in ("avatarl", "distil"):
        return True
    return learning.objective in ("sampled", "expected") and learning.partial_reward > 0


def judge(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    *,
    referee_probs: Float[Tensor, "batch time vocab"] | None,
    learning: LearningOptions,
    generator: torch.Generator,
) -> Judged:
    """The objective's loss, and Σ_a π(a) (1[a = y] + c · p_referee(a)), the mean over all positions.

    Args:
        logits: of the student.
        targets: the true next tokens.
        referee_probs: where :func:`needs_referee` asks for them.
        learning: which objective, and its numbers.
        generator: draws the groups of ``sampled``, on the CPU.
    """
    reward = _mean_reward(logits.detach(), targets, referee_probs, learning)
    if learning.objective == "cross_entropy":
        return Judged(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), reward)
    if learning.objective in ("avatarl", "distil"):
        assert referee_probs is not None
        if learning.objective == "avatarl":
            return Judged(avatarl_loss(logits, targets, referee_probs=referee_probs), reward)
        return Judged(kl_exact(referee_probs.log(), logits).mean(), reward)
    rewards = next_token_rewards(
        logits,
        targets,
        referee_probs=referee_probs,
        partial_reward=learning.partial_reward,
        confidence_penalty=learning.confidence_penalty,
    )
    if learning.objective == "expected":
        return Judged(expected_reward_loss(logits, rewards), reward)
    probs = logits.detach().softmax(-1).flatten(0, 1).cpu()
    samples = torch.multinomial(probs, learning.group_size, replacement=True, generator=generator)
    samples = samples.view(*targets.shape, learning.group_size).to(logits.device)
    return Judged(sampled_reward_loss(logits, rewards, samples=samples, advantage=learning.advantage), reward)


def _mean_reward(logits: Tensor, targets: Tensor, referee_probs: Tensor | None, learning: LearningOptions) -> float:
    probs = logits.softmax(-1)
    reward = probs.gather(-1, targets[..., None]).mean()
    if referee_probs is not None and learning.objective in ("sampled", "expected"):
        reward = reward + learning.partial_reward * (probs * referee_probs).sum(-1).mean()
    return float(reward)
