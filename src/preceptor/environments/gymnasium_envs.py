"""Reading, study and bandit as environments of Gymnasium.

Numbers are float32 unless said otherwise. A choice that is not available is refused; ``info["action_mask"]`` says which
are, so ``env.action_space.sample(info["action_mask"])`` is always legal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray
from torch import Tensor

from preceptor.environments import load_task
from preceptor.environments.episodes import Reading, Task, is_over
from preceptor.environments.reading import ReadingTask
from preceptor.environments.study import StudyTask
from preceptor.errors import ConfigError
from preceptor.systems.bandit.environment import BanditFamily

Observation = dict[str, Any]
Info = dict[str, Any]


class _PassageEnv(gymnasium.Env[Observation, np.int64]):
    """What :class:`ReadingEnv` and :class:`StudyEnv` share: problems whose passages are read one by one.

    Attributes:
        task: its problems, and what an episode earns.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # as in gymnasium
    task: ReadingTask | StudyTask
    _episode: Reading | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """A new reading, of the problem ``options["index"]`` or of a drawn one."""
        super().reset(seed=seed)
        self._episode = self.task.episode(_problem(self, options, len(self.task)))
        return self._observe(self._episode)

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, Info]:
        """Reads a passage."""
        episode, reward, over = _read(self.task, self._episode, action)
        observation, info = self._observe(episode)
        return observation, reward, over, False, info

    def _observe(self, episode: Reading) -> tuple[Observation, Info]:
        # What is the same at every step of a problem, and then what this episode has read.
        seen = self._seen(episode.index)
        assert isinstance(self.observation_space, spaces.Dict)
        observation, info = _read_so_far(episode, self.observation_space)
        return {**seen, **observation}, info

    def _seen(self, index: int) -> Observation:
        """What is seen of a problem whatever was read."""
        raise NotImplementedError


class ReadingEnv(_PassageEnv):
    """One article an episode: which pair is read next?

    - action: ``Discrete(pairs)``, the pair that is read; each once. ``pairs`` is that of the longest article.
    - observation: ``keys`` ``Box[pairs, dimension]``, the pairs' key vectors (0 beyond a shorter article);
      ``available`` ``MultiBinary[pairs]``; ``order`` ``MultiDiscrete[budget]``, what was read, in order, and ``pairs``
      where nothing was yet.
    - reward: 0 until the last step, then what ``preceptor run reading`` records for this order (nats per token).
    - info: ``index`` of the article, ``action_mask``.

    ``reset(options={"index": i})`` takes article i; without it one is drawn.

    Args:
        preset, overrides, split, device: of :func:`~preceptor.environments.load_task`.
    """

    task: ReadingTask

    def __init__(
        self,
        *,
        preset: str | None = None,
        overrides: Iterable[str] | Mapping[str, Any] = (),
        split: str = "train",
        device: str = "cpu",
    ) -> None:
        task = load_task("reading", preset=preset, overrides=overrides, split=split, device=device)
        assert isinstance(task, ReadingTask)
        self.task = task
        self._num_choices = max(article.num_pairs for article in task.articles)
        budget = max(task.budget(article.num_pairs) for article in task.articles)
        self.action_space = spaces.Discrete(self._num_choices)
        shape = (self._num_choices, task.keys(0).shape[1])
        keys = [task.keys(index) for index in range(len(task))]
        self.observation_space = spaces.Dict({"keys": _box(keys, shape), **_read_spaces(self._num_choices, budget)})

    def _seen(self, index: int) -> Observation:
        own = self.task.keys(index).float().numpy()
        return {"keys": np.pad(own, ((0, self._num_choices - len(own)), (0, 0)))}


class StudyEnv(_PassageEnv):
    """One case an episode: which candidate of a mixed pool is read next, for what is asked afterwards?

    - action: ``Discrete(candidates)``; each once.
    - observation: what the system's own policy sees, ``queries`` ``Box[dimension]``, ``keys``
      ``Box[candidates, dimension]``, ``query_channels`` ``Box[candidates, channels]``, ``key_channels`` and
      ``read_channels`` ``Box[candidates, candidates, channels]``; and ``available`` and ``order`` as in reading.
    - reward: 0 until the last step, then the gain over reading nothing (nats per value token).
    - info: ``index`` of the case, ``action_mask``.

    ``reset(options={"index": i})`` takes case i; without it one is drawn.

    Args:
        preset, overrides, split, mode, device: of :func:`~preceptor.environments.load_task`.
    """

    task: StudyTask

    def __init__(
        self,
        *,
        preset: str | None = None,
        overrides: Iterable[str] | Mapping[str, Any] = (),
        split: str = "train",
        mode: str | None = None,
        device: str = "cpu",
    ) -> None:
        task = load_task("study", preset=preset, overrides=overrides, split=split, mode=mode, device=device)
        assert isinstance(task, StudyTask)
        self.task = task
        num_choices = len(task.cases[0].pool.candidates)
        self.action_space = spaces.Discrete(num_choices)
        self.observation_space = spaces.Dict(
            {
                **{
                    name: _box([task.observation(index)[name] for index in range(len(task))], tuple(tensor.shape))
                    for name, tensor in task.observation(0).items()
                },
                **_read_spaces(num_choices, task.config.episode.budget),
            }
        )

    def _seen(self, index: int) -> Observation:
        return {name: tensor.float().numpy().copy() for name, tensor in self.task.observation(index).items()}


