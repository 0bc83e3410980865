"""The tasks in TRL's ``GRPOTrainer``: rows of prompts and a reward function, or an environment that is a tool.

With :func:`reward_function` one completion plays a whole episode: its lines are the queries of reading and study, its
words the pulls of bandit, and what it leaves open is read in the task's own order. The trainer generates with whatever
engine it has. With :class:`ToolEnvironment` a model that calls tools takes turns and sees what each choice brings.

>>> task = load_task("bandit", overrides={"in_context.rounds": 3, "in_context.first_rounds": 3})
>>> row = prompt_rows(task, 1, seed=0)[0]
>>> sorted(row), row["prompt"].split()[::2]
(['problem', 'prompt'], ['1', '2'])
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from preceptor.environments import load_task
from preceptor.environments.episodes import Episode, Task, finish, is_over, play

__all__ = ["ToolEnvironment", "load_task", "prompt_rows", "reward_function"]

Messages = Sequence[dict[str, Any]]


def prompt_rows(task: Task, count: int, *, seed: int = 0, chat: bool = False) -> list[dict[str, Any]]:
    """Rows for ``datasets.Dataset.from_list``: ``prompt``, and ``problem``, which the reward function asks for.

    Args:
        task: from :func:`~preceptor.environments.load_task`.
        count: rows; problems are drawn without replacement as long as there are others.
        seed: of the draw.
        chat: give each prompt as a conversation of one message of the user.
    """
    chooser = random.Random(seed)
    problems: list[int] = []
    while len(problems) < count:
        problems += chooser.sample(range(len(task)), min(len(task), count - len(problems)))
    texts = [task.episode(problem).prompt for problem in problems]
    return [
        {"prompt": [{"role": "user", "content": text}] if chat else text, "problem": problem}
        for problem, text in zip(problems, texts, strict=True)
    ]


def reward_function(task: Task) -> Callable[..., list[float]]:
    """A function for ``GRPOTrainer(reward_funcs=…)``: what :meth:`Task.rewards` says of the episode of each completion.

    The rows need the column ``problem`` of :func:`prompt_rows`.
    """

    def reward(completions: Sequence[str | Messages], problem: Sequence[int], **unused: Any) -> list[float]:
        texts = [each if isinstance(each, str) else str(each[-1]["content"] or "") for each in completions]
        return task.rewards([play(task, index, text) for index, text in zip(problem, texts, strict=True)])

    reward.__name__ = f"preceptor_{task.name}"  # the name under which TRL logs it
    return reward


class ToolEnvironment:
    """One episode at a time for ``GRPOTrainer(environment_factory=lambda: ToolEnvironment(task))``.

    TRL calls :meth:`reset` with the columns of a row, offers :meth:`choose` to the model as a tool, and asks for
    :meth:`get_reward` at the end. The model's chat template must know tools.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._episode: Episode | None = None

    def reset(self, problem: int, **unused: Any) -> None:
        """Begin problem ``problem``; its prompt is already the row's."""
        self._episode = self._task.episode(problem)

    def choose(self, text: str) -> str:
        """Make the choice that a text stands for, and see what it brings.

        Args:
            text: What you look for, in words; or the word that you choose.
        """
        assert self._episode is not None, "TRL resets an environment before it is used"
        if is_over(self._episode):
            return "Everything is chosen."
        choice = self._episode.meaning(text)
        return "That stands for no choice." if choice is None else self._episode.take(choice).strip()

    def get_reward(self) -> float:
        """What the episode earned; choices that were not made are made in the task's own order."""
        assert self._episode is not None, "TRL resets an environment before it is used"
        finish(self._episode)
        return self._task.rewards([self._episode])[0]
