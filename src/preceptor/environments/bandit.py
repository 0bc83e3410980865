"""Bandits as a task: words whose worth only their own rewards tell, one pull after another."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from preceptor.environments.episodes import Episode, require_available, require_over
from preceptor.errors import ConfigError
from preceptor.systems.bandit.config import OPTIONS, BanditConfig
from preceptor.systems.bandit.environment import BanditFamily
from preceptor.systems.bandit.episodes import reward_levels

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

NUM_PROBLEMS = 2**31
"""Seeds of bandits; each is a problem."""


@dataclass
class Pulls:
    """An episode with one bandit, played on the system's own environment of Gymnasium.

    Attributes:
        index, prompt, num_turns, choices: of :class:`~preceptor.environments.episodes.Episode`.
        words: of the arms.
        kind: of the rewards.
        env: one bandit, reset to the problem.
        rewards: what each pull paid.
    """

    index: int
    prompt: str
    num_turns: int
    words: tuple[str, ...]
    kind: str
    env: VectorEnv
    choices: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def available(self) -> list[bool]:
        """Every arm, always."""
        return [True] * len(self.words)

    def meaning(self, text: str) -> int | None:
        """The arm whose word comes first in ``text``; None where no word does."""
        found = re.search(rf"\b({'|'.join(map(re.escape, self.words))})\b", text)
        return None if found is None else self.words.index(found[0])

    def turns(self, text: str) -> list[str]:
        """Every word of an arm in ``text``, in order."""
        return re.findall(rf"\b(?:{'|'.join(map(re.escape, self.words))})\b", text)

    def take(self, choice: int) -> str:
        """Pulls an arm; gives its reward as the in-context bandit writes it: one digit."""
        require_available(self, choice)
        _, rewards, *_ = self.env.step(np.array([choice]))
        self.choices.append(choice)
        self.rewards.append(float(rewards[0]))
        return str(int(reward_levels(torch.tensor(self.rewards[-1:], dtype=torch.float64), self.kind)[0]))


class BanditTask:
    """Sampled bandits of a configuration of ``bandit`` (its section ``in_context``); problem i is the bandit of seed i.

    An episode pulls ``in_context.rounds`` times. Its reward is the sum of what its pulls paid.

    Args:
        config: of bandit.
        split: ``train`` deals ``in_context.words``, ``held_out`` deals ``held_out_words``.

    Raises:
        ConfigError: an unknown split.
        MissingExtraError: gymnasium is not installed.
    """

    name = "bandit"

    def __init__(self, config: BanditConfig, *, split: str = "train") -> None:
        if split not in ("train", "held_out"):
            raise ConfigError(f"`split` of bandit must be train or held_out, got {split!r}")
        self._options = config.in_context
        self._words = self._options.words if split == "train" else self._options.held_out_words
        self.family = BanditFamily(self._options.num_arms, self._options.kind, self._options.prior)
        self._env()  # refuse here, not at the first episode

    def _env(self) -> VectorEnv:
        from preceptor.systems.bandit.vector_env import vector_env

        return vector_env(self.family, num_envs=1, rounds=self._options.rounds)

    def __len__(self) -> int:
        return NUM_PROBLEMS

    def episode(self, index: int) -> Pulls:
        """The bandit of seed ``index``, with words dealt by the same seed."""
        words = tuple(random.Random(index).sample(self._words, self.family.num_arms))
        env = self._env()
        env.reset(seed=index)
        named = " ".join(f"{place} {word}" for place, word in enumerate(words, start=1))
        return Pulls(
            index=index,
            prompt=self._options.template.replace(OPTIONS, named),
            num_turns=self._options.rounds,
            words=words,
            kind=self._options.kind,
            env=env,
        )

    def rewards(self, episodes: Sequence[Episode]) -> list[float]:
        """Sum of the rewards of each episode."""
        require_over(episodes)
        sums = []
        for each in episodes:
            assert isinstance(each, Pulls), "the episodes of a task are its own"
            sums.append(float(sum(each.rewards)))
        return sums
