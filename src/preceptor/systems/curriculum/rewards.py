"""What a continuation is worth: a weighted list of terms, each a number for every token that it can be blamed on.

All terms are scaled to a whole continuation: the sum over its tokens is a share in [−1, 1], or nats per token, so that
weights mean the same for short and long continuations.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError, DataError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import token_log_probs
from preceptor.systems.curriculum.config import RewardOptions
from preceptor.systems.curriculum.rollout import Rollouts

RewardFunction = Callable[[Rollouts], Float[Tensor, "batch token"]]


@dataclass(frozen=True)
class RewardTerm:
    """One term: ``weight`` times what ``function`` says."""

    name: str
    weight: float
    function: RewardFunction


@dataclass(frozen=True)
class Rewards:
    """What the terms said.

    Attributes:
        tokens: the weighted sum of all terms at each token.
        terms: each term's sum over the continuation, before its weight.
    """

    tokens: Float[Tensor, "batch token"]
    terms: Mapping[str, Float[Tensor, " batch"]]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The reward of each continuation."""
        return self.tokens.sum(1)


def reward_terms(options: Sequence[RewardOptions], lm: LanguageModel, *, likelihood: LanguageModel) -> list[RewardTerm]:
    """The terms of the reward that ``options`` name.

    Args:
        options: of the configuration.
        lm: spells tokens for the user's own terms.
        likelihood: the frozen model of ``log_likelihood``.
    """
    terms = []
    for reward in options:
        if reward.name == "log_likelihood":
            function = log_likelihood(likelihood)
        else:
            function = TOKEN_TERMS.get(reward.name) or own_reward(reward.name, lm)
        terms.append(RewardTerm(reward.name, reward.weight, function))
    return terms


def score(rollouts: Rollouts, terms: Sequence[RewardTerm]) -> Rewards:
    """The rewards of ``rollouts``, on the CPU; tokens that do not count get 0. May hold what is not finite."""
    mask = rollouts.mask.cpu()
    tokens = torch.zeros(mask.shape)
    sums: dict[str, Tensor] = {}
    for term in terms:
        values = term.function(rollouts).cpu().masked_fill(~mask, 0.0)
        sums[term.name] = values.sum(1)
        tokens = tokens + term.weight * values
    return Rewards(tokens, sums)


# ---- the terms ------------------------------------------------------------------------------------------------------


def repetition(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Minus the share of tokens that are the token just before them (the method's text), at those tokens."""
    previous = torch.tensor([prompt.tokens[-1] for prompt in rollouts.prompts], device=rollouts.tokens.device)
    shifted = torch.cat([previous[:, None], rollouts.tokens[:, :-1]], dim=1)
    return -((rollouts.tokens == shifted) & rollouts.mask).float() / rollouts.num_tokens


def repeated_bigrams(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Minus the share of tokens that complete a pair of tokens which the continuation had already, at those tokens."""
    values = torch.zeros(rollouts.tokens.shape)
    for row in range(len(rollouts)):
        tokens = rollouts.continuation(row)
        seen: set[tuple[int, int]] = set()
        for position, bigram in enumerate(pairwise(tokens), start=1):
            values[row, position] = -float(bigram in seen)
            seen.add(bigram)
    return values / rollouts.num_tokens


def distinct(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Distinct pairs of tokens over all pairs (distinct-2, Li et al. 2016, arXiv 1510.03055), at the last token."""

    def ratio(tokens: list[int]) -> float:
        bigrams = list(pairwise(tokens))
        return len(set(bigrams)) / len(bigrams) if bigrams else 1.0

    return _at_the_end(rollouts, [ratio(rollouts.continuation(row)) for row in range(len(rollouts))])


def overlap(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """F1 between the tokens of the continuation and those of the true one, with multiplicity, at the last token."""

    def f1(ours: list[int], theirs: Sequence[int]) -> float:
        shared = (Counter(ours) & Counter(theirs)).total()
        return 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0

    values = [f1(rollouts.continuation(row), rollouts.prompts[row].reference) for row in range(len(rollouts))]
    return _at_the_end(rollouts, values)


def length(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """The share of the allowed tokens that were written before an end, at each of them."""
    return rollouts.mask.float() / rollouts.num_tokens


def log_likelihood(lm: LanguageModel) -> RewardFunction:
    """The mean log-probability of the continuation under ``lm`` (frozen), nats per token, spread over its tokens."""

    def reward(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
        values = torch.zeros(rollouts.tokens.shape)
        rows, spans = [], []
        for row, prompt in enumerate(rollouts.prompts):
            tokens = [*prompt.tokens, *rollouts.continuation(row)]
            rows.append(tokens)
            spans.append([(len(prompt.tokens), len(tokens))])
        for row, log_probs in enumerate(token_log_probs(lm, rows, spans=spans)):
            values[row, : len(log_probs)] = log_probs / max(len(log_probs), 1)
        return values

    return reward


TOKEN_TERMS: dict[str, RewardFunction] = {
    "repetition": repetition,
    "repeated_bigrams": repeated_bigrams,
    "distinct": distinct,
    "overlap": overlap,
    "length": length,
}
"""The terms that need nothing but the rollouts."""


# ---- the user's own -------------------------------------------------------------------------------------------------


def own_reward(name: str, lm: LanguageModel) -> RewardFunction:
    """The reward that a function of the user's gives, at the last token.

    It is called with three lists of texts, one entry a continuation: prompts, continuations and true continuations. It
    gives one number each; a continuation whose number is not finite teaches nothing.

    Args:
        name: ``package.module:function`` or ``path/to/file.py:function``.
        lm: spells the tokens.

    Raises:
        ConfigError: there is no such module or function.
    """
    function = load_function(name)

    def reward(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
        given = function(
            [lm.decode(prompt.tokens) for prompt in rollouts.prompts],
            [lm.decode(rollouts.continuation(row)) for row in range(len(rollouts))],
            [lm.decode(prompt.reference) for prompt in rollouts.prompts],
        )
        values = [float(value) for value in given]
        if len(values) != len(rollouts):
            raise DataError(f"the reward {name} gave {len(values)} numbers for {len(rollouts)} continuations")
        return _at_the_end(rollouts, values)

    return reward


def load_function(name: str) -> Callable[..., Any]:
    """The function called ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: there is no such module or function.
    """
    place, _, attribute = name.rpartition(":")
    module = _module_of_file(Path(place), name) if place.endswith(".py") else _module(place, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"reward '{name}': {place} has no function '{attribute}'")
    return function  # type: ignore[no-any-return]


def _module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise ConfigError(
            f"reward '{name}' cannot be imported: {error}; give module:function or file.py:function"
        ) from error


def _module_of_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"reward '{name}': there is no file {path}; give module:function or file.py:function")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None, "a .py file always has a loader"
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _at_the_end(rollouts: Rollouts, values: Sequence[float]) -> Float[Tensor, "batch token"]:
    """``values`` at the last counted token of each row; a row without one earns nothing."""
    mask = rollouts.mask.cpu()
    placed = torch.zeros(mask.shape)
    for row, value in enumerate(values):
        if mask[row].any():
            placed[row, int(mask[row].sum()) - 1] = value
    return placed


def usable_rows(rewards: Rewards) -> Bool[Tensor, " batch"]:
    """True where every reward of the row is finite."""
    return rewards.tokens.isfinite().all(1)
