"""The update: cross-entropy on documents and PPO on rollouts in one loss, over epochs of minibatches.

    loss = w_ce · mean −ln π(document token) + w_ppo · [ policy loss + β · KL(π ‖ reference) ]      (policy)
    loss = value loss                                                                               (value network)

The documents of a step are spread evenly over its minibatches, so that each is learned from once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.objectives.kl import kl_exact, kl_k2, kl_k3
from preceptor.objectives.policy_gradient import cispo_loss, clip_fraction, gspo_loss, ppo_clip_loss, reinforce_loss
from preceptor.objectives.statistics import masked_mean
from preceptor.objectives.value import value_loss
from preceptor.systems.curriculum.config import PPOOptions
from preceptor.systems.curriculum.credit import Credit
from preceptor.systems.curriculum.rollout import Rollouts, rollout_distributions, rollout_log_probs
from preceptor.systems.curriculum.value_network import ValueNetwork


@dataclass(frozen=True)
class Documents:
    """Rows of documents, padded on the right.

    Attributes:
        tokens: token ids.
        token_mask: True = a token of a document.
        datasets: which dataset each row is of.
    """

    tokens: Int[Tensor, "batch time"]
    token_mask: Bool[Tensor, "batch time"]
    datasets: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, rows: Int[Tensor, " kept"]) -> Documents:
        """Some of the rows."""
        return Documents(self.tokens[rows], self.token_mask[rows], self.datasets[rows])


@dataclass(frozen=True)
class Experience:
    """Rollouts with everything that was fixed when they were written; tensors on the policy's device.

    Attributes:
        rollouts: what was written.
        credit: advantages and value targets.
        values: of the value network before the update, None without one.
        reference_log_probs: of the drawn tokens under the reference, nats.
    """

    rollouts: Rollouts
    credit: Credit
    values: Float[Tensor, "batch token"] | None
    reference_log_probs: Float[Tensor, "batch token"]

    def at(self, indices: Int[Tensor, " kept"]) -> Experience:
        """The rows at ``indices``."""
        returns = self.credit.returns
        return Experience(
            rollouts=self.rollouts.at(indices),
            credit=Credit(self.credit.advantages[indices], None if returns is None else returns[indices]),
            values=None if self.values is None else self.values[indices],
            reference_log_probs=self.reference_log_probs[indices],
        )


@dataclass
class Sums:
    """Sums of a step's quantities with their weights, for means at its end."""

    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Count ``value`` with ``weight``."""
        self.totals[name] += float(value) * weight
        self.weights[name] += weight

    def means(self) -> Mapping[str, float]:
        """The weighted mean of every quantity."""
        return {name: total / self.weights[name] for name, total in self.totals.items() if self.weights[name]}


def accumulate_cross_entropy(
    lm: LanguageModel, documents: Documents, *, weight: float, num_datasets: int, micro_batch_size: int, bf16: bool
) -> Float[Tensor, "choices 2"]:
    """Add ``weight`` × the mean cross-entropy of ``documents`` to the policy's gradient.

    The mean runs over every token of a text but the first of its row, so it does not depend on ``micro_batch_size``
    beyond rounding.

    Returns:
        for each dataset the sum of the losses of its tokens, in nats, and their number.
    """
    counted = documents.token_mask.clone()
    counted[:, 0] = False
    num_targets = int(counted.sum())
    sums = torch.zeros(num_datasets, 2, dtype=torch.float64)
    for rows in torch.arange(len(documents)).split(micro_batch_size):
        tokens, targets = documents.tokens[rows].to(lm.device), counted[rows].to(lm.device)
        with autocast(lm, bf16):
            losses = -lm.chosen_log_probs(tokens, keep=targets.roll(-1, dims=1), chosen=tokens[targets])
        (weight * losses.sum() / num_targets).backward()
        datasets = documents.datasets[rows][:, None].expand_as(targets.cpu())[targets.cpu()]
        sums[:, 0].index_add_(0, datasets, losses.detach().double().cpu())
        sums[:, 1].index_add_(0, datasets, torch.ones(len(datasets), dtype=torch.float64))
    return sums


def accumulate_ppo(
    lm: LanguageModel,
    experience: Experience,
    *,
    sampling: Sampling,
    options: PPOOptions,
    kl_coefficient: float,
    value_network: ValueNetwork | None,
    reference: LanguageModel,
    micro_batch_size: int,
    bf16: bool,
    sums: Sums,
) -> float:
    """Add the gradient of one minibatch to the policy and the value network, a few rows at a time.

    Args:
        lm: the policy.
        experience: the minibatch.
        sampling: the distribution that the tokens were drawn from.
        options: of the loss.
        kl_coefficient: β of a KL in the loss; unused where the KL is in the reward.
        value_network: None where the advantage needs none.
        reference: for the exact KL, which needs its whole distribution.
        micro_batch_size: rows per pass.
        bf16: compute in bfloat16.
        sums: where the metrics go, each weighted by its number of tokens.

    Returns:
        KL from the policy that sampled to the present one on this minibatch, estimated by k3, nats per token.
    """
    mask = experience.rollouts.mask
    num_tokens, num_rows = int(mask.sum()), int(mask.any(1).sum())
    if num_tokens == 0:
        return 0.0
    drift = 0.0
    for rows in torch.arange(len(experience.rollouts), device=mask.device).split(micro_batch_size):
        part = experience.at(rows)
        part_mask = part.rollouts.mask
        part_tokens = int(part_mask.sum())
        if part_tokens == 0:
            continue
        with autocast(lm, bf16):
            if options.kl_place == "loss_exact":  # the one that needs the whole vocabulary
                distributions = rollout_distributions(lm, part.rollouts, sampling)
                log_probs = distributions.gather(-1, part.rollouts.tokens[..., None])[..., 0]
                with torch.no_grad():
                    reference_distributions = rollout_distributions(reference, part.rollouts, sampling)
            else:
                log_probs = rollout_log_probs(lm, part.rollouts, sampling)
        # What this part is of the minibatch's mean: over tokens, over rows that count, or over all rows.
        share = len(rows) / len(experience.rollouts)
        if options.loss == "gspo" or options.aggregation == "sequence_mean":
            share = int(part_mask.any(1).sum()) / num_rows
        elif options.aggregation == "token_mean":
            share = part_tokens / num_tokens
        loss = share * policy_loss(log_probs, part, options=options)
        if options.kl_place in ("loss_k2", "loss_k3", "loss_exact"):
            if options.kl_place == "loss_exact":
                kl = kl_exact(distributions, reference_distributions, mask=part_mask)
            else:
                estimate = kl_k2 if options.kl_place == "loss_k2" else kl_k3
                kl = estimate(log_probs, part.reference_log_probs)
            loss = loss + kl_coefficient * masked_mean(kl, part_mask) * part_tokens / num_tokens
        (options.weight * loss).backward()
        sums.add("policy_loss", loss.detach() / share, share)
        if value_network is not None:
            _accumulate_value(value_network, part, options, share=part_tokens / num_tokens, bf16=bf16, sums=sums)
        with torch.no_grad():
            part_drift = masked_mean(kl_k3(part.rollouts.log_probs, log_probs), part_mask)
            drift += float(part_drift) * part_tokens / num_tokens
            sums.add("old_policy_kl", part_drift, part_tokens)
            sums.add(
                "clip_fraction",
                clip_fraction(
                    log_probs,
                    part.rollouts.log_probs,
                    part.credit.advantages,
                    mask=part_mask,
                    clip_epsilon_low=options.clip_epsilon_low,
                    clip_epsilon_high=options.clip_epsilon_high,
                ),
                part_tokens,
            )
    return drift


def policy_loss(log_probs: Float[Tensor, "batch token"], part: Experience, *, options: PPOOptions) -> Float[Tensor, ""]:
    """The policy-gradient loss that ``options`` names, over the rows of ``part``."""
    rollouts, advantages = part.rollouts, part.credit.advantages
    if options.loss == "gspo":
        # One advantage a sequence: all of a row's tokens have the same, the first always counts.
        return gspo_loss(
            log_probs,
            rollouts.log_probs,
            advantages[:, 0],
            mask=rollouts.mask,
            clip_epsilon_low=options.clip_epsilon_low,
            clip_epsilon_high=options.clip_epsilon_high,
        )
    aggregation = options.aggregation
    divisor = float(rollouts.mask.numel()) if aggregation == "constant" else None
    if options.loss == "cispo":
        return cispo_loss(
            log_probs,
            rollouts.log_probs,
            advantages,
            mask=rollouts.mask,
            max_ratio=options.max_ratio,
            aggregation=aggregation,
            divisor=divisor,
        )
    if options.loss == "reinforce":
        return reinforce_loss(log_probs, advantages, mask=rollouts.mask, aggregation=aggregation, divisor=divisor)
    return ppo_clip_loss(
        log_probs,
        rollouts.log_probs,
        advantages,
        mask=rollouts.mask,
        clip_epsilon_low=options.clip_epsilon_low,
        clip_epsilon_high=options.clip_epsilon_high,
        dual_clip=options.dual_clip or None,
        aggregation=aggregation,
        divisor=divisor,
    )


def _accumulate_value(
    network: ValueNetwork, part: Experience, options: PPOOptions, *, share: float, bf16: bool, sums: Sums
) -> None:
    assert part.values is not None, "a value network was asked before the update"
    assert part.credit.returns is not None, "and its targets follow from what it said"
    with torch.autocast(part.values.device.type, torch.bfloat16, enabled=bf16):
        values = network(part.rollouts)
    clip = options.value_clip_epsilon or None
    loss = value_loss(
        values,
        part.credit.returns,
        mask=part.rollouts.mask,
        old_values=part.values if clip else None,
        clip_epsilon=clip,
    )
    (share * loss).backward()
    sums.add("value_loss", loss.detach(), share)


def autocast(lm: LanguageModel, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16 where asked; weights and sums stay in float32."""
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16)
