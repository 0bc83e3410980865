"""A run of seconds on tasks: what it writes, and that it resumes bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.config import load_config
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.kinds import verify
from preceptor.systems.curriculum.tasks.result import TaskOutcome, records_of, task_result
from tests.systems.curriculum.small import SERVICES

SETTINGS = (
    "tasks.tasks=[{name: reverse, source: reverse, levels: 2}, {name: coin, source: coin, levels: 1}]",
    "tasks.controls=[uniform, oracle, dynamic_sampling]",
    "tasks.tokens_per_step=48",
    "tasks.warm_up_steps=2",
    "tasks.warm_up_rows=4",
    "tasks.validate_every=60",
    "tasks.validation_prompts=3",
    "model.width=16",
    "ppo.group_size=2",
    "update.steps=3",
    "save_every=1",
)


def arguments(out: Path) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["run", "curriculum", "--preset", "tasks", "--threads", "1", "--no-report", "--out", str(out), *sets]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    assert main(arguments(folder)) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_result_has_every_rule_and_the_tokens_to_each_success(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert list(result["arms"]) == ["frontier_range", "uniform", "oracle", "dynamic_sampling"]
    assert set(result["steps_to"]["uniform"]) == {"0.5", "0.8"}
    assert set(result["steps_to"]["uniform"]["0.8"]) == {"mean", "low", "high"}
    titles = [chart["title"] for chart in result["charts"]]
    assert "Success by level: uniform" in titles
    assert "Weights of the levels: frontier range" in titles


def test_a_run_that_was_stopped_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    for checkpoint in sorted((folder / "checkpoints").iterdir())[-1:]:  # the last one is lost
        shutil.rmtree(checkpoint)
    assert main(["resume", str(folder), "--no-report"]) == 0
    assert metrics(folder) == metrics(finished)


def test_every_recorded_weight_is_recomputed(finished: Path) -> None:
    config = load_config(CurriculumConfig, file=finished / "config.yaml")
    replayed = list(verify(config, finished, SERVICES))
    assert len(replayed) >= 3 * 3 * 3  # three rules (not the oracle), three steps, three sources
    assert all(entry.recorded == entry.recomputed for entry in replayed)


def test_tokens_to_a_success_are_interpolated() -> None:
    # 0.2 at 100 tokens and 0.6 at 200: 0.5 at 175. The trap does not count; 0.8 is not reached, so all 300 tokens.
    counts = {"rollout_tokens": 300, "steps": 3, "groups": 4, "groups_that_teach": 1}
    outcome = TaskOutcome(curve=[(100, [0.2, 0.9]), (200, [0.6, 0.9]), (300, [0.7, 0.9])], counts=counts)
    slow = TaskOutcome(curve=[(0, [0.0, 0.9]), (400, [0.8, 0.9])], counts=counts)
    records = records_of({"rule": outcome, "uniform": slow}, counted=[True, False], seed=0)
    assert records[0]["tokens_to_0.5"] == pytest.approx(175)
    assert (records[0]["tokens_to_0.8"], records[0]["reached_0.8"]) == (300, 0)
    ratio = task_result(records, config={"tasks": {}}, seeds=[0])["tokens_ratio"]["rule"]["0.5"]["mean"]
    assert ratio == pytest.approx(175 / 250)


def test_a_verdict_on_tasks_opens_with_what_happened_and_marks_what_chance_could_have_done() -> None:
    def records(ratio: float, num_seeds: int) -> list[dict[str, Any]]:
        made = []
        for seed in range(num_seeds):
            for rule, factor in (("rule", ratio * 1.1 ** (seed % 7 - 3)), ("uniform", 1.0)):
                costs = {f"{kind}_{level}": 1.0 for kind in ("tokens_to", "reached") for level in (0.5, 0.8)}
                logs = {f"log_tokens_to_{level}": math.log(factor) for level in (0.5, 0.8)}
                cell = {"arm": rule, "item": "all tasks", "split": "held_out", "seed": seed, "success": 0.9}
                made.append({**cell, **costs, **logs})
        return made

    def verdict(ratio: float, num_seeds: int) -> str:
        return str(task_result(records(ratio, num_seeds), config={"tasks": {}}, seeds=range(num_seeds))["verdict"])

    assert verdict(0.5, 7).startswith("Rule beats uniform by 0.693 log tokens over 7 seeds. ")
    assert "chance" not in verdict(0.5, 7)
    assert verdict(1.0, 7).startswith("Over 7 seeds rule cannot be told from uniform (")
    assert "not to be told from chance" in verdict(1.0, 7)
    assert "; one seed proves nothing yet. " in verdict(2.0, 1)
