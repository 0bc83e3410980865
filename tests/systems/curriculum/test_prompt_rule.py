"""Prompts whose datasets are drawn by weights of their own, which follow what rewards could teach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from preceptor.cli import main
from preceptor.config import load_config
from preceptor.objectives.task_mixture import make_task_mixture
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.kinds import verify
from preceptor.systems.curriculum.verify import groups_of_prompts
from tests.systems.curriculum.small import METHODS, SERVICES, STEPS, arguments, rows

RULE = "ppo.prompt_rule=mean_advantage"


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "run"
    assert main(arguments(tiny_folder, folder, [RULE])) == 0
    return folder


def test_prompts_have_weights_of_their_own(finished: Path) -> None:
    logged = [row for row in rows(finished / "metrics.jsonl") if "prompt_weights" in row]
    assert {row["arm"] for row in logged} == {METHODS[0], METHODS[1]}  # those that have rollouts
    for row in logged:
        assert sum(row["prompt_weights"].values()) == pytest.approx(1)
    assert any(row["prompt_weights"] != row["weights"] for row in logged)
    decided = [json.loads(line) for line in (finished / "decisions.jsonl").read_text().splitlines()]
    prompts = [row for row in decided if row["kind"] == "prompts"]
    assert len(prompts) == 2 * STEPS
    # The weights after a step by hand: SEC's running mean at rate ½, softmax at 0.1, from the recorded advantages.
    first = prompts[0]
    assert min(first["advantage"]) > 0  # of absolute advantages
    means = []
    for source in range(2):
        of = [a for s, a in zip(first["sources"], first["advantage"], strict=True) if s == source]
        means.append(0.5 * sum(of) / len(of) if of else 0.0)
    expected = torch.softmax(torch.tensor(means, dtype=torch.float64) / 0.1, 0)
    assert first["weights"] == pytest.approx(expected.tolist())


def test_prompts_come_from_where_their_own_weights_say(tiny_folder: Path, tmp_path: Path) -> None:
    fixed = ("mixture.rule=static", "mixture.weights=[1.0, 0.0]", "mixture.exploration=0.0", "mixture.settings={}")
    drawn = {}
    for rule in ("mixture", "uniform"):
        folder = tmp_path / rule
        changes = [*fixed, f"ppo.prompt_rule={rule}", "controls.frozen_policy=false", "update.steps=2"]
        assert main(arguments(tiny_folder, folder, changes)) == 0
        rollouts = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
        drawn[rule] = {row["dataset"] for row in rollouts if row["kind"] == "rollout"}
    assert drawn == {"mixture": {"dialogue"}, "uniform": {"dialogue", "noise"}}


def test_the_weights_are_recomputed_and_survive_a_stop(finished: Path, tmp_path: Path) -> None:
    config = load_config(CurriculumConfig, file=finished / "config.yaml")
    replayed = list(verify(config, finished, SERVICES))
    assert sum("prompts of" in entry.where for entry in replayed) == 2 * STEPS * 2
    assert all(entry.recorded == pytest.approx(entry.recomputed, abs=1e-6) for entry in replayed)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    for checkpoint in sorted((folder / "checkpoints").iterdir())[-1:]:
        shutil.rmtree(checkpoint)
    assert main(["resume", str(folder), "--no-report"]) == 0
    assert rows(folder / "metrics.jsonl") == rows(finished / "metrics.jsonl")


def test_a_dataset_whose_continuations_teach_is_drawn_more() -> None:
    mixture = make_task_mixture("mean_advantage", num_levels=[1, 1])
    for _ in range(3):
        mixture.update(groups_of_prompts([0, 1, 1], [0.8, 0.1, 0.1]), progress=0.0)
    assert mixture.weights[0] > 0.9
