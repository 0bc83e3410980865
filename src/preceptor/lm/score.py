"""Log-probabilities of given tokens in one pass, over plain rows or over rows with side branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import ModelError, ShapeError
from preceptor.lm.language_model import LanguageModel


MAX_LOGITS = 2**25
"""Logits held at once (kept positions times vocabulary): 128 MiB in float32."""


def pad_rows(rows: Sequence[Sequence[int]], *, filler: int, device: torch.device) -> Int[Tensor, "batch time"]:
    """Rows of tokens as one tensor, filled on the right with ``filler``."""
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


def chosen_log_probs(logits: Float[Tensor, "kept vocab"], tokens: Int[Tensor, " kept"]) -> Float[Tensor, " kept"]:
    """Log-probability in nats of each chosen token, without materialising a full log-softmax."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


@torch.no_grad()
def token_log_probs(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    spans: Sequence[Sequence[tuple[int, int]]],
    max_tokens: int | None = None,
) -> list[Float[Tensor, " token"]]:
    """Log-probability in nats of the tokens inside each row's spans, given everything before them in the row.

    Rows go through the model in batches of at most ``max_tokens`` padded tokens, sorted by length so that little is
    padded; the result does not depend on the batching beyond rounding.

    Args:
        lm: the model; no gradient is recorded.
        rows: token ids, each row starting with a token that is given (a span never starts at 0).
        spans: ``(start, end)`` stretches of each row that are scored, in order, without overlap.
        max_tokens: padded tokens per pass; None bounds the logits held at once by ``MAX_LOGITS``.

    Returns:
        one float32 tensor a row on the CPU, the log-probabilities of its scored tokens in order.

    Raises:
        ShapeError: a span starts at 0 or leaves its row.
        ModelError: a row is longer than the model's context.
    """
    for row, row_spans in zip(rows, spans, strict=True):
        if len(row) > lm.context_length:
            raise ModelError(
                f"a row of {len(row)} tokens does not fit the context of {lm.context_length} tokens of {lm.name}"
            )
        if any(not 0 < start <= end <= len(row) for start, end in row_spans):
            raise ShapeError(f"spans must satisfy 0 < start <= end <= {len(row)}, got {list(row_spans)}")
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in _batches([len(row) for row in rows], max_tokens=max_tokens or _max_tokens(lm)):
        tokens = pad_rows([rows[index] for index in batch], filler=lm.begin_token, device=lm.device)
        scored = span_mask([spans[index] for index in batch], width=tokens.shape[1], device=lm.device)
        log_probs = _masked_token_log_probs(lm, tokens, scored)
        counts = scored.sum(1).tolist()
        for index, values in zip(batch, log_probs.cpu().split(counts), strict=True):
            results[index] = values
    return results


@torch.no_grad()
def branch_log_probs(
    lm: LanguageModel,
    trunk: Sequence[int],
    branches: Sequence[tuple[int, Sequence[int], int]],
    *,
    max_tokens: int = 2_048,
) -> list[Float[Tensor, " token"]]:
    """Log-probabilities in nats of branches that grow out of one trunk, with the trunk encoded once per pass.

    Branch ``(at, tokens, given)`` continues ``trunk[:at]`` with ``tokens``; its first ``given`` tokens are read but not
    scored. A branch sees the trunk up to ``at`` and itself, never another branch, and counts its positions from ``at``,
    so the result is what encoding ``trunk[:at] + tokens`` on its own gives.

    Raises:
        ShapeError: a branch starts at 0 or past the trunk's end.
        ModelError: a branch is longer than the context allows.
    """
    for at, tokens, _ in branches:
        if not 0 < at <= len(trunk):
            raise ShapeError(f"a branch must start in 1..{len(trunk)} tokens of its trunk, got {at}")
        if at + len(tokens) > lm.context_length:
            raise ModelError(
                f"a branch of {at + len(tokens)} tokens does not fit the context of {lm.context_length} tokens of {lm.name}"
            )
    results: list[Tensor] = []
    start = 0
    while start < len(branches):
        end, size = start, len(trunk)
        while end < len(branches) and (end == start or size + len(branches[end][1]) <= max_tokens):
            size += len(branches[end][1])
            end += 1
        results += _packed_branches(lm, trunk, branches[start:end])
        start = end
    return results


def _packed_branches(
    lm: LanguageModel, trunk: Sequence[int], branches: Sequence[tuple[int, Sequence[int], int]]
) -> list[Tensor]:
    length = len(trunk) + sum(len(tokens) for _, tokens, _ in branches)
    visible = torch.zeros(length, length, dtype=torch.bool)
    visible[: len(trunk), : len(trunk)] = torch.ones(len(trunk), len(trunk), dtype=torch.bool).tril()
    packed, positions = list(trunk), list(range(len(trunk)))
    rows: list[int] = []
    targets: list[int] = []
    for at, tokens, given in branches:
        begin, size = len(packed), len(tokens)
        visible[begin : begin + size, :at] = True
        visible[begin : begin + size, begin : begin + size] = torch.ones(size, size, dtype=torch.bool).tril()
        packed += tokens
        positions += range(at, at + size)
        # The row that predicts a branch's first token is the trunk's own last one; all others are inside the branch.
        rows += [at - 1 if step == 0 else begin + step - 1 for step in range(given, size)]
        targets += tokens[given:]
    mask = torch.zeros(length, length, dtype=lm.dtype).masked_fill_(~visible, torch.finfo(lm.dtype).min)
    keep = torch.zeros(length, dtype=torch.bool)
    keep[rows] = True
    logits = lm.forward(
        torch.tensor([packed], device=lm.device),
        keep=keep[None].to(lm.device),
        attention_mask=mask[None, None].to(lm.device),
        positions=torch.tensor([positions], device=lm.device),
    ).logits
    place = (keep.cumsum(0) - 1)[rows].to(lm.device)
    log_probs = logits.log_softmax(-1)[place, torch.tensor(targets, device=lm.device)].cpu()
    return list(log_probs.split([len(tokens) - given for _, tokens, given in branches]))


def _masked_token_log_probs(lm: LanguageModel, tokens: Tensor, scored: Tensor) -> Tensor:
    """Log-probabilities of the scored tokens, row-major; scored[:, t] belongs to tokens[:, t]."""
    keep = torch.zeros_like(scored)
    keep[:, :-1] = scored[:, 1:]
    logits = lm.forward(tokens, keep=keep).logits
    return chosen_log_probs(logits, tokens[scored])


def _max_tokens(lm: LanguageModel) -> int:
    return max(MAX_LOGITS // lm.vocab_size, 512)


def _batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Sorted by length, so the newest row is the widest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
