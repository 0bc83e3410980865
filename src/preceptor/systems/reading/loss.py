"""The loss of one update: policy gradient over query tokens and selections, with exact KL to a reference model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from preceptor.lm.log_probs import MAX_SAVED_LOGITS, in_blocks
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.score import pad_rows, span_mask
from preceptor.objectives.kl import entropy, kl_exact
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.objectives.selection import selection_entropy, selection_log_probs
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.policy import Keys, Policy


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
    """Means before the optimizer's step; KLs and entropy in nats per token, None where not computed."""

    policy_loss: float
    value_kl: float | None
    query_kl: float | None
    query_entropy: float


@dataclass(frozen=True)
class ActionScores:
    """Recorded trajectories under the policy's present weights; carries gradient.

    Attributes:
        query_log_probs: of the recorded query tokens under the sampling distribution, nats.
        query_entropy: of the sampling distribution at each query token, nats.
        selection_log_probs: of the recorded choices, nats.
        selection_entropy: of the selection at each step, nats.
        query_kl: KL(policy ‖ reference model) at each query token, nats; None without a reference model.
        value_kl: the same at each value token; empty unless asked for.
    """

    query_log_probs: Float[Tensor, "batch step token"]
    query_entropy: Float[Tensor, "batch step token"]
    selection_log_probs: Float[Tensor, "batch step"]
    selection_entropy: Float[Tensor, "batch step"]
    query_kl: Float[Tensor, " query"] | None
    value_kl: Float[Tensor, " value"] | None


