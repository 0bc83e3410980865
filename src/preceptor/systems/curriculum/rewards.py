"""Rewards of continuations and the advantages that follow from them.

The reward is a weighted sum of terms. A term gives a number to every token it can be attributed to; its sum over the
continuation is a fraction in [−1, 1] or in nats per token, so a weight means the same at every length.
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

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import token_log_probs
from preceptor.objectives.advantages import gae, group_normalised, leave_one_out, reinforce_plus_plus
from preceptor.objectives.statistics import whiten
from preceptor.runs.user_code import call_for_numbers, import_fault
from preceptor.systems.curriculum.config import RewardOptions
from preceptor.systems.curriculum.policy import Rollouts

RewardFunction = Callable[[Rollouts], Float[Tensor, "batch token"]]


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward: ``weight`` times the values of ``function``."""

    name: str
    weight: float
    function: RewardFunction


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch of continuations, on the CPU.

    Attributes:
        tokens: the weighted sum of all terms at each token; 0 where a token does not count.
        terms: each term's sum over the continuation, before its weight.
    """

    tokens: Float[Tensor, "batch token"]
    terms: Mapping[str, Float[Tensor, " batch"]]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The reward of each continuation."""
        return self.tokens.sum(1)

    @property
    def finite_rows(self) -> Bool[Tensor, " batch"]:
        """True where every reward of the row is finite."""
        return self.tokens.isfinite().all(1)


def reward_terms(options: Sequence[RewardOptions], lm: LanguageModel, *, likelihood: LanguageModel) -> list[RewardTerm]:
    """The terms of the reward that ``options`` name.

    Args:
        options: ``ppo.rewards`` of the configuration.
        lm: decodes tokens for user-defined terms.
        likelihood: the frozen model of ``log_likelihood``.

    Raises:
        ConfigError: a user-defined term cannot be found.
    """
    terms = []
    for reward in options:
        if reward.name == "log_likelihood":
            function = log_likelihood(likelihood)
        else:
            function = TOKEN_TERMS.get(reward.name) or user_reward(reward.name, lm, timeout=reward.timeout)
        terms.append(RewardTerm(reward.name, reward.weight, function))
    return terms


def score_rollouts(rollouts: Rollouts, terms: Sequence[RewardTerm]) -> Rewards:
    """The rewards of ``rollouts``. They may be NaN or infinite: see ``Rewards.finite_rows``."""
    mask = rollouts.mask.cpu()
    tokens = torch.zeros(mask.shape)  # [batch, token]
    sums: dict[str, Tensor] = {}
    for term in terms:
        # Masked before the sum: a term may be NaN after the end token.
        values = term.function(rollouts).cpu().masked_fill(~mask, 0.0)
        sums[term.name] = values.sum(1)
        tokens = tokens + term.weight * values
    return Rewards(tokens, sums)


# ---- the terms ------------------------------------------------------------------------------------------------------


