"""The parts of one step: measuring, drawing, writing, improving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.data.corpora.blocks import pad_blocks
from preceptor.lm.model import LanguageModel
from preceptor.objectives.kl import kl_k1, kl_k3
from preceptor.objectives.mixture import document_difficulty
from preceptor.objectives.statistics import masked_mean
from preceptor.objectives.value import explained_variance
from preceptor.run.guard import first_nonfinite
from preceptor.systems.curriculum.config import CurriculumConfig, DifficultyOptions, PPOOptions
from preceptor.systems.curriculum.credit import credit_tokens
from preceptor.systems.curriculum.decisions import mixture_row
from preceptor.systems.curriculum.difficulty import document_losses
from preceptor.systems.curriculum.learner import Learner
from preceptor.systems.curriculum.material import Corpus, draw_prompts
from preceptor.systems.curriculum.rewards import Rewards, score, usable_rows
from preceptor.systems.curriculum.rollout import Rollouts, generate_rollouts, rollout_log_probs, rollout_sampling
from preceptor.systems.curriculum.setting import Setting
from preceptor.systems.curriculum.update import (
    Documents,
    Experience,
    Sums,
    accumulate_cross_entropy,
    accumulate_ppo,
    autocast,
)

# ---- 1. difficulty --------------------------------------------------------------------------------------------------


def measure_difficulty(
    learner: Learner, corpora: Sequence[Corpus], options: DifficultyOptions, *, generator: torch.Generator, step: int
) -> dict[str, Any]:
    """Score the sample with the frozen model and move the mixture's weights; gives the decision's row.

    The sample of an arm is drawn once, so that two measurements differ by what was learned and not by the draw, unless
    ``options.resample``. It is of documents that are never trained on: rows learned by heart would look like progress.
    """
    if options.resample or not learner.sample:
        learner.sample = [
            torch.randperm(len(corpus.difficulty), generator=generator)[: options.sample_size].tolist()
            for corpus in corpora
        ]
    rows = [
        [corpus.difficulty[index].tolist() for index in indices]
        for corpus, indices in zip(corpora, learner.sample, strict=True)
    ]
    losses = document_losses(learner.frozen, rows)
    learner.counts["model_calls"] += sum(map(len, rows))
    previous = None if options.resample else learner.sample_losses or losses
    difficulty = document_difficulty(losses, previous=previous)
    learner.sample_losses = losses
    tokens = learner.tokens_since
    learner.mixture.update(difficulty, tokens=tokens)
    learner.mixtures.append(learner.mixture.weights.tolist())
    learner.tokens_since = torch.zeros_like(tokens)
    names = [corpus.name for corpus in corpora]
    return mixture_row(difficulty, learner.mixture, tokens, step=step, arm=learner.arm.name, names=names)


# ---- 2. documents ---------------------------------------------------------------------------------------------------


def draw_documents(learner: Learner, corpora: Sequence[Corpus], *, num_tokens: int) -> Documents:
    """Rows of documents until the arm has had ``num_tokens`` tokens in all.

    The mixture's weights are shares of *tokens*: a dataset of short rows is drawn more often for the same share. The
    tokens of an arm are counted from its beginning, so that all arms have the same number, to within a row.
    """
    tokens_a_row = torch.tensor([corpus.train.num_tokens / len(corpus.train) for corpus in corpora])
    learner.sampler.weights = learner.mixture.weights / tokens_a_row
    rows, datasets = [], []
    while learner.counts["tokens"] < num_tokens:
        dataset, row = learner.sampler.draw()
        rows.append(corpora[dataset].train[row])
        datasets.append(dataset)
        learner.counts["tokens"] += len(rows[-1])
        learner.tokens_since[dataset] += len(rows[-1])
    learner.counts["model_calls"] += len(rows)
    batch = pad_blocks(rows, filler=learner.lm.begin_token)
    return Documents(batch.tokens, batch.token_mask, torch.tensor(datasets))


# ---- 3. rollouts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A batch of rollouts, what they earned, and what is learned from (nothing, where a reward is not finite)."""

    rollouts: Rollouts
    experience: Experience
    rewards: Rewards
    metrics: dict[str, Any]
    num_excluded: int


