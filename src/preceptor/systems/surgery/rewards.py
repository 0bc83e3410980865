"""What is rewarded: the student's next tokens by its objective, and the surgeon's edits by the change in quality.

An edit's reward is quality after minus before. Both are measured on the same windows and on continuations of the same
prompts with the same noise, so that their difference is due to the weights alone. The windows are fixed; prompts and
noise are drawn anew for every edit, because an edit that was kept for one lucky continuation would make all later ones
look bad. The acceptance test uses windows that no reward has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from preceptor.objectives.kl import kl_exact
from preceptor.objectives.next_token import (
    avatarl_loss,
    expected_reward_loss,
    next_token_rewards,
    sampled_reward_loss,
)
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery.config import LearningOptions
from preceptor.systems.surgery.reference_lm import ReferenceLM

REPEATED = 4
"""Length of the n-grams whose repetition within a continuation counts against it."""


# ---- the student's objective ----------------------------------------------------------------------------------------


def needs_reference(learning: LearningOptions, objective: str) -> bool:
    """Whether ``objective`` uses the reference model's distribution at every position."""
    if objective in ("avatarl", "distil"):
        return True
    return objective in ("sampled", "expected") and learning.partial_reward > 0


def objective_loss(
    logits: Float[Tensor, "batch time vocab"],
    targets: Int[Tensor, "batch time"],
    *,
    objective: str,
    reference_probs: Float[Tensor, "batch time vocab"] | None,
    learning: LearningOptions,
    generator: torch.Generator,
    positions_before: int = 0,
) -> tuple[Float[Tensor, ""], float]:
    """The loss to minimise, and the mean reward Σ_a π(a) (1[a = y] + c · p_reference(a)) over all positions.

    Args:
        logits: of the student; the loss carries their gradient.
        targets: the true next tokens, y.
        objective: a key of ``OBJECTIVES``.
        reference_probs: the reference model's distributions, where :func:`needs_reference` says so.
        learning: c (``partial_reward``) and the objective's other numbers.
        generator: draws the groups of ``sampled``, on the CPU.
        positions_before: positions of the batch before these, which other processes have; their draws are passed over.
    """
    reward = _mean_reward(logits.detach(), targets, reference_probs, learning.partial_reward, objective)
    if objective == "cross_entropy":
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), reward
    if objective in ("avatarl", "distil"):
        assert reference_probs is not None
        if objective == "avatarl":
            return avatarl_loss(logits, targets, referee_probs=reference_probs), reward
        # log 0 is −inf in the reference and adds nothing there (see `kl_exact`).
        return kl_exact(reference_probs.log(), logits).mean(), reward  # KL(reference ‖ student), so mass covering
    # A reward for every token of the vocabulary at every position: [batch, time, vocab]
    rewards = next_token_rewards(
        logits,
        targets,
        referee_probs=reference_probs,
        partial_reward=learning.partial_reward,
        confidence_penalty=learning.confidence_penalty,
    )
    if objective == "expected":
        return expected_reward_loss(logits, rewards), reward
    # On the CPU, so that the same seed draws the same groups on every device. [batch · time, vocab]
    probs = logits.detach().softmax(-1).flatten(0, 1).cpu()
    # A draw takes one float64 uniform number, so this leaves the stream where the positions before would have.
    torch.rand(positions_before * learning.group_size, dtype=torch.float64, generator=generator)
    samples = torch.multinomial(probs, learning.group_size, replacement=True, generator=generator)
    samples = samples.view(*targets.shape, learning.group_size).to(logits.device)  # [batch, time, group]
    return sampled_reward_loss(logits, rewards, samples=samples, advantage=learning.advantage), reward


def _mean_reward(
    logits: Tensor, targets: Tensor, reference_probs: Tensor | None, partial_reward: float, objective: str
) -> float:
    probs = logits.softmax(-1)
    # The probability of the true token is the expected reward of a guess: Σ_a π(a) 1[a = y].
    reward = probs.gather(-1, targets[..., None]).mean()
    if reference_probs is not None and objective in ("sampled", "expected"):
        reward = reward + partial_reward * (probs * reference_probs).sum(-1).mean()
    return float(reward)


