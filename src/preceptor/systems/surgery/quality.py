"""What an edit is worth: the student's quality before and after, under common random numbers, and an acceptance test.

Both measurements of a pair have the same prompts, the same noise to draw continuations with and the same windows whose
loss counts, so their difference is due to the weights alone. The windows are fixed; prompts and noise are drawn anew
for every pair: a student that was kept for one lucky continuation would make every later edit look bad. The acceptance
test looks at windows that no reward saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from preceptor.systems.surgery.referee import Referee
from preceptor.systems.surgery.student import window_losses, write
from preceptor.systems.surgery.text import draw_windows

REPEATED = 4
"""Tokens of a run that counts as repeated when the same continuation had it before."""


class Quality(NamedTuple):
    """Quality of a student.

    Attributes:
        total: weighted sum of the parts, each signed so that more is better.
        log_prob: of the fixed windows, nats per token.
        referee_log_prob: of the continuations under the referee, nats per token.
        repetition: share of 4-grams written before in the same continuation.
        distinct: share of different pairs of tokens among all that were written.
    """

    total: float
    log_prob: float
    referee_log_prob: float
    repetition: float
    distinct: float


class Draws(NamedTuple):
    """What a pair of examinations has in common: beginnings, and uniform numbers in [0, 1) to continue them with."""

    prompts: Int[Tensor, "prompt time"]
    noise: Float[Tensor, "prompt token"]


class Examiner:
    """Measures quality.

    Args:
        referee: reads what the student writes.
        tokens: of the text that prompts are cut from.
        num_prompts, prompt_tokens, continuation_tokens: how much is written.
        windows: of the text, whose loss counts.
        weights: of ``loss``, ``referee``, ``repetition`` and ``distinct``.
    """

    def __init__(
        self,
        referee: Referee,
        *,
        tokens: Int[Tensor, " token"],
        num_prompts: int,
        prompt_tokens: int,
        continuation_tokens: int,
        windows: Int[Tensor, "window time"],
        weights: Mapping[str, float],
    ) -> None:
        self._referee = referee
        self._tokens = tokens
        self._num_prompts = num_prompts
        self._lengths = prompt_tokens, continuation_tokens
        self._windows = windows
        self._weights = dict(weights)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Positions that the student and the referee compute in one examination."""
        read = self._num_prompts * sum(self._lengths)
        return read + self._windows[:, 1:].numel(), read

    def draw(self, generator: torch.Generator) -> Draws:
        """New prompts and noise, drawn on the CPU."""
        prompt_tokens, continuation_tokens = self._lengths
        prompts = draw_windows(self._tokens, num_windows=self._num_prompts, length=prompt_tokens, generator=generator)
        noise = torch.rand(self._num_prompts, continuation_tokens, dtype=torch.float64, generator=generator)
        return Draws(prompts.to(self._windows.device), noise.to(self._windows.device))

    def examine(self, model: PreTrainedModel, draws: Draws) -> Quality:
        """The quality of ``model`` as it is now."""
        prompts, noise = draws
        log_prob = -float(window_losses(model, self._windows).mean())
        continuations = write(model, prompts, noise)
        text = torch.cat([prompts, continuations], dim=1)
        probabilities = self._referee.probabilities(text[:, :-1])[:, prompts.shape[1] - 1 :]
        referee_log_prob = float(probabilities.gather(-1, continuations[..., None]).double().log().mean())
        repetition, distinct = repeated_share(continuations, length=REPEATED), distinct_share(continuations, length=2)
        total = (
            self._weights["loss"] * log_prob
            + self._weights["referee"] * referee_log_prob
            - self._weights["repetition"] * repetition
            + self._weights["distinct"] * distinct
        )
        return Quality(total, log_prob, referee_log_prob, repetition, distinct)


class Acceptance(NamedTuple):
    """A paired test of one edit: mean gain in nats per token, in standard errors, and whether that is enough."""

    gain: float
    z: float
    passed: bool


def acceptance(before: Float[Tensor, " window"], after: Float[Tensor, " window"], *, required_z: float) -> Acceptance:
    """Whether the losses ``after`` an edit are lower than ``before`` by more than chance, window by window.

    z = mean gain / (sample standard deviation / √n). An edit that changed nothing has z = 0 and never passes.

    >>> found = acceptance(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 2.5, 3.0]), required_z=2.0)
    >>> round(found.gain, 3), round(found.z, 3), found.passed
    (0.833, 5.0, True)
    """
    gains = (before - after).double()
    mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
    z = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Acceptance(mean, z, mean > 0 and z > required_z)


def repeated_share(rows: Int[Tensor, "row token"], *, length: int) -> float:
    """Share of the runs of ``length`` tokens that stood earlier in the same row; 0 for rows that are shorter.

    >>> repeated_share(torch.tensor([[1, 2, 1, 2, 1]]), length=2)  # 12 21 12 21: the last two
    0.5
    """
    runs = _runs(rows, length)
    repeated = sum(len(row) - len(set(row)) for row in runs)
    return repeated / max(sum(map(len, runs)), 1)


def distinct_share(rows: Int[Tensor, "row token"], *, length: int) -> float:
    """Different runs of ``length`` tokens over all runs, over all rows together (distinct-n, Li et al. 2016).

    >>> distinct_share(torch.tensor([[1, 2, 1], [1, 2, 3]]), length=2)  # 12 21 12 23
    0.75
    """
    runs = [run for row in _runs(rows, length) for run in row]
    return len(set(runs)) / max(len(runs), 1)


def _runs(rows: Tensor, length: int) -> list[list[tuple[int, ...]]]:
    if rows.shape[1] < length:
        return [[] for _ in rows]
    return [[tuple(run) for run in row] for row in rows.unfold(1, length, 1).tolist()]
