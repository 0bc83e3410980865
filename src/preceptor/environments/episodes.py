"""What an environment is, whoever trains on it: problems, each of which makes an episode of choices with one reward.

An episode can be played in three ways: by numbers (Gymnasium), by turns of text (``verifiers``), or by one text whose
parts are the turns (reward functions of TRL). Whichever way, it ends in the same choices, and the task pays for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from preceptor.errors import ConfigError


class Episode(Protocol):
    """One attempt at a problem.

    Attributes:
        index: of the problem.
        prompt: what a language model is told at the start.
        num_turns: choices until it is over.
        choices: what was chosen so far.
    """

    index: int
    prompt: str
    num_turns: int
    choices: list[int]

    @property
    def available(self) -> list[bool]:
        """True = can be chosen next; one for every choice that there is."""
        ...

    def meaning(self, text: str) -> int | None:
        """The choice that ``text`` stands for; None where it stands for none."""
        ...

    def turns(self, text: str) -> list[str]:
        """The turns of which a whole completion consists."""
        ...

    def take(self, choice: int) -> str:
        """Makes a choice; gives the text that it brings.

        Raises:
            ConfigError: the episode is over, or the choice is not available.
        """
        ...


class Task(Protocol):
    """Problems of one kind.

    Attributes:
        name: ``reading``, ``study`` or ``bandit``.
    """

    name: str

    def __len__(self) -> int:
        """Number of problems."""
        ...

    def episode(self, index: int) -> Episode:
        """A new attempt at problem ``index``."""
        ...

    def rewards(self, episodes: Sequence[Episode]) -> list[float]:
        """What each finished episode earned, scored in one batch by the system's own code.

        Raises:
            ConfigError: an episode is not over.
        """
        ...


def is_over(episode: Episode) -> bool:
    """Whether every choice is made."""
    return len(episode.choices) >= episode.num_turns


def require_available(episode: Episode, choice: int) -> None:
    """Refuse a choice that the episode does not have.

    Raises:
        ConfigError: says which there are.
    """
    if is_over(episode):
        raise ConfigError(f"the episode is over after {episode.num_turns} choices, got one more; reset it")
    available = episode.available
    if not 0 <= choice < len(available) or not available[choice]:
        left = [index for index, free in enumerate(available) if free]
        raise ConfigError(f"choice {choice} is not available, these are: {left}; take one that the mask allows")


def require_over(episodes: Sequence[Episode]) -> None:
    """Refuse to pay for an unfinished episode."""
    for episode in episodes:
        if not is_over(episode):
            raise ConfigError(
                f"an episode is paid when it is over: {len(episode.choices)} of {episode.num_turns} choices were made"
            )


def finish(episode: Episode) -> None:
    """Makes the choices that are left: always the first available one, as a reader without a plan would."""
    # Paid like any other episode: a text that stops early must not end with fewer passages than the rest.
    while not is_over(episode):
        episode.take(episode.available.index(True))


def play(task: Task, index: int, text: str) -> Episode:
    """Problem ``index`` played by one text: its turns in order, then :func:`finish`. Turns that mean nothing pass."""
    episode = task.episode(index)
    for turn in episode.turns(text):
        # A longer text is no fault: reward functions score whatever a trainer samples.
        if is_over(episode):
            break
        if (choice := episode.meaning(turn)) is not None:
            episode.take(choice)
    finish(episode)
    return episode


@dataclass
class Reading:
    """An episode in which passages are read without replacement; it is over when the budget is spent.

    Attributes:
        index, prompt, num_turns, choices: of :class:`Episode`.
        values: the text that each passage brings.
        nearest: the available passage whose key is nearest to a text.
    """

    index: int
    prompt: str
    num_turns: int
    values: tuple[str, ...]
    nearest: Callable[[str, list[bool]], int]
    choices: list[int] = field(default_factory=list)

    @property
    def available(self) -> list[bool]:
        """True = not read yet."""
        return [index not in self.choices for index in range(len(self.values))]

    def meaning(self, text: str) -> int | None:
        """The available passage whose key is nearest to ``text``; a text of spaces means none."""
        return self.nearest(text.strip(), self.available) if text.strip() else None

    def turns(self, text: str) -> list[str]:
        """Its lines: one query each."""
        return text.splitlines()

    def take(self, choice: int) -> str:
        """Reads the passage; gives its text."""
        require_available(self, choice)
        self.choices.append(choice)
        return f" {self.values[choice]}\n"
