"""Rows of ``decisions.jsonl``: every action of the policy, enough to recompute its rewards with plain Transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.systems.reading.articles import Kind, TokenSequence
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.rewards import SequenceScores


def decision_rows(
    policy: Policy,
    trajectories: Trajectories,
    scores: Sequence[SequenceScores],
    rewards: Float[Tensor, " batch"],
    *,
    step: int,
    methods: Sequence[str],
    first_episode: int = 0,
    normalised_rewards: Float[Tensor, " batch"] | None = None,
    kept_mask: Bool[Tensor, " batch"] | None = None,
    reference_scores: Sequence[SequenceScores] | None = None,
    order_imposed: bool = False,
) -> list[dict[str, Any]]:
    """One row per episode.

    Args:
        policy: wrote the queries.
        trajectories: its actions.
        scores: the reader's, of the same episodes, in the reward's context.
        rewards: before normalisation, nats per token.
        step: the update; after training, the last one.
        methods: of each episode, the method that acted ("learned", a baseline, …).
        first_episode: number of the first of these episodes in the run.
        normalised_rewards: after normalisation; None where there is none.
        kept_mask: True = kept by the filter; None keeps all.
        reference_scores: of the same spans, where normalisation subtracts them.
        order_imposed: True = the order was given and the policy wrote queries only.
    """
    normalised_rewards = rewards if normalised_rewards is None else normalised_rewards
    kept_mask = torch.ones(len(trajectories), dtype=torch.bool) if kept_mask is None else kept_mask
    rows = []
    for index, sequence in enumerate(trajectories.policy_sequences()):
        # The names of these keys are part of the run folder's format.
        row = {
            "step": step,
            "episode": first_episode + index,
            "arm": methods[index],
            "article": trajectories.article.name,
            "policy_token_ids": list(sequence.tokens),
            "policy_spans": _span_rows(sequence, ["query"], sampled_log_probs=trajectories.query_log_probs[index]),
            "texts": [policy.lm.decode(sequence.tokens[span.start : span.end]) for span in sequence.spans],
            "reader_token_ids": list(scores[index].sequence.tokens),
            "reader_spans": _span_rows(
                scores[index].sequence,
                ["value", "probe"],
                log_probs=scores[index].log_probs,
                reference_log_probs=reference_scores[index].log_probs if reference_scores else (),
            ),
            "temperature": policy.temperature,
            "order_imposed": order_imposed,
            "selection_probabilities": trajectories.selection_log_probs[index].double().exp().tolist(),
            "reward": float(rewards[index]),
            "normalised_reward": float(normalised_rewards[index]),
            "passed": bool(kept_mask[index]),
        }
        # Needed to recompute the reward where normalisation subtracts the score after these queries.
        if trajectories.initial_queries is not None:
            row["reference_query_token_ids"] = trajectories.initial_queries[index].tolist()
        rows.append(row)
    return rows


def _span_rows(
    sequence: TokenSequence, kinds: Sequence[Kind], **columns: Iterable[Float[Tensor, " token"]]
) -> list[dict[str, Any]]:
    """One row per span; the numbers of each column go, in order, to the spans of these kinds."""
    rows: list[dict[str, Any]] = [
        {"kind": span.kind, "start": span.start, "end": span.end, "pair": None if span.pair < 0 else span.pair}
        for span in sequence.spans
    ]
    for name, tensors in columns.items():
        # A column without numbers (there is no reference) leaves its key out.
        for row, numbers in zip((row for row in rows if row["kind"] in kinds), tensors, strict=False):
            row[name] = numbers.double().tolist()
    return rows
