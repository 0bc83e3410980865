"""A fifth system, of another package: under 100 lines, found by its entry point, and used like the other four."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import preceptor

TWO_ARMED = '''"""Two arms pay with different probabilities: a softmax over preferences learns which one pays more."""

from __future__ import annotations

import time

import torch
from pydantic import Field

from preceptor.config import Options, to_dict
from preceptor.evaluation.summary import compare, summarise
from preceptor.evaluation.verdict import verdict as verdict_of
from preceptor.report.sections import Lines, Section, Table
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.base import Replayed, System

ARMS = ("left", "right")


class TwoArmedConfig(Options):
    """Configuration of ``preceptor run two_armed``."""

    seed: int = Field(0, description="Seed of every random stream.")
    steps: int = Field(40, ge=1, description="Number of pulls.")
    p_right: float = Field(0.9, ge=0, le=1, description="Probability that the right arm pays; the left one has 1 - p.")
    step_size: float = Field(0.5, ge=0, description="Step size of the preferences.")
    pause: float = Field(0.0, ge=0, description="Pause after each pull in seconds.")
    save_every: int = Field(10, ge=1, description="Number of steps between checkpoints.")


class State:
    """The preferences and the rewards so far."""

    def __init__(self):
        self.preferences = torch.zeros(2)
        self.rewards = []

    def state_dict(self):
        return {"preferences": self.preferences, "rewards": self.rewards}

    def load_state_dict(self, state):
        self.preferences, self.rewards = state["preferences"], state["rewards"]


def reward_table(config):
    """What each arm pays at each pull, [steps, arms]."""
    draws = torch.rand(config.steps, 2, generator=torch.Generator().manual_seed(config.seed))
    return (draws < torch.tensor([1 - config.p_right, config.p_right])).double()


def train(config, run, services):
    state, table = State(), reward_table(config)
    for step in run.loop(config.steps, state, columns={"reward": "reward", "p_right": "P(right)"}):
        policy = state.preferences.softmax(0)
        arm = int(torch.multinomial(policy, 1, generator=run.streams["actions"]))
        reward = float(table[step - 1, arm])
        state.preferences += config.step_size * (reward - 0.5) * (torch.eye(2)[arm] - policy)
        state.rewards.append(reward)
        run.record([{"step": step, "arm": "learned", "pulled": ARMS[arm], "reward": reward}])
        run.log(step, {"reward": reward, "p_right": float(policy[1])})
        time.sleep(config.pause)
    means = {"learned": sum(state.rewards) / len(state.rewards), "uniform": float(table.mean())}
    records = [
        {"arm": method, "item": "arms", "split": "train", "seed": config.seed, "reward": mean}
        for method, mean in means.items()
    ]
    return result(records, config=to_dict(config), seeds=[config.seed])


def result(records, *, config, seeds):
    unit = {"reward": "reward/pull"}
    comparisons = [compare(records, metric="reward", arm="learned", baseline="uniform", unit=unit["reward"])]
    arms = summarise(records, units=unit)
    return {"system": "two_armed", "status": "finished", "config": config, "seeds": list(seeds), "arms": arms,
            "table": ["reward"], "baseline": "uniform", "comparisons": comparisons, "records": list(records),
            "verdict": verdict_of(comparisons)}


def sections(run):
    p_right = run.manifest["config"]["p_right"]
    table = Table("", ["arm", "pays"], [["left", f"{1 - p_right:.2f}"], ["right", f"{p_right:.2f}"]])
    return [Section("What the two arms pay", [table]),
            Section("Training", [Lines("Right arm", "probability", {"p_right": "P(right)"}, limits=(0.0, 1.0))])]


def verify(config, folder, services):
    table = reward_table(config)
    for row in read_jsonl(folder / "decisions.jsonl"):
        reward = float(table[row["step"] - 1, ARMS.index(row["pulled"])])
        yield Replayed(f"step {row['step']}", row["reward"], reward)


SYSTEM = System(
    name="two_armed", summary="two arms, one of which pays more", Config=TwoArmedConfig, streams=("actions",),
    train=train, result=result, sections=sections, verify=verify, flags={"seed": "seed", "p_right": "p_right"},
    extendable=("steps",),
)
'''


class Workplace:
    """An empty folder, and beside it a folder of installed packages with the system in it."""

    def __init__(self, root: Path) -> None:
        site, self.path = root / "site", root / "work"
        metadata = site / "two_armed-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: two-armed\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[preceptor.systems]\ntwo_armed = two_armed:SYSTEM\n")
        (site / "two_armed.py").write_text(TWO_ARMED)
        self.path.mkdir()
        source = Path(preceptor.__file__).parents[1]
        self.environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{source}", "OMP_NUM_THREADS": "1"}

    def start(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "preceptor", *argv],
            cwd=self.path, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def preceptor(self, *argv: str, exit_code: int = 0) -> str:
        """What the command says on its standard output."""
        process = self.start(*argv)
        out, error = process.communicate(timeout=300)
        assert process.returncode == exit_code, error
        assert "Traceback" not in error
        return out

    def rows(self, run: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / run / name).read_text().splitlines()]

    def json(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / name).read_text())
        return loaded


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Where seed 0 was stopped by SIGTERM and resumed, and seeds 0 and 1 were run whole and compared."""
    workplace = Workplace(tmp_path_factory.mktemp("own"))
    stopped = workplace.start(
        *("run", "two_armed", "--out", "stopped", "--threads", "1", "--p-right", "0.8", "--set", "pause=0.1")
    )
    try:
        deadline = time.monotonic() + 120
        metrics = workplace.path / "stopped" / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert time.monotonic() < deadline, "no third step in two minutes"
            assert stopped.poll() is None, stopped.communicate()[1]
            time.sleep(0.02)
        stopped.send_signal(signal.SIGTERM)
        _, error = stopped.communicate(timeout=60)
    finally:
        stopped.kill()
    assert stopped.returncode == 143, error
    assert 3 <= len(workplace.rows("stopped")) < 40
    workplace.preceptor("resume", "stopped")
    compared = ("--seeds", "0-1", "--out", "sweep", "--jobs", "1", "--", "--p-right", "0.8")
    workplace.preceptor("compare", "two_armed", *compared)
    return workplace


