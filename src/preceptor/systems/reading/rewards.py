"""The student and the reward: a reader scores what was read, and each step is credited with a part of that score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import branch_log_probs, token_log_probs
from preceptor.objectives.advantages import group_normalised, leave_one_out, reward_to_go
from preceptor.objectives.statistics import RunningMoments
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.articles import TokenizedArticle, TokenSequence
from preceptor.systems.reading.environment import Trajectories

Context = Literal["values", "queries"]
CONTEXTS: tuple[Context, ...] = ("values", "queries")
Branch = tuple[int, Sequence[int], int]
"""Where a continuation starts, its tokens, and how many of them are given rather than scored."""


# ---- the reader ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceScores:
    """A sequence and the reader's log-probabilities, in nats, of each of its value and probe spans, in order."""

    sequence: TokenSequence
    log_probs: tuple[Float[Tensor, " token"], ...]


class Reader(Protocol):
    """What the system asks of a student."""

    def article(self, policy_article: TokenizedArticle) -> TokenizedArticle:
        """The same article in the reader's own tokens."""
        ...

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        """The policy's query in the reader's own tokens."""
        ...

    def score(self, sequences: Sequence[TokenSequence]) -> list[SequenceScores]:
        """Every value and probe span of each sequence, given everything before it."""
        ...

    def branches(self, sequence: TokenSequence, branches: Sequence[Branch]) -> list[Float[Tensor, " token"]]:
        """Scores of continuations of prefixes of ``sequence`` (:func:`~preceptor.lm.score.branch_log_probs`)."""
        ...


