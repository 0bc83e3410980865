"""What is measured on the way: the loss on held-out rows, the reward on held-out prompts, and test prompts to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from preceptor.errors import NumericError
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.score import token_log_probs
from preceptor.objectives.kl import kl_k3
from preceptor.objectives.statistics import masked_mean
from preceptor.systems.curriculum.material import Corpus, evenly, prompt_of
from preceptor.systems.curriculum.rewards import RewardTerm, score, usable_rows
from preceptor.systems.curriculum.rollout import (
    Prompt,
    end_token,
    generate_rollouts,
    rollout_log_probs,
    rollout_sampling,
)


def validation_losses(lm: LanguageModel, corpora: Sequence[Corpus], *, num_rows: int) -> dict[str, float]:
    """Cross-entropy on at most ``num_rows`` held-out rows of each dataset, nats per token; no gradient."""
    rows = {corpus.name: evenly(corpus.validation, num_rows) for corpus in corpora}
    flat = [row for of_dataset in rows.values() for row in of_dataset]
    log_probs = iter(token_log_probs(lm, flat, spans=[[(1, len(row))] for row in flat]))
    losses = {}
    for name, of_dataset in rows.items():
        scored = torch.cat([next(log_probs) for _ in of_dataset])
        losses[name] = -float(scored.double().mean())
    return losses


def macro_mean(losses: Mapping[str, float], corpora: Sequence[Corpus]) -> float:
    """The mean over the datasets that are targets, each with the same weight."""
    targets = [losses[corpus.name] for corpus in corpora if corpus.target]
    return sum(targets) / len(targets)


@dataclass(frozen=True)
class HeldOutRewards:
    """What the policy earns on held-out prompts.

    Attributes:
        reward: mean weighted sum of the terms.
        terms: mean of each term.
        kl: KL to the reference, k3, nats per token.
    """

    reward: float
    terms: dict[str, float]
    kl: float


def held_out_prompts(
    corpora: Sequence[Corpus], *, num_prompts: int, prompt_tokens: int, continuation_tokens: int
) -> list[Prompt]:
    """The beginnings of validation documents of the targets, taken from each in turn."""
    targets = [corpus for corpus in corpora if corpus.target]
    prompts = []
    for number in range(num_prompts):
        corpus = targets[number % len(targets)]
        documents = corpus.validation_documents
        prompts.append(
            prompt_of(
                corpus.name,
                documents[number // len(targets) % len(documents)],
                prompt_tokens=prompt_tokens,
                continuation_tokens=continuation_tokens,
            )
        )
    return prompts


@torch.no_grad()
def held_out_rewards(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    terms: Sequence[RewardTerm],
    *,
    reference: LanguageModel,
    num_tokens: int,
    temperature: float,
    seed: int,
) -> HeldOutRewards:
    """Rewards and KL of one continuation of each prompt; the same random numbers at every call.

    Raises:
        NumericError: not one of the rewards is finite.
    """
    sampling = rollout_sampling(lm, temperature)
    rollouts = generate_rollouts(
        lm,
        prompts,
        group_size=1,
        num_tokens=num_tokens,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
    )
    rewards = score(rollouts, terms)
    usable = usable_rows(rewards)
    if not usable.any():
        raise NumericError("every reward on held-out prompts is NaN or infinite; look at `ppo.rewards`")
    reference_log_probs = rollout_log_probs(reference, rollouts, sampling)
    return HeldOutRewards(
        reward=float(rewards.total[usable].double().mean()),
        terms={name: float(values[usable].double().mean()) for name, values in rewards.terms.items()},
        kl=float(masked_mean(kl_k3(rollouts.log_probs, reference_log_probs), rollouts.mask)),
    )


def write_samples(lm: LanguageModel, prompts: Sequence[str], *, num_tokens: int, seed: int) -> list[str]:
    """What ``lm`` writes after each test prompt, drawn at temperature 0.7 with the same random numbers every time."""
    if not prompts or not num_tokens:
        return []
    sampling = Sampling(temperature=0.7, suppressed=rollout_sampling(lm, 1.0).suppressed)
    decoder = Decoder(lm, batch_size=len(prompts))
    decoder.append([[lm.begin_token, *lm.encode(prompt)] for prompt in prompts])
    generated = decoder.generate(num_tokens, sampling=sampling, generator=torch.Generator().manual_seed(seed))
    texts = []
    for tokens in generated.tokens.tolist():
        end = tokens.index(end_token(lm)) if end_token(lm) in tokens else len(tokens)
        texts.append(lm.decode(tokens[:end]))
    return texts