# ---- reading and writing --------------------------------------------------------------------------------------------


def draw_windows(
    tokens: Int[Tensor, " token"], *, num_windows: int, length: int, generator: torch.Generator
) -> Int[Tensor, "window time"]:
    """Windows of ``length`` tokens from random places of a text; they may overlap.

    >>> draw_windows(torch.arange(3), num_windows=1, length=3, generator=torch.Generator())
    tensor([[0, 1, 2]])
    """
    starts = torch.randint(len(tokens) - length + 1, (num_windows,), generator=generator)
    # [window, 1] + [length] -> [window, length]
    return tokens[starts[:, None] + torch.arange(length)]


def next_token_logits(model: PreTrainedModel, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
    """Logits of the token after each position, in float32."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Int[Tensor, "window time"]) -> Float[Tensor, " window"]:
    """Mean cross-entropy of each window, nats per token, in float64."""
    logits = next_token_logits(model, windows[:, :-1])
    # cross_entropy wants the classes on the second axis.
    losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")  # [window, time - 1]
    return losses.double().mean(1)


def shared_window_losses(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], world: World
) -> Float[Tensor, " window"]:
    """:func:`window_losses` of all windows, of which each process computes its part."""
    (losses,) = world.gathered(len(windows), lambda rows: (window_losses(model, windows[rows]),))
    return losses


@torch.no_grad()
def sample_continuations(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt time"], noise: Float[Tensor, "prompt token"]
) -> Int[Tensor, "prompt token"]:
    """Continuations of ``prompts`` at temperature 1: a token is where the cumulative probability exceeds its noise.

    The same noise gives the same tokens until a distribution has moved past it, so what two models write differs
    because they differ, not by chance.

    Args:
        model: the student.
        prompts: at least one token each; prompt and continuation together must fit the model's context.
        noise: uniform in [0, 1), float64, one number a token.
    """
    cache = DynamicCache(config=model.config)
    tokens, continuations = prompts, []
    for step in range(noise.shape[1]):
        # Read only what the cache lacks: the whole prompt first, then one token at a time.
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1].double()
        cumulative = logits.softmax(-1).cumsum(-1)  # [prompt, vocab]
        # The last cumulative probability is 1 up to rounding; scaling by it keeps the noise below it.
        threshold = noise[:, step : step + 1].to(cumulative.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)
        continuations.append(tokens)  # [prompt, 1], which is all that the cache has not read yet
    return torch.cat(continuations, dim=1)


# ---- the surgeon's reward -------------------------------------------------------------------------------------------


class Quality(NamedTuple):
    """Quality of a student, recorded under these names.

    Attributes:
        total: weighted sum of the parts, each signed so that more is better.
        log_prob: of the fixed windows, nats per token.
        referee_log_prob: of the continuations under the reference model, nats per token.
        repetition: fraction of 4-grams that occurred earlier in the same continuation.
        distinct: different pairs of adjacent tokens over all such pairs.
    """

    total: float
    log_prob: float
    referee_log_prob: float
    repetition: float
    distinct: float


class Draws(NamedTuple):
    """What the two measurements of an edit share: prompts, and uniform numbers in [0, 1) to continue them with."""

    prompts: Int[Tensor, "prompt time"]
    noise: Float[Tensor, "prompt token"]


class Examiner:
    """Measures quality.

    Args:
        reference_lm: scores what the student writes.
        tokens: the text that prompts are taken from.
        num_prompts: continuations of one examination.
        prompt_tokens: length of a prompt.
        continuation_tokens: length of a continuation.
        windows: of the text, whose loss counts.
        weights: of ``loss``, ``referee``, ``repetition`` and ``distinct``.
        world: the processes that share windows and prompts.
    """

    def __init__(
        self,
        reference_lm: ReferenceLM,
        *,
        tokens: Int[Tensor, " token"],
        num_prompts: int,
        prompt_tokens: int,
        continuation_tokens: int,
        windows: Int[Tensor, "window time"],
        weights: Mapping[str, float],
        world: World = ALONE,
    ) -> None:
        self._reference_lm = reference_lm
        self._tokens = tokens
        self._num_prompts = num_prompts
        self._lengths = prompt_tokens, continuation_tokens
        self._windows = windows
        self._weights = dict(weights)
        self._world = world

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Positions that the student and the reference model compute in one examination."""
        num_written = self._num_prompts * sum(self._lengths)
        return num_written + self._windows[:, 1:].numel(), num_written

    def draw(self, generator: torch.Generator) -> Draws:
        """New prompts and noise, drawn on the CPU."""
        prompt_tokens, continuation_tokens = self._lengths
        prompts = draw_windows(self._tokens, num_windows=self._num_prompts, length=prompt_tokens, generator=generator)
        noise = torch.rand(self._num_prompts, continuation_tokens, dtype=torch.float64, generator=generator)
        return Draws(prompts.to(self._windows.device), noise.to(self._windows.device))

    def examine(self, model: PreTrainedModel, draws: Draws) -> Quality:
        """The quality of ``model`` as it is now."""
        prompts, noise = draws
        log_prob = -float(shared_window_losses(model, self._windows, self._world).mean())

        def written(rows: slice) -> tuple[Tensor, Tensor]:
            continuations = sample_continuations(model, prompts[rows], noise[rows])
            text = torch.cat([prompts[rows], continuations], dim=1)
            # The prompt's last position predicts the first token of the continuation. [prompt, token, vocab]
            probs = self._reference_lm.probabilities(text[:, :-1])[:, prompts.shape[1] - 1 :]
            return continuations, probs.gather(-1, continuations[..., None])

        continuations, probs = self._world.gathered(len(prompts), written)
        referee_log_prob = float(probs.double().log().mean())
        repetition, distinct = repeated_share(continuations, length=REPEATED), distinct_share(continuations, length=2)
        # Signed so that more is better: repetition is the one part that counts against.
        total = (
            self._weights["loss"] * log_prob
            + self._weights["referee"] * referee_log_prob
            - self._weights["repetition"] * repetition
            + self._weights["distinct"] * distinct
        )
        return Quality(total, log_prob, referee_log_prob, repetition, distinct)


class Acceptance(NamedTuple):
    """A paired test of one edit, recorded under these names: mean gain in nats per token, z, and whether it passed."""

    gain: float
    z: float
    passed: bool


def acceptance(before: Float[Tensor, " window"], after: Float[Tensor, " window"], *, required_z: float) -> Acceptance:
    """Whether the losses ``after`` an edit are lower than ``before`` by more than chance, window by window.

    z = mean gain / (sample standard deviation / √n). An edit that changed nothing has z = 0 and never passes.

    >>> test = acceptance(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 2.5, 3.0]), required_z=2.0)
    >>> round(test.gain, 3), round(test.z, 3), test.passed
    (0.833, 5.0, True)
    """
    gains = (before - after).double()
    mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
    # No spread at all: every window moved by the same amount, which is beyond chance unless it is 0.
    z = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Acceptance(mean, z, mean > 0 and z > required_z)


def repeated_share(rows: Int[Tensor, "row token"], *, length: int) -> float:
    """Fraction of the n-grams of ``length`` tokens that occurred earlier in the same row; 0 for shorter rows.

    >>> repeated_share(torch.tensor([[1, 2, 1, 2, 1]]), length=2)  # 12 21 12 21: the last two
    0.5
    """
    ngrams = _ngrams(rows, length)
    num_repeated = sum(len(row) - len(set(row)) for row in ngrams)
    return num_repeated / max(sum(map(len, ngrams)), 1)


def distinct_share(rows: Int[Tensor, "row token"], *, length: int) -> float:
    """Different n-grams of ``length`` tokens over all n-grams, all rows together (distinct-n, Li et al. 2016).

    >>> distinct_share(torch.tensor([[1, 2, 1], [1, 2, 3]]), length=2)  # 12 21 12 23
    0.75
    """
    ngrams = [ngram for row in _ngrams(rows, length) for ngram in row]
    return len(set(ngrams)) / max(len(ngrams), 1)


def _ngrams(rows: Tensor, length: int) -> list[list[tuple[int, ...]]]:
    if rows.shape[1] < length:
        return [[] for _ in rows]
    return [[tuple(ngram) for ngram in row] for row in rows.unfold(1, length, 1).tolist()]