class LanguageModelReader:
    """A language model as the student.

    Args:
        lm: scores; it may be the policy itself.
        policy_lm: the policy, if its vocabulary is not the reader's; queries are then passed on as text.
        articles: in the reader's tokens by name, needed with ``policy_lm``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        policy_lm: LanguageModel | None = None,
        articles: Mapping[str, TokenizedArticle] | None = None,
    ) -> None:
        self.lm = lm
        self._policy_lm = policy_lm
        self._articles = articles or {}

    def article(self, policy_article: TokenizedArticle) -> TokenizedArticle:
        return policy_article if self._policy_lm is None else self._articles[policy_article.name]

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        return query if self._policy_lm is None else self.lm.encode(self._policy_lm.decode(query))

    def score(self, sequences: Sequence[TokenSequence]) -> list[SequenceScores]:
        spans = [sequence.ranges("value", "probe") for sequence in sequences]
        # One tensor per sequence, the scored tokens of all its spans one after another.
        log_probs = token_log_probs(self.lm, [sequence.tokens for sequence in sequences], spans=spans)
        return [
            SequenceScores(sequence, scores.split([end - start for start, end in ranges]))
            for sequence, ranges, scores in zip(sequences, spans, log_probs, strict=True)
        ]

    def branches(self, sequence: TokenSequence, branches: Sequence[Branch]) -> list[Float[Tensor, " token"]]:
        return branch_log_probs(self.lm, sequence.tokens, branches)


class SharedReader:
    """A reader whose sequences are scored by the processes of a run together, each its part of them.

    Args:
        reader: the same one in every process.
        world: the processes.
    """

    def __init__(self, reader: Reader, world: World) -> None:
        self._reader = reader
        self._world = world

    def article(self, policy_article: TokenizedArticle) -> TokenizedArticle:
        return self._reader.article(policy_article)

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        return self._reader.query_tokens(query)

    def score(self, sequences: Sequence[TokenSequence]) -> list[SequenceScores]:
        lengths = [[end - start for start, end in each.ranges("value", "probe")] for each in sequences]

        def flat(rows: slice) -> list[Tensor]:
            return [torch.cat(each.log_probs) for each in self._reader.score(sequences[rows])]

        scores = self._world.gathered_lists([sum(each) for each in lengths], flat)
        return [
            SequenceScores(sequence, each.split(sizes))
            for sequence, each, sizes in zip(sequences, scores, lengths, strict=True)
        ]

    def branches(self, sequence: TokenSequence, branches: Sequence[Branch]) -> list[Float[Tensor, " token"]]:
        return self._reader.branches(sequence, branches)


def shared(reader: Reader, world: World) -> Reader:
    """``reader`` as the processes of a run share it; itself in one process."""
    return reader if world.size == 1 else SharedReader(reader, world)


def reader_sequences(
    reader: Reader, trajectories: Trajectories, *, context: Context, with_probe: bool = False
) -> list[TokenSequence]:
    """What the reader sees of each trajectory: the values alone, or the queries too; then the probe if wanted."""
    article = reader.article(trajectories.article)
    if context == "values":
        return [article.reader_sequence(order, with_probe=with_probe) for order in trajectories.order.tolist()]
    return [
        article.policy_sequence(order, [reader.query_tokens(query) for query in queries], with_probe=with_probe)
        for order, queries in zip(trajectories.order.tolist(), trajectories.queries.tolist(), strict=True)
    ]


def probe_curve(reader: Reader, article: TokenizedArticle, order: Sequence[int]) -> Float[Tensor, " read"]:
    """Mean log-probability in nats per probe token after 0, 1, … pairs of ``order``, in one pass.

    The probe sentences are scored as one passage, which branches off the values read so far.

    Raises:
        DataError: the article has no probe.
    """
    if not article.probe:
        raise DataError(f"{article.name} has no probe sentences; set data.num_probes to at least 1")
    sequence = article.reader_sequence(order)
    # The first branch grows out of the begin token alone: nothing has been read yet.
    ends = [1, *(end for _, end in sequence.ranges("value"))]
    branches = [(end, article.probe, 0) for end in ends]
    return torch.stack([log_probs.mean() for log_probs in reader.branches(sequence, branches)])


def scores_after_initial_queries(
    reader: Reader, trajectories: Trajectories, sequences: Sequence[TokenSequence], *, world: World = ALONE
) -> list[SequenceScores]:
    """Each value after the query that the *initial* policy wrote in its place, everything before it unchanged.

    That query and the value branch off the shared trajectory, so nothing is encoded twice.

    Raises:
        DataError: the trajectories hold no queries of the initial policy.
    """
    if trajectories.initial_queries is None:
        raise DataError("untrained_query needs queries of the initial policy; run the episodes with `initial_policy`")
    article = reader.article(trajectories.article)
    places = list(zip(sequences, trajectories.order.tolist(), trajectories.initial_queries.tolist(), strict=True))
    lengths = [[len(article.turns[pair]) for pair in order] for _, order, _ in places]

    def flat(rows: slice) -> list[Tensor]:
        scores = []
        for sequence, order, queries in places[rows]:
            branches: list[Branch] = []
            for (start, _), pair, query in zip(sequence.ranges("query"), order, queries, strict=True):
                # The branch starts where the policy's own query stands; the other query is given, the value is scored.
                given = (*reader.query_tokens(query), *article.chat_markers.before_value)
                branches.append((start, (*given, *article.turns[pair]), len(given)))
            scores.append(torch.cat(reader.branches(sequence, branches)))
        return scores

    every = world.gathered_lists([sum(each) for each in lengths], flat)
    return [
        SequenceScores(sequence, scores.split(sizes))
        for sequence, scores, sizes in zip(sequences, every, lengths, strict=True)
    ]


# ---- rewards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """What a batch of trajectories earned; ``-`` subtracts in every place.

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

    def __sub__(self, other: Rewards) -> Rewards:
        return Rewards(
            self.step_rewards - other.step_rewards,
            self.position_means - other.position_means,
            self.total - other.total,
        )


@dataclass(frozen=True)
class BatchRewards:
    """Rewards of a batch: raw and normalised in the reward's context, and raw in both contexts.

    Attributes:
        scores: the reader's, in the reward's context.
        reference_scores: what normalisation subtracts, or None.
        raw, normalised: rewards in the reward's context.
        values_context, queries_context: rewards from the values in either context.
    """

    scores: list[SequenceScores]
    reference_scores: list[SequenceScores] | None
    raw: Rewards
    normalised: Rewards
    values_context: Rewards
    queries_context: Rewards


