"""Rewards of a batch of trajectories, and the advantage that each step is credited with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.objectives.advantages import against_baseline, group_normalised, leave_one_out, reward_to_go
from preceptor.objectives.statistics import RunningMoments
from preceptor.systems.reading.policy import Trajectories
from preceptor.systems.reading.reader import Context, Reader, Scored, reader_rows, scores_after_reference_queries


@dataclass(frozen=True)
class Rewards:
    """What a batch of trajectories earned under one reading.

    Attributes:
        step_rewards: summed value log-probabilities of a step over the trajectory's value tokens, so that a row sums
            to the trajectory's mean log-probability per value token (nats per token).
        position_means: mean log-probability per value token of each step, nats.
        total: the trajectory's reward, nats per token.
    """

    step_rewards: Float[Tensor, "batch step"]
    position_means: Float[Tensor, "batch step"]
    total: Float[Tensor, " batch"]

    def at(self, indices: Tensor) -> Rewards:
        """The rewards of the trajectories at ``indices``."""
        return Rewards(self.step_rewards[indices], self.position_means[indices], self.total[indices])


@dataclass(frozen=True)
class Judged:
    """Rewards of a batch: raw and normalised in the reward's context, and raw in both contexts.

    Attributes:
        scored: the reader's rows in the reward's context.
        reference: what they are normalised by, or None.
        raw, normalised: rewards in the reward's context.
        values_context, queries_context: rewards from the values in either context.
    """

    scored: list[Scored]
    reference: list[Scored] | None
    raw: Rewards
    normalised: Rewards
    values_context: Rewards
    queries_context: Rewards


def judge(
    trajectories: Trajectories,
    *,
    reader: Reader,
    untrained_reader: Reader,
    kind: Literal["values", "probe"],
    context: Context,
    normalisation: Literal["none", "untrained_query", "untrained_reader"],
) -> Judged:
    """Score a batch in both contexts; the reward comes from ``context``.

    Args:
        trajectories: what was read.
        reader: scores it.
        untrained_reader: of ``untrained_reader`` normalisation.
        kind: log-probability of the values read, or of the probe after them.
        context: what the reader sees for the reward.
        normalisation: what is subtracted.
    """
    probe = kind == "probe"
    contexts: dict[Context, list[Scored]] = {}
    for each in get_args(Context):
        contexts[each] = reader.score(
            reader_rows(reader, trajectories, context=each, with_probe=probe and each == context)
        )
    scored = contexts[context]
    measure = probe_rewards if probe else value_rewards
    raw, reference = measure(scored), None
    if normalisation == "untrained_query":
        reference = scores_after_reference_queries(reader, trajectories, [row.row for row in scored])
    elif normalisation == "untrained_reader":
        reference = untrained_reader.score(
            reader_rows(untrained_reader, trajectories, context=context, with_probe=probe)
        )
    return Judged(
        scored=scored,
        reference=reference,
        raw=raw,
        normalised=raw if reference is None else difference(raw, measure(reference)),
        values_context=value_rewards(contexts["values"]),
        queries_context=value_rewards(contexts["queries"]),
    )


def value_rewards(scored: Sequence[Scored]) -> Rewards:
    """Rewards from value log-probabilities; the probe, where a row has one, is left out."""
    sums, counts = _value_sums(scored)
    step_rewards = sums / counts.sum(1, keepdim=True)
    return Rewards(step_rewards, position_means=sums / counts, total=step_rewards.sum(1))


def probe_rewards(scored: Sequence[Scored]) -> Rewards:
    """Mean log-probability per probe token after everything was read, earned at the last step."""
    total = torch.stack([row.log_probs[-1].mean() for row in scored])
    values = value_rewards(scored)
    step_rewards = torch.zeros_like(values.step_rewards)
    step_rewards[:, -1] = total
    return Rewards(step_rewards, position_means=values.position_means, total=total)


def difference(rewards: Rewards, reference: Rewards) -> Rewards:
    """``rewards`` normalised by what the reference gets in the same places."""
    return Rewards(
        rewards.step_rewards - reference.step_rewards,
        rewards.position_means - reference.position_means,
        rewards.total - reference.total,
    )


def _value_sums(scored: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    sums, counts = [], []
    for row in scored:
        spans = [span for span in row.row.spans if span.kind in ("value", "probe")]
        values = [log_probs for span, log_probs in zip(spans, row.log_probs, strict=False) if span.kind == "value"]
        sums.append([float(log_probs.double().sum()) for log_probs in values])
        counts.append([len(log_probs) for log_probs in values])
    return torch.tensor(sums), torch.tensor(counts, dtype=torch.float32)


class PairBaseline:
    """A running mean log-probability per token of each pair's value, by article.

    Some sentences are harder than others whenever they are read. Subtracting what a value gets on average from what it
    got here leaves what its *place* was worth. When all pairs are read, the subtracted sum is the same for every order,
    so the objective is unchanged and only its variance falls; when a budget leaves pairs out, the policy is no longer
    paid for choosing easy sentences.

    Args:
        decay: share of the old mean that an update keeps, in [0, 1).
    """

    def __init__(self, *, decay: float = 0.9) -> None:
        self._decay = decay
        self._means: dict[str, dict[int, float]] = {}

    def subtract(
        self, article: str, order: Tensor, scored: Sequence[Scored], rewards: Rewards
    ) -> Float[Tensor, "batch step"]:
        """``step_rewards`` less each value's mean, after taking this batch into the means.

        What is not finite stays out of the means; a value that never had a finite log-probability gives NaN.
        """
        self._update(article, order, rewards)
        means = self._means[article]
        expected = torch.tensor([[means.get(pair, math.nan) for pair in row] for row in order.tolist()])
        _, counts = _value_sums(scored)
        return rewards.step_rewards - expected * counts / counts.sum(1, keepdim=True)

    def _update(self, article: str, order: Tensor, rewards: Rewards) -> None:
        means = self._means.setdefault(article, {})
        for pair in order.unique().tolist():
            seen = rewards.position_means[order == pair]
            seen = seen[seen.isfinite()]
            if len(seen) == 0:
                continue
            batch_mean = float(seen.double().mean())
            old = means.get(pair, batch_mean)
            means[pair] = self._decay * old + (1 - self._decay) * batch_mean

    def state_dict(self) -> dict[str, dict[str, float]]:
        """JSON-able means by article and pair."""
        return {article: {str(pair): mean for pair, mean in means.items()} for article, means in self._means.items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore :meth:`state_dict`."""
        self._means = {article: {int(pair): mean for pair, mean in means.items()} for article, means in state.items()}


