"""The environments of Gymnasium: its own checker, and rewards that equal recorded ones to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import preceptor.environments  # noqa: F401  # registers
from preceptor.errors import ConfigError
from preceptor.runs.random import derived_seed
from preceptor.systems.bandit.environment import BanditFamily
from tests.environments.recorded import QUICK, READING, STUDY, read_pairs, recorded

MADE: dict[str, dict[str, Any]] = {
    "Reading": {"overrides": READING},
    "Study": {"overrides": STUDY},
    "Bandit": {"rounds": 5},
}


def make(name: str, **changes: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(f"Preceptor/{name}-v0", **{**MADE[name], **changes})


def paid(env: gymnasium.Env[Any, Any], choices: list[int], **reset: Any) -> list[float]:
    """The rewards of an episode of these choices."""
    env.reset(**reset)
    steps = [env.step(np.int64(choice)) for choice in choices]
    assert [step[2] for step in steps] == [False] * (len(steps) - 1) + [True]
    return [float(step[1]) for step in steps]


@pytest.mark.parametrize("name", MADE)
def test_the_checker_of_gymnasium_finds_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "Bandit":  # a Gaussian arm may pay anything
            warnings.filterwarnings("ignore", ".*infinity. This is probably too")
        check_env(make(name).unwrapped)


def test_reading_pays_what_a_run_recorded(tmp_path: Path) -> None:
    # Batches of one, so that the run too scored each order alone: rounding depends on what is scored together.
    settings = {**QUICK, "episode.batch_size": 1, "update.advantage": "running_mean", "update.steps": 6}
    decisions = recorded(tmp_path / "run", "reading", settings=settings)
    decisions = [row for row in decisions if row["step"] < 6 or row["episode"] < 6]
    assert len(decisions) == 6
    env = make("Reading")
    for row in decisions:
        assert paid(env, read_pairs(row), options={"index": 0}) == [0.0, 0.0, 0.0, row["reward"]]
    assert len({row["reward"] for row in decisions}) > 1, "the orders differ, and so do their rewards"


def test_reading_a_probe_pays_what_a_run_recorded(tmp_path: Path) -> None:
    changes = {"reward.kind": "probe", "episode.budget": 2}
    settings = {**QUICK, **changes, "episode.batch_size": 1, "update.advantage": "running_mean"}
    decisions = recorded(tmp_path / "run", "reading", settings=settings)
    decisions = [row for row in decisions if row["episode"] < 3]
    assert len(decisions) == 3
    env = make("Reading", overrides={**READING, **changes})
    for row in decisions:
        assert paid(env, read_pairs(row), options={"index": 0}) == [0.0, row["reward"]]


@pytest.mark.parametrize("judged_by", ["table", "reading"])
def test_study_pays_what_a_run_recorded(judged_by: str, tmp_path: Path) -> None:
    really = judged_by == "reading"
    settings = {**STUDY, "update.steps": 3, "study.real_steps": 3 if really else 0, "record_every": 1}
    decisions = recorded(tmp_path / "run", "reading", "--preset", "study-smoke", settings=settings)
    decisions = [row for row in decisions if row["arm"] == "learned" and row["case"].startswith("train")]
    assert len(decisions) >= 9
    assert all(row["really_read"] == really for row in decisions)
    env = make("Study", overrides={**STUDY, "study.judged_by": judged_by})
    task: Any = env.unwrapped.task  # type: ignore[attr-defined]
    names = [case.name for case in task.cases]
    for row in decisions:
        assert paid(env, row["order"], options={"index": names.index(row["case"])}) == [0.0, 0.0, 0.0, row["reward"]]
    assert len({row["reward"] for row in decisions}) > 1


def test_bandit_pays_what_a_run_recorded(tmp_path: Path) -> None:
    settings = {
        "model.width": 16, "model.num_layers": 1, "model.num_heads": 2, "model.context_length": 128,
        "in_context.rounds": 5, "in_context.first_rounds": 5, "in_context.batch_size": 4, "in_context.steps": 3,
        "in_context.evaluation_bandits": 40, "in_context.horizons": "[1]",
    }  # fmt: skip
    decisions = recorded(tmp_path / "run", "bandit", "--preset", "in-context", settings=settings)
    assert len(decisions) >= 6
    for step in {row["step"] for row in decisions}:
        rows = [row for row in decisions if row["step"] == step]
        envs = gymnasium.make_vec("Preceptor/Bandit-v0", num_envs=4, rounds=5)
        envs.reset(seed=derived_seed(0, f"bandits of step {step}"))
        actions = np.zeros((4, 5), np.int64)
        for row in rows:
            actions[row["episode"]] = row["actions"]
        rewards = np.stack([envs.step(column)[1] for column in actions.T], 1)
        for row in rows:
            assert rewards[row["episode"]].tolist() == row["rewards"]


def test_one_bandit_is_that_of_the_vector_environment() -> None:
    gaussian = {"family": BanditFamily(2, "gaussian", "normal"), "rounds": 5}  # no two of its rewards are equal
    envs = gymnasium.make_vec("Preceptor/Bandit-v0", num_envs=1, **gaussian)
    envs.reset(seed=3)
    rewards = [float(envs.step(np.array([round_ % 2]))[1][0]) for round_ in range(5)]
    assert paid(make("Bandit", **gaussian), [0, 1, 0, 1, 0], seed=3) == rewards
    assert paid(make("Bandit", **gaussian), [0, 1, 0, 1, 0], seed=4) != rewards


def test_observations_say_what_was_read() -> None:
    env = make("Reading")
    observation, info = env.reset(seed=0)
    assert observation["order"].tolist() == [4, 4, 4, 4], "4 pairs, and none was read"
    assert info["action_mask"].tolist() == [1, 1, 1, 1]
    observation, _, _, _, info = env.step(np.int64(2))
    assert observation["order"].tolist() == [2, 4, 4, 4]
    assert info["action_mask"].tolist() == observation["available"].tolist() == [1, 1, 0, 1]


def test_refusals() -> None:
    env = make("Reading")
    with pytest.raises(ResetNeeded):
        env.unwrapped.step(np.int64(0))
    env.reset()
    env.step(np.int64(2))
    with pytest.raises(ConfigError, match=r"choice 2 is not available, these are: \[0, 1, 3\]"):
        env.step(np.int64(2))
    with pytest.raises(ConfigError, match=r"`index` must lie in 0\.\.0, got 7"):
        env.reset(options={"index": 7})
    for wrong, said in (
        ({"reward.reader": "policy"}, "an environment's reader is frozen"),
        ({"reward.context": "queries"}, "set it to values"),
        ({"data.num_pairz": 4}, "did you mean"),
    ):
        with pytest.raises(ConfigError, match=said):
            make("Reading", overrides={**READING, **wrong})
    with pytest.raises(ConfigError, match="`split` of study must be train or judge, got 'held_out'"):
        make("Study", split="held_out")