def batch_rewards(
    trajectories: Trajectories,
    *,
    reader: Reader,
    initial_reader: Reader,
    kind: Literal["values", "probe"],
    context: Context,
    normalisation: Literal["none", "untrained_query", "untrained_reader"],
    world: World = ALONE,
) -> BatchRewards:
    """Score a batch in both contexts; the reward comes from ``context``.

    Args:
        trajectories: what was read.
        reader: scores it.
        initial_reader: the policy before training, subtracted by ``untrained_reader`` normalisation.
        kind: log-probability of the values read, or of the probe after them.
        context: what the reader sees for the reward.
        normalisation: what is subtracted.
        world: the processes of the run, which share what ``untrained_query`` costs.
    """
    probe = kind == "probe"
    # Both contexts are always measured: a reward that sees the queries pays for their text before it pays for order.
    contexts = {
        each: reader.score(reader_sequences(reader, trajectories, context=each, with_probe=probe and each == context))
        for each in CONTEXTS
    }
    scores, measure = contexts[context], probe_rewards if probe else value_rewards
    raw, reference = measure(scores), None
    if normalisation == "untrained_query":
        reference = scores_after_initial_queries(reader, trajectories, [each.sequence for each in scores], world=world)
    elif normalisation == "untrained_reader":
        reference = initial_reader.score(
            reader_sequences(initial_reader, trajectories, context=context, with_probe=probe)
        )
    return BatchRewards(
        scores=scores,
        reference_scores=reference,
        raw=raw,
        normalised=raw if reference is None else raw - measure(reference),
        values_context=value_rewards(contexts["values"]),
        queries_context=value_rewards(contexts["queries"]),
    )


def value_rewards(scores: Sequence[SequenceScores]) -> Rewards:
    """Rewards from value log-probabilities; the probe, where a sequence has one, is left out."""
    sums, counts = _value_sums(scores)  # batch step
    step_rewards = sums / counts.sum(1, keepdim=True)  # over the tokens of the whole trajectory
    return Rewards(step_rewards, position_means=sums / counts, total=step_rewards.sum(1))


def probe_rewards(scores: Sequence[SequenceScores]) -> Rewards:
    """Mean log-probability per probe token after everything was read, earned at the last step."""
    total = torch.stack([each.log_probs[-1].mean() for each in scores])  # the probe's span is the last
    values = value_rewards(scores)
    step_rewards = torch.zeros_like(values.step_rewards)
    step_rewards[:, -1] = total
    return Rewards(step_rewards, position_means=values.position_means, total=total)


def _value_sums(scores: Sequence[SequenceScores]) -> tuple[Float[Tensor, "batch step"], Float[Tensor, "batch step"]]:
    """Summed log-probability (nats) and number of tokens of each value."""
    sums, counts = [], []
    for each in scores:
        # The log-probabilities of a probe come last, so those of the values are the first ones.
        values = each.log_probs[: len(each.sequence.ranges("value"))]
        # Summed in float64: the sums of two orders differ by little.
        sums.append([float(log_probs.double().sum()) for log_probs in values])
        counts.append([len(log_probs) for log_probs in values])
    return torch.tensor(sums), torch.tensor(counts, dtype=torch.float32)


# ---- credit ----------------------------------------------------------------------------------------------------------


class PairBaseline:
    """A running mean log-probability per token of each pair's value, by article.

    Some sentences are harder than others whenever they are read. Subtracting a value's average log-probability leaves
    the effect of its *place*. When all pairs are read, the subtracted sum is the same for every order, so the objective
    is unchanged and only its variance falls; when a budget leaves pairs out, choosing easy sentences no longer pays.

    Args:
        decay: share of the old mean that an update keeps, in [0, 1).
    """

    def __init__(self, *, decay: float = 0.9) -> None:
        self._decay = decay
        self._means: dict[str, dict[int, float]] = {}

    def subtract(
        self, article: str, order: Tensor, scores: Sequence[SequenceScores], rewards: Rewards
    ) -> Float[Tensor, "batch step"]:
        """``step_rewards`` less each value's mean, after taking this batch into the means.

        Values that are not finite stay out of the means; a pair that was never finite gives NaN.
        """
        self._update(article, order, rewards)
        means = self._means[article]
        expected = torch.tensor([[means.get(pair, math.nan) for pair in row] for row in order.tolist()])  # batch step
        _, counts = _value_sums(scores)
        # A mean per token, times the step's share of the trajectory's value tokens: the unit of a step reward.
        return rewards.step_rewards - expected * counts / counts.sum(1, keepdim=True)

    def _update(self, article: str, order: Tensor, rewards: Rewards) -> None:
        means = self._means.setdefault(article, {})
        for pair in order.unique().tolist():
            values = rewards.position_means[order == pair]  # wherever in the order the pair was read
            values = values[values.isfinite()]
            if len(values) == 0:
                continue
            batch_mean = float(values.double().mean())
            old = means.get(pair, batch_mean)  # the first batch is taken as it is
            means[pair] = self._decay * old + (1 - self._decay) * batch_mean

    def state_dict(self) -> dict[str, dict[int, float]]:
        """Means by article and pair."""
        return {article: dict(means) for article, means in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[int, float]]) -> None:
        """Restore :meth:`state_dict`."""
        self._means = {article: dict(means) for article, means in state.items()}


