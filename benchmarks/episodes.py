"""Batches of reading episodes against the naive way and against a KV cache per episode, per episode read.

The naive way and the kept ``DynamicCache`` go one episode at a time, so one of theirs stands for all; its tokens are
compared with ours first (``benchmarks.episode`` compares every log-probability at smaller sizes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import episode
from benchmarks.limits import arithmetic_seconds, forward_operations
from benchmarks.measurement import OURS, Bar, Comparison, measured_precision, require_equal
from benchmarks.models import starter
from benchmarks.naive_episode import LAYER

KEPT = "kept DynamicCache, one at a time"


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """8 and 16 episodes of 20 and 60 pairs; a query has 16 tokens and a value 32."""
    if quick:
        yield compare(episode.Sizes(2, 3, 4, 8), at_least=None)
        return
    for pairs, at_least in ((20, 10.0), (60, 15.0)):
        for episodes in (8, 16):
            yield compare(episode.Sizes(episodes, pairs, 16, 32), at_least=at_least)


def compare(sizes: episode.Sizes, *, at_least: float | None) -> Comparison:
    """One batch."""
    lm = starter()
    case = episode.prepare(lm, sizes, seed=0)
    one = replace(case, orders=case.orders[:1])
    greedy = measured_precision(lambda: episode.ours(case))().queries[0]
    differing = float((greedy != episode.naive(one).queries[0]).double().mean())
    kept = float((greedy != kept_cache(one)).double().mean())
    length = len(case.article.prompt) + sizes.pairs * (sizes.query_tokens + sizes.value_tokens)
    return Comparison(
        benchmark="episodes",
        case=f"{sizes.episodes} episodes x {sizes.pairs} pairs, {sizes.query_tokens} query and {sizes.value_tokens} "
        "value tokens",
        ways={
            OURS: measured_precision(lambda: episode.ours(case)),
            "naive": lambda: episode.naive(one),
            KEPT: lambda: kept_cache(one),
        },
        bars=(Bar("naive", at_least=at_least),) if at_least else (),
        agreement={
            "share of greedy tokens": require_equal("greedy tokens", differing, at_most=0.05),
            "share of the KV cache's": require_equal("greedy tokens", kept, at_most=0.05),
        },
        details={"parameters": lm.model.num_parameters(), "model": "starter"},
        units={OURS: sizes.episodes, "naive": 1, KEPT: 1},
        # Every token encoded once: what the naive way does again is not part of the work.
        ideal_seconds={
            way: arithmetic_seconds(forward_operations(lm, rows, length), (way,), lm.device)[way]
            for way, rows in ((OURS, sizes.episodes), ("naive", 1), (KEPT, 1))
        },
    )


@torch.no_grad()
def kept_cache(case: episode.Case) -> torch.Tensor:
    """Greedy queries of the first episode with Transformers' model and cache: nothing is encoded twice."""
    model: Any = case.policy.lm.model
    cache = DynamicCache(config=model.config)
    suppressed = list(case.policy.lm.special_tokens)

    def read(tokens: list[int]) -> torch.Tensor:
        output = model(
            input_ids=torch.tensor([tokens], device=model.device),
            past_key_values=cache,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        output.hidden_states[LAYER].float()  # what the query's vector is made of
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    queries = []
    logits = read(list(case.article.prompt))
    for pair in case.orders[0]:
        query = []
        for _ in range(case.sizes.query_tokens):
            logits[suppressed] = -torch.inf
            query.append(int(logits.argmax()))
            logits = read([query[-1]])
        queries.append(query)
        logits = read(list(case.article.values[pair]))
    return torch.tensor(queries)
