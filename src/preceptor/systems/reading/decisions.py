"""Rows of ``decisions.jsonl``: every action of the teacher, enough to recompute its rewards with plain Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.material import Row, Span
from preceptor.systems.reading.policy import Trajectories
from preceptor.systems.reading.reader import Scored


def decision_rows(
    trajectories: Trajectories,
    scored: Sequence[Scored],
    *,
    lm: LanguageModel,
    step: int,
    arm: str,
    first_episode: int,
    temperature: float,
    rewards: Float[Tensor, " batch"],
    normalised_rewards: Float[Tensor, " batch"],
    passed: Bool[Tensor, " batch"],
    reference: Sequence[Scored] | None = None,
    orders_imposed: bool = False,
) -> list[dict[str, Any]]:
    """One row an episode.

    Args:
        trajectories: what the policy did.
        scored: the reader's rows of the same episodes, in the context that the reward uses.
        lm: the policy, to spell tokens.
        step: update, 0 for what was done before or after training.
        arm: who acted.
        first_episode: number of the first of these episodes in the run.
        temperature: of the selection.
        rewards: before normalisation, nats per token.
        normalised_rewards: after it.
        passed: the filter.
        reference: the reference's scores of the same spans, where the normalisation uses one.
        orders_imposed: True = the arm's order was given and the policy wrote queries only.
    """
    rows = []
    for index in range(len(trajectories)):
        order, queries = trajectories.order[index].tolist(), trajectories.queries[index].tolist()
        policy_row = trajectories.material.query_row(order, queries)
        reader_row = scored[index].row
        rows.append(
            {
                "step": step,
                "episode": first_episode + index,
                "arm": arm,
                "article": trajectories.material.reading.name,
                "policy_token_ids": list(policy_row.tokens),
                "policy_spans": _policy_spans(policy_row, trajectories.query_log_probs[index]),
                "texts": [lm.decode(policy_row.tokens[span.start : span.end]) for span in policy_row.spans],
                "reader_token_ids": list(reader_row.tokens),
                "reader_spans": _reader_spans(scored[index], None if reference is None else reference[index]),
                "temperature": temperature,
                "order_imposed": orders_imposed,
                "selection_probabilities": trajectories.selection_log_probs[index].double().exp().tolist(),
                "reward": float(rewards[index]),
                "normalised_reward": float(normalised_rewards[index]),
                "passed": bool(passed[index]),
                **_reference_queries(trajectories, index),
            }
        )
    return rows


def _reference_queries(trajectories: Trajectories, index: int) -> dict[str, Any]:
    if trajectories.reference_queries is None:
        return {}
    return {"reference_query_token_ids": trajectories.reference_queries[index].tolist()}


def _policy_spans(row: Row, query_log_probs: Float[Tensor, "step token"]) -> list[dict[str, Any]]:
    sampled = iter(query_log_probs.double().tolist())
    return [
        {**_span(span), **({"sampled_log_probs": next(sampled)} if span.kind == "query" else {})} for span in row.spans
    ]


def _reader_spans(scored: Scored, reference: Scored | None) -> list[dict[str, Any]]:
    values = iter(scored.log_probs)
    references = iter(reference.log_probs if reference is not None else ())
    rows = []
    for span in scored.row.spans:
        row = _span(span)
        if span.kind in ("value", "probe"):
            row["log_probs"] = next(values).double().tolist()
            if (log_probs := next(references, None)) is not None:
                row["reference_log_probs"] = log_probs.double().tolist()
        rows.append(row)
    return rows


def _span(span: Span) -> dict[str, Any]:
    return {"kind": span.kind, "start": span.start, "end": span.end, "pair": None if span.pair < 0 else span.pair}