def accumulate_gradient(
    policy: Policy,
    trajectories: Trajectories,
    keys: Keys,
    *,
    advantages: Float[Tensor, "batch step"],
    kept_mask: Bool[Tensor, " batch"],
    reference_model: LanguageModel | None,
    coefficients: Coefficients,
    micro_batch_size: int,
    world: World = ALONE,
) -> UpdateMetrics:
    """Add the loss's gradient to the policy's parameters, a few trajectories at a time.

    loss = − query · mean A ln π(query token) − selection · mean A ln π(choice)
           + value_kl · mean KL(π ‖ reference) at value tokens + query_kl · mean KL(π ‖ reference) at query tokens
           − query_entropy · mean H(π) at query tokens − selection_entropy · mean H(π) of the choices

    Means run over the tokens (or choices) of the trajectories that the filter kept, so the result does not depend on
    ``micro_batch_size`` beyond rounding. No gradient into ``advantages`` or the reference model.

    Args:
        policy: whose parameters receive gradient.
        trajectories: its recorded actions.
        keys: the article's key vectors.
        advantages: of each step.
        kept_mask: True = the trajectory is kept by the filter.
        reference_model: of the KL terms; None when both are off.
        coefficients: weights of the terms.
        micro_batch_size: trajectories per pass.
        world: the processes that share the trajectories; afterwards each has the gradient of all of them.
    """
    kept = kept_mask.nonzero()[:, 0]
    if len(kept) == 0:
        return UpdateMetrics(0.0, None, None, float(trajectories.query_entropy.mean()))
    # Every mean is a sum over a count of the whole batch, so that micro-batches add up to it.
    _, num_steps, tokens_per_query = trajectories.queries.shape
    num_choices = len(kept) * num_steps
    num_query_tokens = num_choices * tokens_per_query
    num_value_tokens = sum(
        len(trajectories.article.turns[pair]) for pair in trajectories.order[kept].flatten().tolist()
    )
    with_values = reference_model is not None and coefficients.value_kl > 0
    selection_weight = coefficients.selection * policy.selection_has_gradient

    mine = kept[world.shard(len(kept))]
    passes = [(rows, 1.0) for rows in mine.split(micro_batch_size)] if len(mine) else []
    if world.shares_weights:
        # A pass takes all processes then: one with fewer rows than the others passes a row for nothing.
        num_passes = -(-world.most_rows(len(kept)) // micro_batch_size)
        passes += [(kept[:1], 0.0)] * (num_passes - len(passes))
    totals = {"policy_loss": 0.0, "value_kl": 0.0, "query_kl": 0.0, "query_entropy": 0.0}
    for rows, weight in passes:
        scores = score_actions(
            policy, trajectories.at(rows), keys, reference_model=reference_model, with_values=with_values
        )
        advantage = advantages[rows].to(policy.lm.device)  # batch step

        policy_loss = advantage.new_zeros(())
        if coefficients.query:
            log_probs = scores.query_log_probs.flatten(1)  # batch step·token
            policy_loss = policy_loss + coefficients.query * reinforce_loss(
                log_probs,
                advantage.repeat_interleave(tokens_per_query, dim=1),  # every token of a query has its step's advantage
                mask=torch.ones_like(log_probs, dtype=torch.bool),
                aggregation="constant",
                divisor=float(num_query_tokens),
            )
        if selection_weight:
            policy_loss = policy_loss + selection_weight * reinforce_loss(
                scores.selection_log_probs,
                advantage,
                mask=torch.ones_like(scores.selection_log_probs, dtype=torch.bool),
                aggregation="constant",
                divisor=float(num_choices),
            )

        query_entropy = scores.query_entropy.sum() / num_query_tokens
        choice_entropy = scores.selection_entropy.sum() / num_choices
        loss = (
            policy_loss
            - coefficients.query_entropy * query_entropy
            - coefficients.selection_entropy * policy.selection_has_gradient * choice_entropy
        )
        terms = {"policy_loss": policy_loss, "query_entropy": query_entropy}
        if scores.query_kl is not None and scores.value_kl is not None:
            query_kl, value_kl = scores.query_kl.sum() / num_query_tokens, scores.value_kl.sum() / num_value_tokens
            loss = loss + coefficients.query_kl * query_kl + coefficients.value_kl * value_kl
            terms |= {"query_kl": query_kl, "value_kl": value_kl}
        (weight * loss).backward()
        for name, term in terms.items():
            totals[name] += weight * float(term.detach())
    world.sum_gradients(policy.parameters().values())
    totals = world.sums(totals)
    return UpdateMetrics(
        policy_loss=totals["policy_loss"],
        value_kl=totals["value_kl"] if with_values else None,
        query_kl=None if reference_model is None else totals["query_kl"],
        query_entropy=totals["query_entropy"],
    )


def score_actions(
    policy: Policy,
    trajectories: Trajectories,
    keys: Keys,
    *,
    reference_model: LanguageModel | None = None,
    with_values: bool = False,
) -> ActionScores:
    """One pass over the trajectories, with gradient; equals what was recorded while the weights are the same.

    Args:
        policy: whose present weights are used.
        trajectories: its recorded actions.
        keys: the article's key vectors.
        reference_model: of the KL, or None; no gradient.
        with_values: compute the KL at value tokens too.
    """
    lm, shape = policy.lm, trajectories.queries.shape
    sequences = trajectories.policy_sequences()
    tokens = pad_rows([each.tokens for each in sequences], filler=lm.begin_token, device=lm.device)  # batch time
    width = tokens.shape[1]
    at_query = span_mask([each.ranges("query") for each in sequences], width=width, device=lm.device)
    at_value = span_mask([each.ranges("value") for each in sequences], width=width, device=lm.device) & with_values
    is_kept = at_query | at_value
    # The logits at t predict the token at t + 1. No sequence begins with a query, so nothing wraps around.
    keep = is_kept.roll(-1, dims=1)
    is_query = at_query[is_kept]  # of the kept positions, row by row
    queries = trajectories.queries.to(lm.device)
    drawn = torch.full(is_query.shape, -1, device=lm.device).masked_scatter(is_query, queries.flatten())
    scored, hidden = _score_tokens(
        lm, tokens, keep, is_query, drawn, policy.sampling, reference_model, capture=policy.captured_module
    )
    available = trajectories.available_mask.to(lm.device)
    captured = None if hidden is None else hidden[at_query].unflatten(0, shape)
    vectors = policy.query_vectors(keys, captured=captured, queries=queries)  # batch step dimension
    selections = selection_log_probs(  # batch step pairs
        vectors, keys.vectors, available_mask=available, temperature=policy.temperature
    )
    return ActionScores(
        query_log_probs=scored.log_probs.unflatten(0, shape),
        query_entropy=scored.entropy.unflatten(0, shape),
        selection_log_probs=selections.gather(-1, trajectories.order.to(lm.device)[..., None])[..., 0],
        selection_entropy=selection_entropy(selections, available),
        query_kl=scored.query_kl,
        value_kl=scored.value_kl,
    )


@dataclass(frozen=True)
class _TokenScores:
    """Of query tokens their log-probability and the entropy they were drawn from, and KLs to the reference model."""

    log_probs: Float[Tensor, " query"]
    entropy: Float[Tensor, " query"]
    query_kl: Float[Tensor, " query"] | None
    value_kl: Float[Tensor, " value"] | None


def _score_tokens(
    lm: LanguageModel,
    tokens: Int[Tensor, "batch time"],
    keep: Bool[Tensor, "batch time"],
    is_query: Bool[Tensor, " kept"],
    drawn: Int[Tensor, " kept"],
    sampling: Sampling,
    reference_model: LanguageModel | None,
    *,
    capture: nn.Module | None,
) -> tuple[_TokenScores, Tensor | None]:
    """Scores of the kept tokens, and what ``capture`` puts out.

    Where the logits are many, the head is applied to a few positions at a time, forth and back: with a vocabulary of
    128,256 a single copy of the logits of 1,000 positions takes 489 MiB, and the loss needs about ten.
    """

    def query_scores(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = sampling.log_probs(logits, drawn=chosen)  # query vocab
        return log_probs.gather(-1, chosen[:, None])[:, 0], entropy(log_probs)

    in_parts = len(is_query) * lm.vocab_size > MAX_SAVED_LOGITS and lm.has_linear_head
    if reference_model is not None:
        in_parts = in_parts and reference_model.has_linear_head
    if not in_parts:
        output = lm.forward(tokens, keep=keep, capture=capture)
        query_kl = value_kl = None
        log_probs, entropies = query_scores(output.logits[is_query], drawn[is_query])
        if reference_model is not None:
            with torch.no_grad():
                reference_logits = reference_model.forward(tokens, keep=keep).logits
            query_kl = kl_exact(output.logits[is_query], reference_logits[is_query])
            value_kl = kl_exact(output.logits[~is_query], reference_logits[~is_query])
        return _TokenScores(log_probs, entropies, query_kl, value_kl), output.captured

    states, captured = lm.states(tokens, keep=keep, capture=capture)  # kept width
    num_rows = max(1, MAX_SAVED_LOGITS // lm.vocab_size)
    if reference_model is None:
        log_probs, entropies = in_blocks(
            lambda part, chosen: query_scores(lm.logits_of(part), chosen),
            states[is_query],
            drawn[is_query],
            num_rows=num_rows,
        )
        return _TokenScores(log_probs, entropies, None, None), captured
    with torch.no_grad():
        reference_states, _ = reference_model.states(tokens, keep=keep)

    def divergence(logits: Tensor, reference_part: Tensor) -> Tensor:
        with torch.no_grad():
            reference_logits = reference_model.logits_of(reference_part)
        return kl_exact(logits, reference_logits)

    def query_block(part: Tensor, reference_part: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        logits = lm.logits_of(part)
        return (*query_scores(logits, chosen), divergence(logits, reference_part))

    log_probs, entropies, query_kl = in_blocks(
        query_block, states[is_query], reference_states[is_query], drawn[is_query], num_rows=num_rows
    )
    value_kl = states.new_zeros(0)
    if not bool(is_query.all()):
        (value_kl,) = in_blocks(
            lambda part, reference_part: (divergence(lm.logits_of(part), reference_part),),
            states[~is_query],
            reference_states[~is_query],
            num_rows=num_rows,
        )
    return _TokenScores(log_probs, entropies, query_kl, value_kl), captured