def test_the_system_is_under_100_lines() -> None:
    assert len([line for line in TWO_ARMED.splitlines() if line.strip()]) < 100


def test_it_is_listed(workplace: Workplace) -> None:
    described = json.loads(workplace.preceptor("list", "--json"))
    assert list(described)[-1] == "two_armed", "Preceptor's own come first"
    assert described["two_armed"]["description"] == "two arms, one of which pays more"


def test_a_stopped_run_is_resumed_bit_for_bit(workplace: Workplace) -> None:
    assert [row["step"] for row in workplace.rows("stopped")] == list(range(1, 41))
    for name in ("metrics.jsonl", "decisions.jsonl"):
        assert workplace.rows("stopped", name) == workplace.rows("sweep/seed0", name)
    stopped, whole = (workplace.json(f"{run}/result.json") for run in ("stopped", "sweep/seed0"))
    assert stopped["records"] == whole["records"]
    assert len({row["reward"] for row in workplace.rows("stopped")}) == 2, (
        "rewards that do not vary would prove nothing"
    )


def test_it_learns(workplace: Workplace) -> None:
    for run in ("stopped", "sweep/seed1"):
        assert workplace.rows(run)[0]["p_right"] == 0.5
        assert workplace.rows(run)[-1]["p_right"] > 0.8


def test_its_page_shows_its_sections(workplace: Workplace) -> None:
    (workplace.path / "stopped" / "report.html").unlink()
    assert "report.html" in workplace.preceptor("report", "stopped")
    page = (workplace.path / "stopped" / "report.html").read_text()
    assert "What the two arms pay" in page
    assert "Right arm" in page
    assert "Right arm" in (workplace.path / "sweep" / "report.html").read_text(), "its curves over all seeds"


def test_its_runs_are_compared(workplace: Workplace) -> None:
    comparison = workplace.json("sweep/comparison.json")
    assert comparison["seeds"] == [0, 1]
    (contrast,) = comparison["comparisons"]
    assert (contrast["arm"], contrast["baseline"], contrast["metric"]) == ("learned", "uniform", "reward")
    differences = []
    for seed in (0, 1):
        records = {r["arm"]: r["reward"] for r in workplace.json(f"sweep/seed{seed}/result.json")["records"]}
        differences.append(records["learned"] - records["uniform"])
    assert contrast["mean"] == pytest.approx(sum(differences) / 2)


def test_it_is_replayed_and_a_changed_reward_is_found(workplace: Workplace) -> None:
    assert "40 numbers recomputed, all equal" in workplace.preceptor("replay", "stopped")
    decisions = workplace.path / "sweep" / "seed1" / "decisions.jsonl"
    row, *rest = workplace.rows("sweep/seed1", "decisions.jsonl")
    decisions.write_text("\n".join(map(json.dumps, [row | {"reward": 0.25}, *rest])) + "\n")
    said = workplace.preceptor("replay", "sweep/seed1", exit_code=7)
    assert "parted: step 1: recorded 0.25" in said
    assert "1 of 40 numbers part" in said


def test_it_goes_on_past_its_planned_end(workplace: Workplace) -> None:
    before = workplace.rows("sweep/seed0")
    workplace.preceptor("resume", "sweep/seed0", "--set", "steps=45", "--no-report")
    after = workplace.rows("sweep/seed0")
    assert after[:40] == before
    assert [row["step"] for row in after[40:]] == [41, 42, 43, 44, 45]