class BanditEnv(gymnasium.Env[Observation, np.int64]):
    """One bandit never seen before an episode; :func:`~preceptor.systems.bandit.vector_env.vector_env` for one of them.

    - action: ``Discrete(arms)``.
    - observation: the last round: ``action`` ``Discrete(arms + 1)`` (the number of arms before the first), ``reward``
      ``Box[]`` in float64 and ``round`` ``Discrete(rounds + 1)``.
    - reward: what the arm paid.
    - info: ``regret`` of the step, ``action_mask``.

    The bandit of ``reset(seed=s)`` is that of the vector environment's ``reset(seed=s)`` with one environment.

    Args:
        family: the bandits that are sampled; None is two Bernoulli arms with uniform means.
        rounds: of an episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # as in gymnasium

    def __init__(self, family: BanditFamily | None = None, *, rounds: int = 100) -> None:
        from preceptor.systems.bandit.vector_env import vector_env

        self._env = vector_env(family, num_envs=1, rounds=rounds)
        self.action_space = self._env.single_action_space
        self.observation_space = self._env.single_observation_space
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """A new bandit."""
        super().reset(seed=seed)
        # Without a seed the next bandit follows from this environment's own generator, as Gymnasium asks.
        own = int(self.np_random.integers(2**31)) if seed is None else seed
        observations, _ = self._env.reset(seed=own)
        self._over = False
        return _single(observations), {"regret": 0.0, "action_mask": self._mask()}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, Info]:
        """One pull."""
        if self._over:
            raise ResetNeeded("call reset before step")
        observations, rewards, terminations, _, info = self._env.step(np.array([int(action)]))
        self._over = bool(terminations[0])
        seen = {"regret": float(info["regret"][0]), "action_mask": self._mask()}
        return _single(observations), float(rewards[0]), self._over, False, seen

    def _mask(self) -> NDArray[np.int8]:
        assert isinstance(self.action_space, spaces.Discrete)
        return np.ones(int(self.action_space.n), np.int8)


def _single(observations: Mapping[str, NDArray[Any]]) -> Observation:
    """The only row of a vector environment's observations."""
    return {
        "action": observations["action"][0],
        "reward": np.asarray(observations["reward"][0]),
        "round": observations["round"][0],
    }


def _box(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> spaces.Box:
    """float32 of this shape; the bound is the largest number that any problem has, for all of them are known."""
    bound = max(float(tensor.abs().max()) for tensor in tensors)
    return spaces.Box(-bound, bound, shape, np.float32)


def _read_spaces(num_choices: int, budget: int) -> dict[str, spaces.Space[Any]]:
    return {
        "available": spaces.MultiBinary(num_choices),
        "order": spaces.MultiDiscrete(np.full(budget, num_choices + 1)),
    }


def _read_so_far(episode: Reading, space: spaces.Dict) -> tuple[Observation, Info]:
    """``available`` and ``order`` of an episode, and its info."""
    shapes = {name: space[name].shape for name in ("available", "order")}
    assert shapes["available"] is not None
    assert shapes["order"] is not None
    available = np.zeros(shapes["available"], np.int8)
    available[: len(episode.available)] = episode.available
    # The number of passages stands for "nothing yet": it is no passage's index.
    order = np.full(shapes["order"], len(available), np.int64)
    order[: len(episode.choices)] = episode.choices
    return {"available": available, "order": order}, {"index": episode.index, "action_mask": available.copy()}


def _problem(env: gymnasium.Env[Any, Any], options: Mapping[str, Any] | None, num_problems: int) -> int:
    """The problem that ``options`` names, or a drawn one."""
    index = (options or {}).get("index")
    if index is None:
        return int(env.np_random.integers(num_problems))
    if not isinstance(index, int | np.integer) or not 0 <= index < num_problems:
        raise ConfigError(f"the option `index` must lie in 0..{num_problems - 1}, got {index!r}")
    return int(index)


def _read(task: Task, episode: Reading | None, action: np.int64) -> tuple[Reading, float, bool]:
    """The episode after ``action``, the reward of that step, and whether it was the last one."""
    if episode is None:
        raise ResetNeeded("call reset before step")
    episode.take(int(action))
    over = is_over(episode)
    return episode, task.rewards([episode])[0] if over else 0.0, over
