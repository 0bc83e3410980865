"""Rows of tokens scored by the processes of a run together."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.lm.score import token_log_probs
from preceptor.runs.world import World


def shared_log_probs(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    spans: Sequence[Sequence[tuple[int, int]]],
    world: World,
    max_tokens: int | None = None,
) -> list[Float[Tensor, " token"]]:
    """:func:`~preceptor.lm.score.token_log_probs` of all rows, of which each process scores its part."""
    if world.size == 1:
        return token_log_probs(lm, rows, spans=spans, max_tokens=max_tokens)
    # Dealt like cards by length, so that every process has as many long rows: row order[0] is of process 0, …
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    order = [row for rank in range(world.size) for row in by_length[rank :: world.size]]

    def scored(part: slice) -> list[Tensor]:
        own = order[part]
        return token_log_probs(lm, [rows[row] for row in own], spans=[spans[row] for row in own], max_tokens=max_tokens)

    lengths = [sum(end - start for start, end in spans[row]) for row in order]
    scores = dict(zip(order, world.gathered_lists(lengths, scored), strict=True))
    return [scores[row] for row in range(len(rows))]
