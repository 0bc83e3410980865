"""Rollouts made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preceptor.systems.curriculum.rollout import Prompt, Rollouts


def rollouts_from(
    continuations: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    references: Sequence[Sequence[int]] | None = None,
    num_tokens: int | None = None,
) -> Rollouts:
    """Continuations as rollouts; what a short one lacks was drawn after its end (token 9) and does not count."""
    width = num_tokens or max(map(len, continuations))
    prompts = prompts or [[0]] * len(continuations)
    references = references or [[]] * len(continuations)
    tokens = torch.tensor([[*row, *([9] * (width - len(row)))] for row in continuations])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in continuations])
    return Rollouts(
        prompts=tuple(Prompt("d", tuple(p), tuple(r)) for p, r in zip(prompts, references, strict=True)),
        tokens=tokens,
        mask=mask,
        log_probs=torch.zeros(tokens.shape),
        entropy=torch.zeros(tokens.shape),
    )