class ReturnBaseline:
    """The running mean of what each step is credited with, by article, over all batches but the present one.

    It is the mean of the returns themselves, whatever they are made of: with the pair baseline they are centred already
    and their mean is near 0; of a probe, earned at the last step, every step has the whole.
    """

    def __init__(self) -> None:
        self._moments: dict[str, list[RunningMoments]] = {}

    def advantages(self, article: str, returns: Float[Tensor, "batch step"]) -> Float[Tensor, "batch step"]:
        """``returns`` less each step's mean so far, and 0 in the first batch of an article, of which nothing is known.

        The batch is taken into the means afterwards: a mean that holds an action's own reward would bias the gradient.
        """
        columns = returns.double().unbind(1)
        known = article in self._moments
        moments = self._moments.setdefault(article, [RunningMoments() for _ in columns])
        expected = torch.tensor([each.mean for each in moments], dtype=torch.float64)  # step
        for each, column in zip(moments, columns, strict=True):
            each.update(column)
        return (returns - expected).to(returns.dtype) if known else torch.zeros_like(returns)

    def state_dict(self) -> dict[str, list[dict[str, int | float]]]:
        """Moments of each step, by article."""
        return {article: [each.state_dict() for each in moments] for article, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[dict[str, int | float]]]) -> None:
        """Restore :meth:`state_dict`."""
        self._moments = {article: [RunningMoments() for _ in moments] for article, moments in state.items()}
        for article, moments in state.items():
            for each, saved in zip(self._moments[article], moments, strict=True):
                each.load_state_dict(saved)


def step_advantages(
    step_rewards: Float[Tensor, "batch step"],
    *,
    usable_mask: Bool[Tensor, " batch"],
    credit: Literal["following", "trajectory"],
    advantage: Literal["leave_one_out", "group_normalised", "running_mean"],
    article: str,
    baseline: ReturnBaseline,
) -> Float[Tensor, "batch step"]:
    """The advantage of each step; 0 for a trajectory that is not usable.

    Args:
        step_rewards: what each step earned, nats per token; finite where usable.
        usable_mask: True = this trajectory's reward is finite and counts, as a sample and in the baseline.
        credit: a step is credited with itself and what follows, or with the whole trajectory.
        advantage: against the mean of the others, that divided by the batch's standard deviation, or against the mean
            of the batches of this article so far.
        article: that was read.
        baseline: used by ``running_mean``, and takes this batch in.
    """
    # A row that is not usable stays 0 and is no part of any baseline, so that one NaN spoils nothing else.
    advantages = torch.zeros_like(step_rewards)
    if not usable_mask.any():
        return advantages
    usable = step_rewards[usable_mask]
    returns = reward_to_go(usable, torch.ones_like(usable, dtype=torch.bool))  # usable step
    if credit == "trajectory":
        # The return of the first step is that of the whole trajectory.
        returns = returns[:, :1].expand_as(returns)
    if advantage == "leave_one_out":
        advantages[usable_mask] = leave_one_out(returns)
    elif advantage == "group_normalised":
        advantages[usable_mask] = group_normalised(returns)
    else:
        advantages[usable_mask] = baseline.advantages(article, returns)
    return advantages
