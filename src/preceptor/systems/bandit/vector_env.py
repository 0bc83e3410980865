"""Sampled bandits as a vector environment of Gymnasium, for anybody's trainer.

>>> env = vector_env(num_envs=2, rounds=3)
>>> observations, _ = env.reset(seed=0)
>>> observations, rewards, terminations, truncations, info = env.step(np.array([0, 1]))
>>> rewards.tolist() == observations["reward"].tolist(), terminations.tolist()
(True, [False, False])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from preceptor.errors import ConfigError, MissingExtraError
from preceptor.systems.bandit.environment import BanditFamily, EpisodeTables

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def vector_env(family: BanditFamily | None = None, *, num_envs: int = 1, rounds: int = 100) -> VectorEnv:
    """Episodes of bandits never seen before; an agent must remember what it did, for the observation holds one round.

    An observation is the last round: ``action`` (the number of arms before the first), ``reward`` and ``round``. The
    reward is the drawn one; ``info`` has the ``regret`` of the step, which an agent may be trained on but must not see.
    All episodes end together after ``rounds``, and the step after that begins new ones, whatever its actions.

    Args:
        family: the bandits that are sampled; None is two Bernoulli arms with uniform means.
        num_envs: number of episodes side by side.
        rounds: of an episode.

    Raises:
        ConfigError: ``num_envs`` or ``rounds`` is below 1.
        MissingExtraError: gymnasium is not installed.
    """
    if num_envs < 1 or rounds < 1:
        raise ConfigError(f"`num_envs` and `rounds` must be at least 1, got {num_envs} and {rounds}")
    try:
        from gymnasium import spaces
        from gymnasium.error import ResetNeeded
        from gymnasium.vector import AutoresetMode, VectorEnv
        from gymnasium.vector.utils import batch_space
    except ImportError as error:
        raise MissingExtraError("the vector environment", package="gymnasium", extra="gymnasium") from error

    bandits = family or BanditFamily()

    # The class is made here, because its parent is known only where gymnasium is installed.
    class BanditVectorEnv(VectorEnv):
        metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  # as in gymnasium

        def __init__(self) -> None:
            self.num_envs = num_envs
            self.single_action_space = spaces.Discrete(bandits.num_arms)
            self.single_observation_space = spaces.Dict(
                {
                    "action": spaces.Discrete(bandits.num_arms + 1),
                    "reward": spaces.Box(-np.inf, np.inf, (), np.float64),
                    "round": spaces.Discrete(rounds + 1),
                }
            )
            self.action_space = batch_space(self.single_action_space, num_envs)
            self.observation_space = batch_space(self.single_observation_space, num_envs)
            self._generator = torch.Generator()
            self._tables: EpisodeTables | None = None
            self._round = 0

        def reset(
            self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
        ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
            """New bandits; ``seed`` is one number for all of them."""
            if isinstance(seed, list):
                raise ConfigError("`seed` is one number for all bandits, got a list")
            if seed is not None:
                self._generator.manual_seed(seed)
            elif self._tables is None:
                self._generator.seed()
            self._tables = bandits.sample(num_envs, rounds, self._generator)
            self._round = 0
            no_action = np.full(num_envs, bandits.num_arms, dtype=np.int64)
            return self._observation(no_action, np.zeros(num_envs)), {}

        def step(
            self, actions: NDArray[np.integer[Any]]
        ) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
            """One pull of every bandit."""
            if self._tables is None:
                raise ResetNeeded("call reset before step")
            if self._round == rounds:
                observations, info = self.reset()
                no = np.zeros(num_envs, dtype=bool)
                return observations, np.zeros(num_envs), no, no.copy(), info
            chosen = np.asarray(actions, dtype=np.int64)
            if not self.action_space.contains(chosen):
                raise ConfigError(
                    f"`actions` must be {num_envs} numbers from 0 to {bandits.num_arms - 1}, got {chosen}"
                )
            arms = torch.from_numpy(chosen)[:, None]  # [envs, 1]
            rewards = self._tables.rewards[:, self._round].gather(1, arms)[:, 0].numpy()
            expected = self._tables.expected
            regret = (expected.amax(1) - expected.gather(1, arms)[:, 0]).numpy()
            self._round += 1
            terminations = np.full(num_envs, self._round == rounds)
            return (
                self._observation(chosen, rewards),
                rewards,
                terminations,
                np.zeros(num_envs, dtype=bool),
                {"regret": regret, "_regret": np.ones(num_envs, dtype=bool)},
            )

        def _observation(self, actions: NDArray[np.int64], rewards: NDArray[Any]) -> dict[str, NDArray[Any]]:
            rounds = np.full(num_envs, self._round, dtype=np.int64)
            return {"action": actions.copy(), "reward": rewards.copy(), "round": rounds}

    return BanditVectorEnv()