@torch.no_grad()
def write_rollouts(
    learner: Learner, setting: Setting, config: CurriculumConfig, *, generators: Mapping[str, torch.Generator]
) -> Written:
    """Continuations of drawn prompts with everything that the update needs to know of the moment they were written."""
    ppo, lm, bf16 = config.ppo, setting.lm, config.update.bf16
    sampling = rollout_sampling(lm, ppo.temperature)
    prompts = draw_prompts(
        setting.corpora,
        learner.mixture.weights,
        num_prompts=ppo.prompts,
        prompt_tokens=ppo.prompt_tokens,
        continuation_tokens=ppo.continuation_tokens,
        generator=generators["prompt"],
    )
    with autocast(lm, bf16):
        rollouts = generate_rollouts(
            lm,
            prompts,
            group_size=ppo.group_size,
            num_tokens=ppo.continuation_tokens,
            sampling=sampling,
            generator=generators["rollout"],
        )
    rewards = score(rollouts, learner.terms)
    excluded = ~usable_rows(rewards)
    taught = rollouts.without(excluded.to(rollouts.mask.device))
    device, mask = lm.device, taught.mask
    with autocast(lm, bf16):
        reference_log_probs = rollout_log_probs(kl_reference(learner, setting, ppo), taught, sampling)
        values = None if learner.value_network is None else learner.value_network(taught)
    coefficient = ppo.kl_coefficient if learner.kl is None else learner.kl.coefficient
    token_rewards = rewards.tokens.to(device)
    if ppo.kl_place == "reward_k1":
        token_rewards = token_rewards - coefficient * kl_k1(rollouts.log_probs, reference_log_probs)
    credit = credit_tokens(
        token_rewards,
        mask,
        kind=ppo.advantage,
        values=values,
        group_size=ppo.group_size,
        discount=ppo.discount,
        gae_lambda=ppo.gae_lambda,
        whiten_advantages=ppo.whiten_advantages,
    )
    learner.counts["rollout_tokens"] += int(mask.sum())
    learner.counts["model_calls"] += len(rollouts)
    learner.counts["rewards_excluded"] += int(excluded.sum())
    counted = rewards.total.isfinite()
    metrics: dict[str, Any] = {
        "reward": _mean(rewards.total[counted]),
        "reward_terms": {name: _mean(values[counted]) for name, values in rewards.terms.items()},
        "kl": float(masked_mean(kl_k3(rollouts.log_probs, reference_log_probs), mask)),
        "kl_coefficient": coefficient,
        "entropy": float(masked_mean(rollouts.entropy, mask)),
        "continuation_tokens": float(mask.sum(1).double().mean()),
    }
    if values is not None and credit.returns is not None:
        metrics["explained_variance"] = float(explained_variance(values, credit.returns, mask))
    experience = Experience(taught, credit, values, reference_log_probs)
    return Written(rollouts, experience, rewards, metrics, int(excluded.sum()))


def kl_reference(learner: Learner, setting: Setting, options: PPOOptions) -> LanguageModel:
    """What the policy is kept near."""
    return learner.frozen if options.kl_reference == "frozen" else setting.reference


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


# ---- 4. the update --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Improved:
    """What an update saw; ``nonfinite`` names what kept an optimiser step from being taken."""

    metrics: dict[str, Any]
    nonfinite: list[str]


def improve(
    learner: Learner,
    documents: Documents,
    experience: Experience | None,
    *,
    config: CurriculumConfig,
    reference: LanguageModel,
    generator: torch.Generator,
) -> Improved:
    """Epochs of minibatches over the continuations, each with its part of the documents; one optimiser step each.

    Where nothing was written the documents are cut into as many parts as they would be with it, so that arms differ in
    what they learn from and not in how many steps the optimiser takes. Once the KL to the policy that wrote passes the
    early stop, the rest of the step is cross-entropy alone.
    """
    ppo, update = config.ppo, config.update
    sums = Sums()
    num_minibatches = ppo.epochs * ppo.minibatches if ppo.weight else 1
    parts = torch.arange(len(documents)).tensor_split(num_minibatches)
    loss_sums = torch.zeros(learner.mixture.num_datasets, 2, dtype=torch.float64)
    minibatches: list[Tensor] = []
    nonfinite: list[str] = []
    num_used, stopped = 0, False
    for number in range(num_minibatches):
        if update.cross_entropy_weight and len(parts[number]):
            loss_sums += accumulate_cross_entropy(
                learner.lm,
                documents.at(parts[number]),
                weight=update.cross_entropy_weight,
                num_datasets=len(loss_sums),
                micro_batch_size=update.micro_batch_size or len(documents),
                bf16=update.bf16,
            )
        if experience is not None and not stopped:
            if not minibatches:
                order = torch.randperm(len(experience.rollouts), generator=generator)
                minibatches = list(order.tensor_split(ppo.minibatches))
            drift = accumulate_ppo(
                learner.lm,
                experience.at(minibatches.pop(0).to(learner.lm.device)),
                sampling=rollout_sampling(learner.lm, ppo.temperature),
                options=ppo,
                kl_coefficient=ppo.kl_coefficient if learner.kl is None else learner.kl.coefficient,
                value_network=learner.value_network,
                reference=reference,
                micro_batch_size=update.micro_batch_size or len(experience.rollouts),
                bf16=update.bf16,
                sums=sums,
            )
            num_used += 1
            stopped = ppo.kl_early_stop > 0 and drift > ppo.kl_early_stop
        if (what := take_step(learner, clip_norm=update.clip_norm, sums=sums)) is not None:
            nonfinite.append(what)
    if not nonfinite:
        learner.guard.ok()
    metrics: dict[str, Any] = dict(sums.means())
    if loss_sums[:, 1].sum():
        metrics["cross_entropy"] = float(loss_sums[:, 0].sum() / loss_sums[:, 1].sum())
    if experience is not None:
        metrics["minibatches_used"] = num_used
    return Improved(metrics, nonfinite)


def take_step(learner: Learner, *, clip_norm: float, sums: Sums) -> str | None:
    """One step of the optimiser, the policy's and the value network's gradients clipped each on its own.

    Returns:
        what is not finite, and then no step was taken.
    """
    named = list(learner.lm.trainable_parameters().items())
    if learner.value_network is not None:
        named += [(f"value {name}", parameter) for name, parameter in learner.value_network.named_parameters()]
    what = first_nonfinite((f"gradient of {name}", parameter.grad) for name, parameter in named)
    if what is None:
        names = ("gradient_norm", "value_gradient_norm")
        for name, group in zip(names, learner.optimiser.param_groups, strict=False):
            sums.add(name, nn.utils.clip_grad_norm_(group["params"], clip_norm))
        learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    return what
