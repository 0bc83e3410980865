"""The losses of an update and their gradients: cross-entropy on documents, PPO on rollouts, and the value network's.

Every function here adds to gradients and changes nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.objectives.kl import kl_exact, kl_k2, kl_k3
from preceptor.objectives.policy_gradient import cispo_loss, clip_fraction, gspo_loss, ppo_clip_loss, reinforce_loss
from preceptor.objectives.statistics import masked_mean
from preceptor.objectives.value import value_loss
from preceptor.runs.world import ALONE, World
from preceptor.systems.curriculum.config import PPOOptions
from preceptor.systems.curriculum.policy import Rollouts, rollout_distributions, rollout_log_probs
from preceptor.systems.curriculum.sums import Sums
from preceptor.systems.curriculum.value_network import ValueNetwork


@dataclass(frozen=True)
class Documents:
    """Rows of documents, padded on the right.

    Attributes:
        tokens: token ids.
        token_mask: True = a token of a document.
        datasets: the index of each row's dataset.
    """

    tokens: Int[Tensor, "batch time"]
    token_mask: Bool[Tensor, "batch time"]
    datasets: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, rows: Int[Tensor, " kept"]) -> Documents:
        """The rows at ``rows``."""
        return Documents(self.tokens[rows], self.token_mask[rows], self.datasets[rows])


@dataclass(frozen=True)
class Experience:
    """Rollouts and everything that was computed when they were sampled; tensors on the policy's device.

    Attributes:
        rollouts: the continuations.
        advantages: of each token.
        returns: targets of the value network; None without one.
        values: of the value network before the update; None without one.
        reference_log_probs: of the sampled tokens under the reference model, nats.
    """

    rollouts: Rollouts
    advantages: Float[Tensor, "batch token"]
    returns: Float[Tensor, "batch token"] | None
    values: Float[Tensor, "batch token"] | None
    reference_log_probs: Float[Tensor, "batch token"]

    def at(self, indices: Int[Tensor, " kept"]) -> Experience:
        """The rows at ``indices``."""
        return Experience(
            rollouts=self.rollouts.at(indices),
            advantages=self.advantages[indices],
            returns=None if self.returns is None else self.returns[indices],
            values=None if self.values is None else self.values[indices],
            reference_log_probs=self.reference_log_probs[indices],
        )


def accumulate_cross_entropy(
    lm: LanguageModel,
    documents: Documents,
    *,
    weight: float,
    num_datasets: int,
    micro_batch_size: int,
    bf16: bool,
    world: World = ALONE,
) -> Float[Tensor, "choices 2"]:
    """Adds ``weight`` × the mean cross-entropy of ``documents`` to the policy's gradient.

    The mean is over every token but the first of its row, so ``micro_batch_size`` changes rounding alone. Where
    processes share the documents, gradient and sums are this one's part of them.

    Returns:
        for each dataset the sum of the losses of its tokens, in nats, and their number.
    """
    target_mask = documents.token_mask.clone()
    target_mask[:, 0] = False  # nothing predicts the first token of a row
    num_targets = int(target_mask.sum())
    sums = torch.zeros(num_datasets, 2, dtype=torch.float64)
    mine = torch.arange(len(documents))[world.shard(len(documents))]
    for rows in mine.split(micro_batch_size) if len(mine) else ():
        tokens, targets = documents.tokens[rows].to(lm.device), target_mask[rows].to(lm.device)
        with autocast(lm, bf16):
            # Position t predicts token t + 1: the kept positions are the targets shifted to the left. [targets]
            losses = -lm.chosen_log_probs(tokens, keep=targets.roll(-1, dims=1), chosen=tokens[targets])
        (weight * losses.sum() / num_targets).backward()
        # [rows] → [rows, time] → [targets]: the dataset of each loss
        datasets = documents.datasets[rows][:, None].expand_as(targets.cpu())[targets.cpu()]
        sums[:, 0].index_add_(0, datasets, losses.detach().double().cpu())
        sums[:, 1].index_add_(0, datasets, torch.ones(len(datasets), dtype=torch.float64))
    return sums


def accumulate_by_dataset(
    lm: LanguageModel,
    documents: Documents,
    *,
    weight: float,
    num_datasets: int,
    micro_batch_size: int,
    bf16: bool,
    world: World = ALONE,
) -> tuple[Float[Tensor, "choices 2"], dict[int, list[Tensor]]]:
    """What :func:`accumulate_cross_entropy` does, one dataset after another, for the gradient of each.

    Every row is read once, so it costs what the batch costs. The policy must have no gradient yet.

    Returns:
        the losses, and for each dataset in the batch the gradient of the mean loss of its tokens; this process's part
        of them where processes share the documents.
    """
    parameters = list(lm.trainable_parameters().values())
    num_targets = int(documents.token_mask[:, 1:].sum())  # nothing predicts the first token of a row
    sums = torch.zeros(num_datasets, 2, dtype=torch.float64)
    gradients: dict[int, list[Tensor]] = {}
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for dataset in documents.datasets.unique().tolist():
        part = documents.at((documents.datasets == dataset).nonzero()[:, 0])
        share = int(part.token_mask[:, 1:].sum()) / num_targets
        sums += accumulate_cross_entropy(
            lm,
            part,
            weight=weight * share,
            num_datasets=num_datasets,
            micro_batch_size=micro_batch_size,
            bf16=bf16,
            world=world,
        )
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradients[dataset] = [gradient / (weight * share) for gradient in taken]
        for parameter, total, gradient in zip(parameters, totals, taken, strict=True):
            total += gradient
            parameter.grad = None
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total
    return sums, gradients


def accumulate_ppo(
    lm: LanguageModel,
    experience: Experience,
    *,
    sampling: Sampling,
    options: PPOOptions,
    kl_coefficient: float,
    value_network: ValueNetwork | None,
    reference_model: LanguageModel,
    micro_batch_size: int,
    bf16: bool,
    sums: Sums,
    world: World = ALONE,
) -> float:
    """Adds the gradient of one minibatch to the policy and the value network, a few rows at a time.

    Args:
        lm: the policy.
        experience: the minibatch.
        sampling: the distribution that the tokens were sampled from.
        options: of the loss.
        kl_coefficient: β of a KL in the loss; unused where the KL is in the reward.
        value_network: None where the advantage needs none.
        reference_model: for the exact KL, which needs its whole distribution.
        micro_batch_size: rows per forward and backward pass.
        bf16: compute in bfloat16.
        sums: receives the metrics, each weighted by its number of tokens.
        world: processes that share the minibatch; gradient and ``sums`` are of this one's rows.

    Returns:
        KL(old policy ‖ present policy) on this minibatch, estimated by k3, nats per token; this process's part of it.
    """
    mask = experience.rollouts.mask
    num_tokens, num_rows = int(mask.sum()), int(mask.any(1).sum())
    if num_tokens == 0:
        return 0.0
    for name in ("policy_loss", "old_policy_kl", "clip_fraction", *(["value_loss"] if value_network else [])):
        sums.add(name, 0.0, 0.0)  # every process has the same names, whatever its rows
    kl_from_old_policy = 0.0
    mine = torch.arange(len(experience.rollouts), device=mask.device)[world.shard(len(experience.rollouts))]
    for rows in mine.split(micro_batch_size) if len(mine) else ():
        part = experience.at(rows)
        part_mask = part.rollouts.mask
        part_tokens = int(part_mask.sum())
        if part_tokens == 0:
            continue
        with autocast(lm, bf16):
            if options.kl_place == "loss_exact":
                # The only loss that needs the whole vocabulary: [rows, token, vocab], then the sampled [rows, token].
                distributions = rollout_distributions(lm, part.rollouts, sampling)
                log_probs = distributions.gather(-1, part.rollouts.tokens[..., None])[..., 0]
                with torch.no_grad():
                    reference_distributions = rollout_distributions(reference_model, part.rollouts, sampling)
            else:
                log_probs = rollout_log_probs(lm, part.rollouts, sampling)
        # The weight of this part's mean in the minibatch's: a mean over tokens, over rows that count, or over all rows.
        share = len(rows) / len(experience.rollouts)
        if options.loss == "gspo" or options.aggregation == "sequence_mean":
            share = int(part_mask.any(1).sum()) / num_rows
        elif options.aggregation == "token_mean":
            share = part_tokens / num_tokens
        loss = share * policy_loss(log_probs, part, options=options)
        # The KL is a mean over tokens whatever the aggregation of the policy loss, so β means the same for all.
        if options.kl_place in ("loss_k2", "loss_k3", "loss_exact"):
            if options.kl_place == "loss_exact":
                kl = kl_exact(distributions, reference_distributions, mask=part_mask)
            else:
                estimate = kl_k2 if options.kl_place == "loss_k2" else kl_k3
                kl = estimate(log_probs, part.reference_log_probs)
            loss = loss + kl_coefficient * masked_mean(kl, part_mask) * part_tokens / num_tokens
        (options.weight * loss).backward()  # per part, so that one part's activations are held at a time
        sums.add("policy_loss", loss.detach() / share, share)
        if value_network is not None:
            _accumulate_value(value_network, part, options, share=part_tokens / num_tokens, bf16=bf16, sums=sums)
        with torch.no_grad():
            part_kl = masked_mean(kl_k3(part.rollouts.log_probs, log_probs), part_mask)
            kl_from_old_policy += float(part_kl) * part_tokens / num_tokens
            sums.add("old_policy_kl", part_kl, part_tokens)
            sums.add(
                "clip_fraction",
                clip_fraction(
                    log_probs,
                    part.rollouts.log_probs,
                    part.advantages,
                    mask=part_mask,
                    clip_epsilon_low=options.clip_epsilon_low,
                    clip_epsilon_high=options.clip_epsilon_high,
                ),
                part_tokens,
            )
    return kl_from_old_policy


def policy_loss(log_probs: Float[Tensor, "batch token"], part: Experience, *, options: PPOOptions) -> Float[Tensor, ""]:
    """The policy-gradient loss that ``options`` names, over the rows of ``part``."""
    rollouts, advantages = part.rollouts, part.advantages
    if rollouts.weights is not None:
        # A weight is positive, so it may as well multiply the advantage: clipping stays as it is.
        advantages = advantages * rollouts.weights
    if options.loss == "gspo":
        # One advantage per sequence, [rows]: all tokens of a row have the same, and the first always counts.
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
    assert part.values is not None, "rollouts have values where there is a value network"
    assert part.returns is not None, "and returns with them"
    with torch.autocast(part.values.device.type, torch.bfloat16, enabled=bf16):
        values = network(part.rollouts)
    clip = options.value_clip_epsilon or None
    loss = value_loss(
        values,
        part.returns,
        mask=part.rollouts.mask,
        old_values=part.values if clip else None,
        clip_epsilon=clip,
    )
    (share * loss).backward()
    sums.add("value_loss", loss.detach(), share)


def autocast(lm: LanguageModel, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16 if ``bf16``; weights and sums stay in float32."""
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16)