def repetition(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Minus the fraction of tokens that equal the token before them (the method's text), at those tokens."""
    # [batch, token]: the token before each sampled one; before the first it is the last of the prompt.
    previous = torch.tensor([prompt.tokens[-1] for prompt in rollouts.prompts], device=rollouts.tokens.device)
    shifted = torch.cat([previous[:, None], rollouts.tokens[:, :-1]], dim=1)
    return -((rollouts.tokens == shifted) & rollouts.mask).float() / rollouts.num_tokens


def repeated_bigrams(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Minus the fraction of tokens that complete a bigram the continuation already contains, at those tokens."""
    # On the CPU and by row: a set of pairs is simpler than any tensor form, and this is not where time goes.
    values = torch.zeros(rollouts.tokens.shape)
    for row in range(len(rollouts)):
        tokens = rollouts.continuation(row)
        seen: set[tuple[int, int]] = set()
        for position, bigram in enumerate(pairwise(tokens), start=1):
            values[row, position] = -float(bigram in seen)
            seen.add(bigram)
    return values / rollouts.num_tokens


def distinct(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Distinct bigrams over all bigrams (distinct-2, Li et al. 2016, arXiv 1510.03055), at the last token."""

    def ratio(tokens: list[int]) -> float:
        bigrams = list(pairwise(tokens))
        return len(set(bigrams)) / len(bigrams) if bigrams else 1.0

    return _at_last_token(rollouts, [ratio(rollouts.continuation(row)) for row in range(len(rollouts))])


def overlap(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """F1 of the continuation's tokens with those of the document, counted with multiplicity, at the last token."""

    def f1(ours: list[int], theirs: Sequence[int]) -> float:
        # A multiset intersection: a token counts as often as both have it.
        shared = (Counter(ours) & Counter(theirs)).total()
        return 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0

    values = [f1(rollouts.continuation(row), rollouts.prompts[row].reference) for row in range(len(rollouts))]
    return _at_last_token(rollouts, values)


def length(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
    """Tokens up to the end token over the tokens allowed, spread over those tokens."""
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
            values[row, : len(log_probs)] = log_probs / max(len(log_probs), 1)  # a row may count no token
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


def _at_last_token(rollouts: Rollouts, values: Sequence[float]) -> Float[Tensor, "batch token"]:
    """``values`` at the last token of each row that counts; a row without one gets nothing."""
    mask = rollouts.mask.cpu()
    placed = torch.zeros(mask.shape)
    # The last counted token, and not the last position: what follows an end token earns nothing.
    for row, value in enumerate(values):
        if mask[row].any():
            placed[row, int(mask[row].sum()) - 1] = value
    return placed


# ---- user-defined terms ---------------------------------------------------------------------------------------------


def user_reward(name: str, lm: LanguageModel, *, timeout: float = 0.0) -> RewardFunction:
    """A user-defined reward, at the last token.

    The function is called with three lists of texts, one entry per continuation: prompts, continuations, and how the
    documents really continue. It returns one number per continuation; a continuation whose number is not finite is left
    out of the update.

    Args:
        name: ``package.module:function`` or ``path/to/file.py:function``.
        lm: decodes the tokens.
        timeout: seconds that a call may take; 0 sets no limit.

    Raises:
        ConfigError: there is no such module or function.
    """
    function = load_function(name)

    def reward(rollouts: Rollouts) -> Float[Tensor, "batch token"]:
        prompts = [lm.decode(prompt.tokens) for prompt in rollouts.prompts]
        continuations = [lm.decode(rollouts.continuation(row)) for row in range(len(rollouts))]
        references = [lm.decode(prompt.reference) for prompt in rollouts.prompts]
        values = call_for_numbers(
            f"the reward {name}",
            function,
            prompts,
            continuations,
            references,
            count=len(rollouts),
            each="continuations",
            timeout=timeout,
        )
        return _at_last_token(rollouts, values)

    return reward


def load_function(name: str) -> Callable[..., Any]:
    """The function called ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: there is no such module or function, or its module fails as it is read.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"reward '{name}': there is no file {place}; give module:function or file.py:function")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module is the user's, and may do anything as it is read
        raise ConfigError(
            f"reward '{name}' cannot be imported: {import_fault(error)}; give module:function or file.py:function"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"reward '{name}': {place} has no function '{attribute}'")
    return function  # type: ignore[no-any-return]


def _module_of_file(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None, "a .py file always has a loader"
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# ---- advantages -----------------------------------------------------------------------------------------------------


def token_advantages(
    rewards: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    kind: str,
    values: Float[Tensor, "batch token"] | None = None,
    group_size: int = 1,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    whiten_advantages: bool = True,
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"] | None]:
    """Advantages of ``kind``, 0 where the mask is False, and for ``gae`` the value network's targets; no gradient.

    An advantage depends on its own sequence or its own group alone, up to whitening.

    - ``gae``: generalized advantage estimation against ``values``, whitened over the batch if ``whiten_advantages``;
    - ``rloo``: a continuation's total reward minus the mean of the others of its prompt, at all of its tokens; one
      without a token that counts, or without a finite reward, has no advantage and is no member of its group;
    - ``grpo``: total reward minus the mean of its group, over the group's standard deviation; ``dr_grpo``: not divided;
    - ``reinforce_plus_plus``: the reward to go, whitened over the batch.

    Args:
        rewards: of each token, minus the KL penalty if there is one in the reward; ignored where the mask is False.
        mask: True = counts.
        kind: as above.
        values: of the value network before the update, for ``gae``; in units of the reward.
        group_size: adjacent rows that continue one prompt; at least 2 for ``rloo``, ``grpo`` and ``dr_grpo``.
        discount: per token, in [0, 1].
        gae_lambda: in [0, 1].
        whiten_advantages: for ``gae``.
    """
    rewards = rewards.masked_fill(~mask, 0.0)  # also where they are NaN: 0 · NaN would still be NaN
    if kind == "gae":
        assert values is not None, "gae needs values"
        advantages = gae(rewards, values, mask=mask, discount=discount, gae_lambda=gae_lambda)
        # Before whitening: the value network learns returns in units of the reward.
        returns = advantages + values.masked_fill(~mask, 0.0)
        return whiten(advantages, mask) if whiten_advantages else advantages, returns
    if kind == "reinforce_plus_plus":
        return reinforce_plus_plus(rewards, mask, discount=discount), None
    totals = rewards.sum(1).view(-1, group_size)  # [prompts, group]
    # A continuation of which nothing counts earned no 0: it is no member, or its group would be compared with it.
    members = (mask.any(1) & rewards.sum(1).isfinite()).view(-1, group_size)
    relative = torch.zeros_like(totals)
    for group, (total, member) in enumerate(zip(totals, members, strict=True)):
        if not member.any():
            continue
        if kind == "rloo":
            relative[group, member] = leave_one_out(total[member])
        else:
            relative[group, member] = group_normalised(total[member], with_standard_deviation=kind == "grpo")
    return relative.flatten()[:, None] * mask, None  # one number per row, at each of its tokens