def step_advantages(
    step_rewards: Float[Tensor, "batch step"],
    *,
    usable: Bool[Tensor, " batch"],
    credit: Literal["following", "trajectory"],
    advantage: Literal["leave_one_out", "group_normalised", "running_mean"],
    moments: RunningMoments,
) -> Float[Tensor, "batch step"]:
    """The advantage of each step; 0 for a trajectory that is not usable.

    Args:
        step_rewards: what each step earned, nats per token; finite where ``usable``.
        usable: True = this trajectory's reward is finite and counts, as a sample and as a baseline.
        credit: a step is credited with what follows it (and itself), or with the whole trajectory.
        advantage: against the mean of the others, that divided by the batch's standard deviation, or against the mean
            of all trajectories so far (``moments``, of whole-trajectory sums).
        moments: running moments of trajectory sums; used by ``running_mean``.
    """
    advantages = torch.zeros_like(step_rewards)
    if not usable.any():
        return advantages
    counted = step_rewards[usable]
    returns = reward_to_go(counted, torch.ones_like(counted, dtype=torch.bool))
    if credit == "trajectory":
        returns = returns[:, :1].expand_as(returns)
    if advantage == "leave_one_out":
        advantages[usable] = leave_one_out(returns)
    elif advantage == "group_normalised":
        advantages[usable] = group_normalised(returns)
    else:
        # A step's expected return falls with the steps that remain, so the running mean is shared out evenly over them.
        num_steps = returns.shape[1]
        share = torch.arange(num_steps, 0, -1) / num_steps if credit == "following" else torch.ones(num_steps)
        advantages[usable] = against_baseline(returns, moments.mean * share.expand_as(returns))
    return advantages
