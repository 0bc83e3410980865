"""Rollouts with all that the update needs, sampled and scored by the processes of a run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.lm.generators.base import Generator
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.runs.world import World
from preceptor.systems.curriculum.engines import corrected
from preceptor.systems.curriculum.loss import autocast
from preceptor.systems.curriculum.policy import Prompt, Rollouts, generate_rollouts, rollout_log_probs
from preceptor.systems.curriculum.ppo_config import PPOOptions
from preceptor.systems.curriculum.rewards import Rewards, RewardTerm, score_rollouts
from preceptor.systems.curriculum.value_network import ValueNetwork


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts and what the frozen networks say of them.

    Attributes:
        rollouts, rewards: as sampled, and what they earned.
        reference_log_probs: of the sampled tokens under the reference model, nats.
        values: of the value network; None without one.
        metrics: of the audit of another engine.
    """

    rollouts: Rollouts
    rewards: Rewards
    reference_log_probs: Float[Tensor, "batch token"]
    values: Float[Tensor, "batch token"] | None
    metrics: dict[str, float]


@torch.no_grad()
def scored_rollouts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    num_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    terms: Sequence[RewardTerm],
    reference_model: LanguageModel,
    value_network: ValueNetwork | None = None,
    bf16: bool = False,
    rescore: bool = False,
    engine: Generator | None = None,
    options: PPOOptions | None = None,
    world: World,
) -> ScoredRollouts:
    """``group_size`` continuations of every prompt with their rewards; each process has some of the prompts.

    Args:
        lm: the policy.
        prompts: what it continues.
        group_size: continuations of each prompt.
        num_tokens: tokens of a continuation, at most.
        sampling: the distribution to sample from.
        generator: of the samples.
        terms: of the reward; a user's function is called with the continuations of this process.
        reference_model: of the KL.
        value_network: asked about what counts, if there is one.
        bf16: compute in bfloat16.
        rescore: record the scorer's log-probabilities and not the sampler's.
        engine: writes the rollouts, in a world of one process; None is the policy's own decoder.
        options: how far the engine may be from the policy, where there is one.
        world: the processes of the run.
    """
    metrics: dict[str, float] = {}

    def computed(rows: slice) -> list[Tensor]:
        own = prompts[rows]
        with autocast(lm, bf16):
            rollouts = generate_rollouts(  # [prompts · group_size, num_tokens]
                lm,
                own,
                group_size=group_size,
                num_tokens=num_tokens,
                sampling=sampling,
                generator=world.stream(generator, rows, len(prompts), each=group_size),
                engine=engine,
            )
            if engine is not None:
                assert options is not None, "an engine has its bounds"
                rollouts, found = corrected(rollouts, lm, sampling=sampling, engine=engine, options=options)
                metrics.update(found)
            elif rescore:
                rollouts = replace(rollouts, log_probs=rollout_log_probs(lm, rollouts, sampling))
        rewards = score_rollouts(rollouts, terms)
        usable = rollouts.without(~rewards.finite_rows.to(rollouts.mask.device))
        with autocast(lm, bf16):
            reference = rollout_log_probs(reference_model, usable, sampling)
            values = None if value_network is None else value_network(usable)
        tensors = [rollouts.tokens, rollouts.mask, rollouts.log_probs, rollouts.entropy, rewards.tokens, reference]
        tensors += rewards.terms.values()
        tensors += [] if values is None else [values]
        tensors += [] if rollouts.weights is None else [rollouts.weights]
        # A row of what is gathered is a prompt, so that a group stays in one process.
        return [each.unflatten(0, (len(own), group_size)) for each in tensors]

    tensors = [each.flatten(0, 1) for each in world.gathered(len(prompts), computed)]
    tokens, mask, log_probs, entropy, reward_tokens, reference_log_probs, *rest = tensors
    names = list(dict.fromkeys(term.name for term in terms))
    after = rest[len(names) :]  # values and weights, where there are any
    return ScoredRollouts(
        rollouts=Rollouts(
            prompts=tuple(prompt for prompt in prompts for _ in range(group_size)),
            tokens=tokens,
            mask=mask,
            log_probs=log_probs,
            entropy=entropy,
            weights=None if engine is None else after[-1],
        ),
        rewards=Rewards(reward_tokens, dict(zip(names, rest[: len(names)], strict=True))),
        reference_log_probs=reference_log_probs,
        values=None if value_network is None else after[0],
        metrics=metrics,
    )
