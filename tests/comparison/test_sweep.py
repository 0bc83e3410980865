"""Sweeps that are killed, refused, taken up again; the runs are made up (``fake_run.py``), the processes real."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preceptor.comparison import sweep
from preceptor.comparison.cells import Cell, CellFailed, Ended, Job
from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import grouped, merged_records, read_finished, run_folders
from preceptor.comparison.sweep import run_cells
from preceptor.comparison.table import comparison_tables
from preceptor.comparison.write import write_comparison
from preceptor.errors import ConfigError, DataError, Interrupted
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
    planned = cells(6, inputs="uvwxy")
    run_cells(planned, tmp_path / "s", num_jobs=4, program=FAKE, say=said.append)
    manifests = [json.loads((tmp_path / "s" / cell.name / "manifest.json").read_text()) for cell in planned]
    assert {manifest["group"] for manifest in manifests} == {"s"}
    assert sorted(starts.read_text().splitlines()) == sorted(f"{cell.name} run" for cell in planned)
    assert said[0] == "0 of 30 runs are finished"
    assert said[-1].endswith("(30 of 30)")
    comparison = conclude(tmp_path / "s", [cell.name for cell in planned])
    assert [(c["baseline"], c["n"], c["claimed"]) for c in comparison["comparisons"]] == [
        ("random", 30, True),
        ("untrained", 30, True),
    ]
    assert comparison["arms"]["train"]["learned"]["tokens"]["mean"] == 100.0
    assert comparison["verdict"].startswith("Learned beats random by 0.")
    assert " On 5 training inputs (6 seeds; 95 % intervals), learned is " in comparison["verdict"]
    assert "seconds" not in json.dumps(comparison)
    assert set(json.loads((tmp_path / "s" / "seconds.json").read_text())["runs"]) == {cell.name for cell in planned}
    tables = list(comparison_tables(comparison))
    assert sum(len(table.rows) for table in tables) == 3
    printed = io.StringIO()
    Console(width=80, file=printed).print(*tables)
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed.getvalue()  # nothing is cut
    # Every run adds its seed to the reward, and the curves of the seeds 0 to 5 are one with a band.
    (reward,) = json.loads((tmp_path / "s" / "result.json").read_text())["charts"]
    assert (reward["x"], reward["lines"]) == ([1, 2, 3, 4], {"reward": [3.5, 4.5, 5.5, 6.5]})
    assert reward["bands"] == {"reward": [[1, 2, 3, 4], [6, 7, 8, 9]]}
    starts.unlink()
    run_cells(planned, tmp_path / "s", program=FAKE)
    assert not starts.exists()  # finished cells are not run again


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from preceptor.comparison.cells import Cell
from preceptor.comparison.sweep import run_cells
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


class Busy:
    """A launcher without room for a second cell, whose first start of each finds it held by another process."""

    def __init__(self) -> None:
        self.started: list[Cell] = []
        self._at_work: list[Cell] = []

    def has_room(self) -> bool:
        return not self._at_work

    def start(self, cell: Cell) -> None:
        self.started.append(cell)
        self._at_work.append(cell)

    def ended(self) -> list[Ended]:
        ended, self._at_work = self._at_work, []
        return [Ended(cell, again=self.started.count(cell) == 1) for cell in ended]

    def stop(self, cell: Cell, signal_number: int) -> None:
        raise AssertionError("nobody stops it")

    def close(self) -> None:
        raise AssertionError("it is the caller's")


def test_a_cell_that_another_process_held_is_begun_again_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_LOCKED_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.001)
    launcher, planned, done = Busy(), cells(3), list[str]()
    waiting = iter(planned)
    sweep.carry_out(launcher, lambda: next(waiting, None), lambda cell, _: done.append(cell.name))
    assert launcher.started == [*planned, *planned]
    assert done == [cell.name for cell in planned]


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At each start, how many runs are at work then, that one included; the others have done a step by then."""
    started: list[Job] = []
    counts: list[int] = []
    start = sweep._start

    def counting(cell: Cell, root: Path, program: Sequence[str]) -> Job:
        earlier = [job for job in started if job.process.poll() is None]
        assert all((root / job.cell.name / "metrics.jsonl").exists() for job in earlier)
        started.append(start(cell, root, program))
        counts.append(len(earlier) + 1)
        return started[-1]

    monkeypatch.setattr(sweep, "_start", counting)
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.1")
    return counts


