"""One update of the teacher: policy gradient over query tokens and selections, with exact KL to the old model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.lm.score import span_mask
from preceptor.objectives.kl import kl_exact
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.systems.reading.policy import ActionScores, Keys, Policy, Trajectories, reference_logits


@dataclass(frozen=True)
class Coefficients:
    """Weights of the terms of the loss (dimensionless); 0 leaves a term out."""

    query: float
    selection: float
    value_kl: float
    query_kl: float
    query_entropy: float
    selection_entropy: float


@dataclass(frozen=True)
class UpdateMetrics:
    """What an update saw, before its step; KLs and entropies in nats per token, None where not computed."""

    policy_loss: float
    value_kl: float | None
    query_kl: float | None
    query_entropy: float


def accumulate_gradient(
    policy: Policy,
    trajectories: Trajectories,
    keys: Keys,
    *,
    advantages: Float[Tensor, "batch step"],
    passed: Bool[Tensor, " batch"],
    reference: LanguageModel | None,
    coefficients: Coefficients,
    micro_batch_size: int,
) -> UpdateMetrics:
    """Add the loss's gradient to the policy's parameters, a few trajectories at a time.

    loss = − query · mean A ln π(query token) − selection · mean A ln π(choice)
           + value_kl · mean KL(π ‖ old) at value tokens + query_kl · mean KL(π ‖ old) at query tokens
           − query_entropy · mean H(π) at query tokens − selection_entropy · mean H(π) of the choices

    Means run over the tokens (or choices) of the trajectories that passed, so the result does not depend on
    ``micro_batch_size`` beyond rounding. No gradient into ``advantages`` or the reference.

    Args:
        policy: whose parameters receive gradient.
        trajectories: what it did.
        keys: the article's key vectors.
        advantages: of each step.
        passed: True = the trajectory teaches.
        reference: the old model of the KL terms; None when both are off.
        coefficients: weights of the terms.
        micro_batch_size: trajectories per pass.
    """
    chosen = passed.nonzero()[:, 0]
    if len(chosen) == 0:
        return UpdateMetrics(0.0, None, None, float(trajectories.query_entropy.mean()))
    num_steps, num_query_tokens = trajectories.queries.shape[1:]
    num_choices = len(chosen) * num_steps
    num_value_tokens = sum(
        len(trajectories.material.values[pair]) for pair in trajectories.order[chosen].flatten().tolist()
    )
    totals = {"policy_loss": 0.0, "value_kl": 0.0, "query_kl": 0.0, "query_entropy": 0.0}
    for indices in chosen.split(micro_batch_size):
        part = subset(trajectories, indices)
        weights = advantages[indices].to(policy.lm.device)
        scores = policy.score(part, keys, with_values=reference is not None and coefficients.value_kl > 0)
        policy_loss = _policy_loss(
            scores,
            weights,
            policy=policy,
            coefficients=coefficients,
            num_choices=num_choices,
            num_query_tokens=num_query_tokens,
        )
        query_entropy = scores.query_entropy.sum() / (num_choices * num_query_tokens)
        selection_entropy = scores.selection_entropy.sum() / num_choices
        loss = (
            policy_loss
            - coefficients.query_entropy * query_entropy
            - coefficients.selection_entropy * policy.selection_has_gradient * selection_entropy
        )
        if reference is not None:
            query_old, value_old = _reference(reference, part, with_values=coefficients.value_kl > 0)
            query_kl = kl_exact(scores.query_logits, query_old).sum() / (num_choices * num_query_tokens)
            value_kl = kl_exact(scores.value_logits, value_old).sum() / num_value_tokens
            loss = loss + coefficients.query_kl * query_kl + coefficients.value_kl * value_kl
            totals["query_kl"] += float(query_kl.detach())
            totals["value_kl"] += float(value_kl.detach())
        loss.backward()
        totals["policy_loss"] += float(policy_loss.detach())
        totals["query_entropy"] += float(query_entropy.detach())
    return UpdateMetrics(
        policy_loss=totals["policy_loss"],
        value_kl=totals["value_kl"] if reference is not None and coefficients.value_kl > 0 else None,
        query_kl=None if reference is None else totals["query_kl"],
        query_entropy=totals["query_entropy"],
    )


def subset(trajectories: Trajectories, indices: Tensor) -> Trajectories:
    """The trajectories at ``indices``."""
    other = trajectories.reference_queries
    return replace(
        trajectories,
        queries=trajectories.queries[indices],
        query_log_probs=trajectories.query_log_probs[indices],
        query_entropy=trajectories.query_entropy[indices],
        query_vectors=trajectories.query_vectors[indices],
        order=trajectories.order[indices],
        available_mask=trajectories.available_mask[indices],
        selection_log_probs=trajectories.selection_log_probs[indices],
        reference_queries=None if other is None else other[indices],
    )


def _policy_loss(
    scores: ActionScores,
    advantages: Tensor,
    *,
    policy: Policy,
    coefficients: Coefficients,
    num_choices: int,
    num_query_tokens: int,
) -> Tensor:
    loss = advantages.new_zeros(())
    for coefficient, log_probs, count in (
        (coefficients.query, scores.query_log_probs.flatten(1), num_choices * num_query_tokens),
        (coefficients.selection * policy.selection_has_gradient, scores.selection_log_probs, num_choices),
    ):
        if coefficient:
            repeats = log_probs.shape[1] // advantages.shape[1]
            loss = loss + coefficient * reinforce_loss(
                log_probs,
                advantages.repeat_interleave(repeats, dim=1),
                mask=torch.ones_like(log_probs, dtype=torch.bool),
                aggregation="constant",
                divisor=float(count),
            )
    return loss


def _reference(reference: LanguageModel, part: Trajectories, *, with_values: bool) -> tuple[Tensor, Tensor]:
    """Logits of the old model at the query and the value tokens, ordered as :class:`ActionScores` orders them."""
    rows = [
        part.material.query_row(order, queries)
        for order, queries in zip(part.order.tolist(), part.queries.tolist(), strict=True)
    ]
    width = max(len(row.tokens) for row in rows)
    at_query = span_mask([row.stretches("query") for row in rows], width=width, device=reference.device)
    at_value = span_mask([row.stretches("value") for row in rows], width=width, device=reference.device)
    at_value &= with_values
    logits = reference_logits(reference, [row.tokens for row in rows], at_query | at_value)
    is_query = at_query[at_query | at_value]
    return logits[is_query], logits[~is_query]


def trainable(policy: Policy) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter that an update may move, by name."""
    for name, parameter in policy.lm.trainable_parameters().items():
        yield f"model.{name}", parameter
    if policy.projection is not None:
        for name, parameter in policy.projection.named_parameters():
            yield f"projection.{name}", parameter
