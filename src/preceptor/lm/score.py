"""Log-probabilities of given tokens, in plain rows or in branches that share a prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import ModelError, ShapeError
from preceptor.lm.model import LanguageModel

MAX_LOGITS = 2**25
"""Logits in one pass (positions times vocabulary): 128 MiB in float32."""


def pad_rows(rows: Sequence[Sequence[int]], *, filler: int, device: torch.device) -> Int[Tensor, "batch time"]:
    """Rows of tokens as one tensor, padded on the right with ``filler``."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([filler] * (width - len(row)))] for row in rows], device=device)


def span_mask(
    spans: Sequence[Sequence[tuple[int, int]]], *, width: int, device: torch.device
) -> Bool[Tensor, "batch time"]:
    """True at the positions ``start <= t < end`` of each row's spans."""
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for start, end in row_spans:
            mask[row, start:end] = True
    return mask.to(device)


def batches_by_length(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of rows, grouped into batches of similar length with at most ``max_tokens`` padded tokens (or one row).

    >>> batches_by_length([9, 2, 3, 2], max_tokens=9)
    [[1, 3, 2], [0]]
    """
    batches: list[list[int]] = []
    # Sorted by length, a batch pads little: at worst the difference between neighbours.
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Lengths ascend, so the row that would join is the longest of its batch and sets the padded width.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.no_grad()
def token_log_probs(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    spans: Sequence[Sequence[tuple[int, int]]],
    max_tokens: int | None = None,
) -> list[Float[Tensor, " token"]]:
    """Log-probability in nats of the tokens inside each row's spans, given everything before them in the row.

    Rows go through the model in batches of at most ``max_tokens`` padded tokens, sorted by length so that there is
    little padding. The result does not depend on the batches beyond rounding. No gradient is recorded.

    Args:
        lm: the model.
        rows: token ids; the first token of a row has nothing before it and cannot be scored.
        spans: for each row, the spans ``start <= t < end`` to score, in order and without overlap.
        max_tokens: padded tokens per pass; None limits the logits of a pass to ``MAX_LOGITS``.

    Returns:
        one float32 tensor per row on the CPU: the log-probabilities of its scored tokens, in order.

    Raises:
        ShapeError: a span starts at 0 or leaves its row, spans overlap or are out of order, or there is not one list of
            spans per row.
        ModelError: a row is longer than the model's context.
    """
    if len(rows) != len(spans):
        raise ShapeError(f"`spans` must hold one list for each of {len(rows)} rows, got {len(spans)}")
    for row, row_spans in zip(rows, spans, strict=True):
        _check_length(lm, len(row), "row")
        # Sorted edges say all at once: spans in order, disjoint, none at position 0, none beyond the row.
        edges = [1, *(edge for span in row_spans for edge in span), len(row)]
        if edges != sorted(edges):
            raise ShapeError(
                f"spans must be in order, without overlap, in 1..{len(row)} of their row, got {list(row_spans)}"
            )
    results = [torch.empty(0)] * len(rows)
    for batch in batches_by_length([len(row) for row in rows], max_tokens=max_tokens or _max_tokens(lm)):
        # Both [batch, longest row]; `scored` is True at the tokens of the spans.
        tokens = pad_rows([rows[index] for index in batch], filler=lm.begin_token, device=lm.device)
        scored = span_mask([spans[index] for index in batch], width=tokens.shape[1], device=lm.device)
        # The logits at t - 1 predict the token at t, so the mask moves one to the left. No span starts at 0, hence
        # nothing wraps around.
        log_probs = lm.chosen_log_probs(tokens, keep=scored.roll(-1, dims=1), chosen=tokens[scored]).cpu()
        # One flat tensor in row-major order, cut into rows again.
        for index, values in zip(batch, torch.split(log_probs, scored.sum(1).tolist()), strict=True):
            results[index] = values
    return results


@torch.no_grad()
def branch_log_probs(
    lm: LanguageModel,
    trunk: Sequence[int],
    branches: Sequence[tuple[int, Sequence[int], int]],
    *,
    max_tokens: int | None = None,
) -> list[Float[Tensor, " token"]]:
    """Log-probabilities in nats of branches of a common prefix, the trunk, which is encoded once per pass.

    Branch ``(at, tokens, given)`` continues ``trunk[:at]`` with ``tokens``; its first ``given`` tokens are read but not
    scored. A branch attends to ``trunk[:at]`` and to itself, never to another branch, and its positions count from
    ``at``, so the result is the same as for ``trunk[:at] + tokens`` encoded alone. No gradient is recorded.

    Args:
        lm: the model.
        trunk: token ids that the branches share.
        branches: ``(at, tokens, given)``, in any order.
        max_tokens: tokens of branches per pass, not counting the trunk; None is 2,048, or fewer if their logits would
            exceed ``MAX_LOGITS``.

    Returns:
        one float32 tensor per branch on the CPU, in the order of ``branches``.

    Raises:
        ShapeError: a branch starts at 0 or past the end of the trunk, or ``given`` exceeds its length.
        ModelError: the trunk, or a branch with its part of the trunk, is longer than the model's context.
    """
    _check_length(lm, len(trunk), "trunk")
    for at, tokens, given in branches:
        if not 0 < at <= len(trunk):
            raise ShapeError(f"a branch must start in 1..{len(trunk)} tokens of its trunk, got {at}")
        if not 0 <= given <= len(tokens):
            raise ShapeError(f"of a branch of {len(tokens)} tokens 0..{len(tokens)} can be given, got {given}")
        _check_length(lm, at + len(tokens), "branch")
    # Attention over a pack costs its length squared, so packs stay below a few thousand tokens.
    budget = max_tokens or min(2_048, _max_tokens(lm))
    # Filled in the given order: neighbours usually branch off at the same place and share logits there.
    packs: list[list[tuple[int, Sequence[int], int]]] = []
    room = 0
    for branch in branches:
        size = len(branch[1])
        if not packs or size > room:
            packs.append([])
            room = budget
        packs[-1].append(branch)
        room -= size
    return [log_probs for pack in packs for log_probs in _packed_branches(lm, trunk, pack)]


def _packed_branches(
    lm: LanguageModel, trunk: Sequence[int], branches: Sequence[tuple[int, Sequence[int], int]]
) -> list[Tensor]:
    """One pass over a single row: the trunk, then all ``branches`` one after the other."""
    # Row layout: trunk | branch 1 | branch 2 | … Causality hides later branches; earlier ones are masked below.
    length = len(trunk) + sum(len(tokens) for _, tokens, _ in branches)
    visible = torch.ones(length, length, dtype=torch.bool).tril()  # [query, key]
    packed, positions = list(trunk), list(range(len(trunk)))
    predictors: list[int] = []
    targets: list[int] = []
    for at, tokens, given in branches:
        begin, size = len(packed), len(tokens)
        visible[begin : begin + size, at:begin] = False  # neither the rest of the trunk nor earlier branches
        packed += tokens
        # Positions restart at `at`, as if the branch followed the trunk directly.
        positions += range(at, at + size)
        # The first token of a branch is predicted at the trunk's token before it, the others inside the branch.
        predictors += [at - 1, *range(begin, begin + size - 1)][given:size]
        targets += tokens[given:]
    keep = torch.zeros(length, dtype=torch.bool)  # [trunk + branches]
    keep[predictors] = True
    logits = lm.forward(
        torch.tensor([packed], device=lm.device),
        keep=keep[None].to(lm.device),
        attention_mask=visible[None].to(lm.device),
        positions=torch.tensor([positions], device=lm.device),
    ).logits
    # [positions marked, vocab]: branches that start at the same place share one row of logits, so look up which.
    row = (keep.cumsum(0) - 1)[predictors].to(lm.device)
    # log-softmax of single entries: logit − log Σ exp(logits), without the [kept, vocab] matrix of a full one.
    log_probs = logits[row, torch.tensor(targets, dtype=torch.long, device=lm.device)] - logits.logsumexp(-1)[row]
    return list(torch.split(log_probs.cpu(), [len(tokens) - given for _, tokens, given in branches]))


def _check_length(lm: LanguageModel, length: int, what: str) -> None:
    if not 0 < length <= lm.context_length:
        raise ModelError(
            f"a {what} of {length} tokens does not fit the context of {lm.context_length} tokens of {lm.name}; "
            "it must hold at least one and at most that many"
        )


def _max_tokens(lm: LanguageModel) -> int:
    # At least one row of ordinary length, however large the vocabulary.
    return max(MAX_LOGITS // lm.vocab_size, 512)
