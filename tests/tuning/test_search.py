"""Searches that prune, are killed, refused and taken up again; the runs are made up (``fake_run.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from preceptor.comparison.cells import Cell, CellFailed
from preceptor.comparison.sweep import Local
from preceptor.errors import ConfigError, LockedError
from preceptor.tuning.search import Outcome, Plan, Search, best
from preceptor.tuning.space import Dimension

pytest.importorskip("optuna", reason="the extra 'tune' is not installed")

CONFIG = {"bonus": 0.8, "data": {"words": 3}}
FAKE = (sys.executable, str(Path(__file__).parents[1] / "comparison" / "fake_run.py"))
PLAN = Plan("toy", "reward", True, (Dimension("seed", 0, 999, whole=True),), ("--input", "x"), 3)


@pytest.fixture(autouse=True)
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_RUN_CONFIG", json.dumps(CONFIG))
    monkeypatch.setenv("FAKE_RUN_STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


def cell_of(number: int, values: Mapping[str, Any]) -> Cell:
    """A made-up run earns its seed and the step at each step, so that the search is for the largest seed."""
    seed = int(values["seed"])
    return Cell(
        f"trial{number:04}",
        {**CONFIG, "seed": seed, "input": "x"},
        ("toy", "--seed", str(seed), "--input", "x"),
    )


def searched(root: Path, num_trials: int, *, plan: Plan = PLAN, num_jobs: int = 2) -> list[Outcome]:
    search = Search(plan, root, cell_of)
    try:
        search.run(num_trials, Local(root, num_jobs=num_jobs, program=FAKE))
        search.write()
        return search.outcomes()
    finally:
        search.close()


def test_trials_are_ranked_by_the_mean_of_the_last_rows(tmp_path: Path) -> None:
    outcomes = searched(tmp_path, 4)
    seeds = [outcome.values["seed"] for outcome in outcomes]
    assert seeds == sorted(seeds, reverse=True)
    assert [outcome.value for outcome in outcomes] == [seed + (1 + 2 + 3 + 4) / 4 for seed in seeds]  # of all four rows
    assert {(outcome.state, outcome.steps) for outcome in outcomes} == {("finished", 4)}
    assert best(outcomes) == outcomes[0]
    written = json.loads((tmp_path / "tune.json").read_text())
    assert [trial["number"] for trial in written["trials"]] == [outcome.number for outcome in outcomes]
    assert written["plan"]["search seed"] == "seed=0:999"


def test_less_can_be_better(tmp_path: Path) -> None:
    for maximise, direction in ((False, "MINIMIZE"), (True, "MAXIMIZE")):
        search = Search(PLAN._replace(maximise=maximise), tmp_path / direction, cell_of)
        assert search._study.direction.name == direction  # which decides what is proposed and what is stopped
        search.close()
    seeds = [outcome.values["seed"] for outcome in searched(tmp_path, 3, plan=PLAN._replace(maximise=False))]
    assert seeds == sorted(seeds)


def test_a_trial_below_the_median_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is over the last ten rows only: of 16 steps, the seed and the mean of 7 to 16."""
    monkeypatch.setenv("FAKE_RUN_STEPS", "16")
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.08")
    outcomes = searched(tmp_path, 11, num_jobs=3)
    pruned = [outcome for outcome in outcomes if outcome.state == "pruned"]
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    assert len(finished) + len(pruned) == 11
    assert len(finished) >= 5  # the first ones are compared with nothing
    assert pruned
    assert best(outcomes) == max(finished, key=lambda outcome: outcome.values["seed"])
    assert all(outcome.value == outcome.values["seed"] + 11.5 for outcome in finished)
    for outcome in pruned:
        assert 10 <= outcome.steps < 16
        # Stopped for a reason: half of what had ended by then was better.
        assert outcome.values["seed"] < sorted(one.values["seed"] for one in finished)[-2]
        assert not (tmp_path / f"trial{outcome.number:04}" / "result.json").exists()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_search import searched