@pytest.mark.parametrize(("num_jobs", "num_cores", "most"), [(1, 8, 1), (2, 8, 2), (None, 2, 2), (None, None, 1)])
def test_no_more_run_at_once_than_allowed(
    num_jobs: int | None,
    num_cores: int | None,
    most: int,
    tmp_path: Path,
    starts: Path,
    at_work: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: num_cores)
    run_cells(cells(3), tmp_path / "s", num_jobs=num_jobs, program=FAKE)
    assert len(at_work) == 3
    assert max(at_work) == most


@pytest.mark.parametrize(("available", "most"), [(125, 1), (126, 2)])
def test_another_starts_only_while_memory_holds_one_more_of_the_largest(
    available: int, most: int, tmp_path: Path, starts: Path, at_work: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has taken 100 bytes, and a quarter is added."""
    monkeypatch.setattr(sweep, "_peak_bytes", lambda _: 100)
    monkeypatch.setattr(sweep, "_available_bytes", lambda: available)
    run_cells(cells(3), tmp_path / "s", num_jobs=2, program=FAKE)
    assert max(at_work) == most


@pytest.mark.skipif(sys.platform != "linux", reason="is about Linux's accounting")
def test_memory_is_counted_in_bytes() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert sweep._peak_bytes(os.getpid()) == pytest.approx(peak, rel=0.02)
    assert sweep._peak_bytes(2**22 + 1) == 0  # no process has this number
    page = os.sysconf("SC_PAGE_SIZE")
    free, whole = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    assert free / 2 < sweep._available_bytes() < whole  # what is free moves while it is looked at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_handlers_are_put_back(
    number: signal.Signals, tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the first run is at work, which ends by it; no other begins."""
    jobs: list[Job] = []
    start = sweep._start

    def starting(*arguments: Any) -> Job:
        jobs.append(start(*arguments))
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        return jobs[-1]

    monkeypatch.setattr(sweep, "_start", starting)
    monkeypatch.setenv("FAKE_RUN_SECONDS", "1")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_cells(cells(3), tmp_path / "s", num_jobs=1, program=FAKE)
    assert [job.process.returncode for job in jobs] == [-number]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


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


def test_a_failure_lets_the_others_end_and_begins_none(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two at work fails at once; the first goes on to its end, the third is not begun."""
    monkeypatch.setenv("FAKE_RUN_REFUSES", "1")
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.3")
    with pytest.raises(CellFailed, match="seed1-x"):
        run_cells(cells(4), tmp_path / "s", num_jobs=2, program=FAKE)
    assert starts.read_text().splitlines() == ["seed0-x run", "seed1-x run"]
    assert (tmp_path / "s" / "seed0-x" / "result.json").exists()


def test_a_run_that_another_process_is_at_work_on_is_waited_for(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed sweep left it; it cannot be resumed before it ends, and that is no failure."""
    monkeypatch.setattr(sweep, "_LOCKED_SECONDS", 0.4)
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.2")
    folder = tmp_path / "s" / "seed0-x"
    words = [*FAKE, "run", *cells(1)[0].arguments, "--out", str(folder)]
    with subprocess.Popen(words) as left:
        while not (folder / "manifest.json").exists():
            time.sleep(0.01)
        run_cells(cells(1), tmp_path / "s", program=FAKE)
    assert left.returncode == 0
    assert starts.read_text().splitlines()[0] == "seed0-x run"


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

    # Both sweeps have folders of the same names; the page's curves are told apart by configuration all the same.
    (tmp_path / "b" / "seed5-x" / "metrics.jsonl").write_text('{"step": 1, "reward": 100.0}\n')
    write_comparison(tmp_path / "c", comparison, merged, runs)
    (reward,) = json.loads((tmp_path / "c" / "result.json").read_text())["charts"]
    assert reward["bands"]["reward (bonus=0.8)"][1][0] == 6.0
    assert reward["bands"]["reward (bonus=-0.5)"][1][0] == 100.0


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
