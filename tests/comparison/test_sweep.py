"""Sweeps that are killed, refused, taken up again; the runs are made up (``fake_run.py``), the processes real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import grouped, merged_records, read_finished, run_folders
from preceptor.comparison.sweep import Cell, CellFailed, run_cells
from preceptor.comparison.table import comparison_tables
from preceptor.comparison.write import write_comparison
from preceptor.errors import ConfigError, DataError
from preceptor.evaluation.summary import compare, summarise

CONFIG = {"bonus": 0.8, "data": {"words": 3}}
FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
UNITS = {"score": "points", "tokens": "tokens"}


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where every start of a run is noted."""
    monkeypatch.setenv("FAKE_RUN_CONFIG", json.dumps(CONFIG))
    monkeypatch.setenv("FAKE_RUN_STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


def cells(num_seeds: int = 10, inputs: Sequence[str] = ("x",), config: Mapping[str, Any] = CONFIG) -> list[Cell]:
    return [
        Cell(f"seed{s}-{i}", {**config, "seed": s, "input": i}, ("toy", "--seed", str(s), "--input", i))
        for i in inputs
        for s in range(num_seeds)
    ]


def toy_result(records: Any, *, config: Any, seeds: Any) -> dict[str, Any]:
    comparisons = [
        compare(records, metric="score", arm="learned", baseline=b, unit="points") for b in ("random", "untrained")
    ]
    return {
        "system": "toy",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": summarise(records, units=UNITS),
        "table": ["score"],
        "comparisons": comparisons,
        "records": list(records),
    }


def conclude(root: Path, names: Sequence[str], **options: Any) -> dict[str, Any]:
    runs = [read_finished(root / name) for name in names]
    groups = grouped(runs, inputs=["input"])
    merged = merged_result(groups, toy_result)
    comparison = comparison_of(groups, merged, noun="input", **options)
    write_comparison(root, comparison, merged, runs)
    return comparison


def test_a_sweep_runs_every_cell_once_and_concludes(tmp_path: Path, starts: Path) -> None:
    said: list[str] = []
    planned = cells(inputs=("x", "y"))
    run_cells(planned, tmp_path / "s", num_jobs=4, program=FAKE, say=said.append)
    assert sorted(starts.read_text().splitlines()) == sorted(f"{cell.name} run" for cell in planned)
    assert said[0] == "0 of 20 runs are finished"
    assert said[-1].endswith("(20 of 20)")
    comparison = conclude(tmp_path / "s", [cell.name for cell in planned])
    assert [(c["baseline"], c["n"], c["claimed"]) for c in comparison["comparisons"]] == [
        ("random", 20, True),
        ("untrained", 20, True),
    ]
    assert comparison["arms"]["train"]["learned"]["tokens"]["mean"] == 100.0
    assert comparison["verdict"].startswith("On these 2 training inputs alone (10 seeds; 95 % intervals), learned is ")
    assert "seconds" not in json.dumps(comparison)
    assert set(json.loads((tmp_path / "s" / "seconds.json").read_text())["runs"]) == {cell.name for cell in planned}
    assert sum(len(table.rows) for table in comparison_tables(comparison)) == 3
    starts.unlink()
    run_cells(planned, tmp_path / "s", program=FAKE)
    assert not starts.exists()  # finished cells are not run again


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from preceptor.comparison.sweep import Cell, run_cells
cells = [Cell(n, {{**{config!r}, "seed": s, "input": "x"}}, ("toy", "--seed", str(s), "--input", "x"))
         for n, s in {names!r}]
run_cells(cells, Path({root!r}), num_jobs=3, program={program!r})
"""


def test_a_sweep_killed_at_random_moments_gives_the_same_comparison(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the sweep alone, whose runs live on, and of everything; then the same bytes as without."""
    planned = cells()
    run_cells(planned, tmp_path / "whole", num_jobs=3, program=FAKE)
    conclude(tmp_path / "whole", [cell.name for cell in planned])
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.05")
    chance, root = random.Random(4), tmp_path / "killed"
    names = [(cell.name, cell.config["seed"]) for cell in planned]
    code = KILLED.format(here=str(Path(__file__).parent), config=CONFIG, names=names, root=str(root), program=FAKE)
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], start_new_session=True)
        time.sleep(chance.uniform(0.3, 1.2))
        kills += process.poll() is None
        children = _children(process.pid)
        process.kill()
        process.wait()
        for child in children if attempt % 2 else []:
            os.kill(child, signal.SIGKILL)
    assert kills >= 4
    run_cells(planned, root, num_jobs=3, program=FAKE)
    conclude(root, [cell.name for cell in planned])
    for name in ("comparison.json", "result.json"):
        assert (root / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_outlived_a_killed_sweep_and_comes_first_is_waited_for(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes its folder after the new sweep has looked there and before that one's own run does."""
    monkeypatch.setenv("FAKE_RUN_OVERTAKEN", "seed1-x")
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.2")
    run_cells(cells(3), tmp_path / "s", num_jobs=1, program=FAKE)
    assert starts.read_text().splitlines().count("seed1-x run") == 1
    conclude(tmp_path / "s", [cell.name for cell in cells(3)])


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_a_cell_that_fails_is_named_and_nothing_more_is_begun(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_RUN_REFUSES", "1")
    with pytest.raises(
        CellFailed, match=r"seed1-x: `seed` is refused; all it said is in .*logs/seed1-x\.log"
    ) as caught:
        run_cells(cells(6), tmp_path / "s", num_jobs=1, program=FAKE)
    assert caught.value.exit_code == 2
    assert len(starts.read_text().splitlines()) == 2
    monkeypatch.delenv("FAKE_RUN_REFUSES")
    run_cells(cells(6), tmp_path / "s", program=FAKE)


def test_a_folder_of_another_configuration_is_refused_before_anything_runs(tmp_path: Path, starts: Path) -> None:
    run_cells(cells(1), tmp_path / "s", program=FAKE)
    other = cells(2, config={**CONFIG, "bonus": 0.0})
    with pytest.raises(ConfigError, match=r"seed0-x was run with another configuration \(bonus 0\.8 → 0\.0\)"):
        run_cells(other, tmp_path / "s", program=FAKE)
    assert len(starts.read_text().splitlines()) == 1


def test_runs_whose_configurations_differ_are_arms_of_their_own(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cells(cells(6), tmp_path / "a", num_jobs=4, program=FAKE)
    monkeypatch.setenv("FAKE_RUN_CONFIG", json.dumps({**CONFIG, "bonus": -0.5}))
    run_cells(cells(6, config={**CONFIG, "bonus": -0.5}), tmp_path / "b", num_jobs=4, program=FAKE)
    runs = [read_finished(path) for path in run_folders([tmp_path / "a", tmp_path / "b"])]
    groups = grouped(runs, inputs=["input"])
    assert [(group.label, len(group.runs)) for group in groups] == [("bonus=0.8", 6), ("bonus=-0.5", 6)]
    merged = merged_result(groups, toy_result)
    comparison = comparison_of(groups, merged)
    (row,) = comparison["comparisons"]
    assert (row["arm"], row["baseline"], row["claimed"]) == ("learned (bonus=0.8)", "learned (bonus=-0.5)", True)
    assert row["mean"] == pytest.approx(1.3)  # the same numbers but for the bonus
    chosen = comparison_of(groups, merged, arms=["learned (bonus=-0.5)", "random"])["comparisons"]
    assert [c["baseline"] for c in chosen] == ["random (bonus=0.8)", "random (bonus=-0.5)"]
    with pytest.raises(ConfigError, match=r"no run has an arm 'randm' \(did you mean 'random'\?\)"):
        comparison_of(groups, merged, arms=["learned", "randm"])


def test_what_cannot_be_compared_is_said(tmp_path: Path, starts: Path) -> None:
    run_cells(cells(2), tmp_path / "s", num_jobs=2, program=FAKE)
    first, second = (read_finished(tmp_path / "s" / f"seed{s}-x") for s in (0, 1))
    with pytest.raises(ConfigError, match=r"seed0-x and .*copy both measured arm 'learned' on item 'x' with seed 0"):
        grouped([first, first._replace(path=tmp_path / "copy")], inputs=["input"])
    with pytest.raises(ConfigError, match="only runs of one system can be compared, got other and toy"):
        grouped([first, second._replace(system="other")], inputs=["input"])
    assert len(merged_records(grouped([first, second], inputs=["input"])[0])) == 6
    (tmp_path / "s" / "seed0-x" / "result.json").write_text("{}")
    with pytest.raises(DataError, match="has no records of arms"):
        read_finished(tmp_path / "s" / "seed0-x")
    (tmp_path / "s" / "seed0-x" / "result.json").unlink()
    with pytest.raises(ConfigError, match="has not ended"):
        read_finished(tmp_path / "s" / "seed0-x")