searched(Path({root!r}), 9)
"""


def test_a_search_killed_at_any_moment_goes_on(tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.15")
    root = tmp_path / "s"
    for pause in (0.4, 0.9, 0.2):
        code = KILLED.format(here=str(Path(__file__).parent), root=str(root))
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        while not list(root.glob("trial*/manifest.json")):
            time.sleep(0.02)
        time.sleep(pause)
        assert process.poll() is None
        process.kill()
        process.wait()
    # As a process that was killed while it held the lock of the journal leaves it; one of the three may have.
    lock = root / "trials.journal.lock"
    if not lock.is_symlink():
        lock.symlink_to(root / "trials.journal")
    outcomes = searched(root, 9)
    assert sorted(outcome.number for outcome in outcomes) == list(range(9))
    assert all(outcome.state == "finished" for outcome in outcomes)
    assert all(outcome.value == outcome.values["seed"] + 2.5 for outcome in outcomes)
    # To catch: the generator of proposals begun anew, which would propose the first values once more.
    assert len({outcome.values["seed"] for outcome in outcomes}) == 9
    began = [line for line in starts.read_text().splitlines() if line.endswith(" run")]
    assert sorted(began) == sorted(set(began))
    starts.unlink()
    assert searched(root, 9) == outcomes
    assert not starts.exists()


def test_more_trials_go_on_after_the_first(tmp_path: Path) -> None:
    first = searched(tmp_path, 2)
    second = searched(tmp_path, 4)
    assert [outcome for outcome in second if outcome.number < 2] == first
    assert len(second) == 4


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    searched(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"holds another search \(metric: 'reward' → 'loss'\); choose another --out"):
        searched(tmp_path, 1, plan=PLAN._replace(metric="loss"))
    with pytest.raises(ConfigError, match=r"search seed: 'seed=0:999' → 'seed=0:99'"):
        searched(tmp_path, 1, plan=PLAN._replace(space=(Dimension("seed", 0, 99, whole=True),)))
    search = Search(PLAN, tmp_path, cell_of)
    with pytest.raises(LockedError):
        Search(PLAN, tmp_path, cell_of)
    search.close()


def test_a_metric_that_no_row_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has the metric 'rewrd' \(did you mean 'reward'\?\)"):
        searched(tmp_path, 3, plan=PLAN._replace(metric="rewrd"), num_jobs=1)
    assert len(list(tmp_path.glob("trial0*"))) == 1  # found after the first


def test_numbers_that_diverge_fail_a_trial_and_anything_else_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN._replace(space=(Dimension("seed", choices=("1", "2")),))
    monkeypatch.setenv("FAKE_RUN_DIVERGES", "1")
    outcomes = searched(tmp_path / "a", 6, plan=plan)
    assert {(outcome.values["seed"], outcome.state) for outcome in outcomes} == {("1", "failed"), ("2", "finished")}
    assert outcomes[-1].value is None
    monkeypatch.delenv("FAKE_RUN_DIVERGES")
    monkeypatch.setenv("FAKE_RUN_REFUSES", "1")
    with pytest.raises(CellFailed, match="`seed` is refused") as caught:
        searched(tmp_path / "b", 6, plan=plan)
    assert caught.value.exit_code == 2
    monkeypatch.delenv("FAKE_RUN_REFUSES")
    again = searched(tmp_path / "b", 6, plan=plan)  # the refused trial is tried again, and none is lost
    assert [outcome.state for outcome in again] == ["finished"] * 6


def test_values_that_do_not_go_together_fail_a_trial_and_are_said(tmp_path: Path) -> None:
    """Each is allowed by itself, so that only the whole configuration can tell."""

    def picky(number: int, values: Mapping[str, Any]) -> Cell:
        if values["seed"] == "1":
            raise ConfigError("`a` and `b` exclude each other")
        return cell_of(number, values)

    said: list[str] = []
    plan = PLAN._replace(space=(Dimension("seed", choices=("1", "2")),))
    search = Search(plan, tmp_path, picky)
    search.run(5, Local(tmp_path, num_jobs=2, program=FAKE), say=said.append)
    states = [(outcome.values["seed"], outcome.state) for outcome in search.outcomes()]
    search.close()
    assert len(states) == 5
    assert set(states) == {("1", "failed"), ("2", "finished")}
    assert [line for line in said if line.endswith("is no configuration: `a` and `b` exclude each other")]
