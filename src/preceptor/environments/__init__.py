"""Preceptor's tasks as environments, so that other trainers bring their engines.

Importing this registers three environments of Gymnasium, where it is installed::

    import gymnasium, preceptor.environments
    env = gymnasium.make("Preceptor/Reading-v0", preset="smoke")

``Preceptor/Reading-v0``, ``Preceptor/Study-v0`` and ``Preceptor/Bandit-v0`` are in
:mod:`preceptor.environments.gymnasium_envs`, reward functions for TRL's ``GRPOTrainer`` in
:mod:`preceptor.environments.trl_rewards`, and an environment of ``verifiers`` in
:mod:`preceptor.environments.verifiers_env`. All of them play tasks that :func:`load_task` gives, and are paid by the
systems' own reward code. See ``docs/environments.md``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from preceptor.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from preceptor.environments.episodes import Task

__all__ = ["TASKS", "load_task"]

TASKS = {"reading": ("reading", "default"), "study": ("reading", "study-smoke"), "bandit": ("bandit", "default")}
"""The tasks, each with its system and the preset that it has where none is given."""


def load_task(
    name: str,
    *,
    preset: str | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    split: str = "train",
    mode: str | None = None,
    device: str = "cpu",
) -> Task:
    """The task called ``name``, with the configuration that ``preceptor run`` would have.

    Args:
        name: ``reading``, ``study`` or ``bandit``.
        preset: of the system (reading, reading, bandit); None is ``default``, and for study ``study-smoke``.
        overrides: single keys of the configuration, ``{"data.num_pairs": 6}`` or ``["data.num_pairs=6"]``.
        split: ``train``; or what is kept for judging: ``held_out``, and for study ``judge``.
        mode: of study: ``asked`` or ``seed``.
        device: of the models: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ConfigError: an unknown task or key, or a configuration that an environment cannot have.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    import torch

    from preceptor import _services
    from preceptor.systems import find_system
    from preceptor.systems.base import configuration

    system, default = TASKS[name]
    config = configuration(find_system(system), preset=preset or default, overrides=overrides)
    if mode not in (None, "asked", "seed") or (mode and name != "study"):
        raise ConfigError(f"`mode` is asked or seed, and of the task study alone, got {mode!r} for {name}")
    if name == "bandit":
        from preceptor.environments.bandit import BanditTask

        return BanditTask(config, split=split)
    cache_dir, where = _services().cache_dir, torch.device(device)
    if name == "study":
        from preceptor.environments.study import StudyTask

        chosen: Any = mode
        return StudyTask(config, split=split, mode=chosen, cache_dir=cache_dir, device=where)
    from preceptor.environments.reading import ReadingTask

    return ReadingTask(config, split=split, cache_dir=cache_dir, device=where)


def _register() -> None:
    """The environments in Gymnasium's registry."""
    from gymnasium.envs.registration import register

    module = "preceptor.environments.gymnasium_envs"
    register("Preceptor/Reading-v0", entry_point=f"{module}:ReadingEnv")
    register("Preceptor/Study-v0", entry_point=f"{module}:StudyEnv")
    register(
        "Preceptor/Bandit-v0",
        entry_point=f"{module}:BanditEnv",
        vector_entry_point="preceptor.systems.bandit.vector_env:vector_env",
    )


if importlib.util.find_spec("gymnasium") is not None:
    _register()
