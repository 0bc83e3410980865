"""Launchers give the same comparison: Ray whose workers are killed, Slurm's jobs as processes, GPUs in turn.

The runs are made up (``fake_run.py``), which takes the place of ``preceptor``; the processes and their deaths are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.comparison import sweep
from preceptor.comparison.cells import Cell, CellFailed, Job, Resources, run_to_end, run_words, shell_line
from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import grouped, read_finished
from preceptor.comparison.sweep import Local, missing, run_cells
from preceptor.comparison.write import write_comparison
from preceptor.errors import ConfigError, Interrupted, StorageError
from preceptor.evaluation.summary import compare, summarise

CONFIG = {"bonus": 0.8, "data": {"words": 3}}
FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))
SMALL = Resources(cpus=1, gpus=0, memory=100 * 2**20)


@pytest.fixture(autouse=True)
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where every start of a run is noted."""
    monkeypatch.setenv("FAKE_RUN_CONFIG", json.dumps(CONFIG))
    monkeypatch.setenv("FAKE_RUN_STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


def cells(num: int) -> list[Cell]:
    return [
        Cell(f"seed{s}-x", {**CONFIG, "seed": s, "input": "x"}, ("toy", "--seed", str(s), "--input", "x"))
        for s in range(num)
    ]


def toy_result(records: Any, *, config: Any, seeds: Any) -> dict[str, Any]:
    comparisons = [compare(records, metric="score", arm="learned", baseline="random", unit="points")]
    return {
        **{"system": "toy", "status": "finished", "config": config, "seeds": list(seeds), "table": ["score"]},
        "arms": summarise(records, units={"score": "points", "tokens": "tokens"}),
        **{"comparisons": comparisons, "records": list(records)},
    }


def concluded(root: Path, num: int) -> bytes:
    """The bytes of ``comparison.json``."""
    runs = [read_finished(root / cell.name) for cell in cells(num)]
    groups = grouped(runs, inputs=["input"])
    merged = merged_result(groups, toy_result)
    write_comparison(root, comparison_of(groups, merged, noun="input"), merged, runs)
    return (root / "comparison.json").read_bytes()


def locally(root: Path, num: int) -> bytes:
    run_cells(cells(num), root, num_jobs=4, program=FAKE)
    return concluded(root, num)


# ---- Ray ----


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two machines with two CPUs each beside the driver's, which has none, so that both can be lost."""
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # Its workers are started by the cluster's own processes, with the environment of this moment.
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.15")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    machines = [made.add_node(num_cpus=2, memory=2**30) for _ in range(2)]
    ray.init(made.address, log_to_driver=False, logging_level="error")
    try:
        yield made, machines
    finally:
        ray.shutdown()
        made.shutdown()


class Killer(threading.Thread):
    """Kills processes of Ray that are at work on a cell, at random moments; ``num_killed`` counts them."""

    def __init__(self, root: Path, *, seed: int, most: int) -> None:
        super().__init__(daemon=True)
        self._most = most
        self._root, self._chance, self._over = root, random.Random(seed), threading.Event()
        self.num_killed = 0

    def run(self) -> None:
        while self.num_killed < self._most and not self._over.wait(self._chance.uniform(0.2, 0.8)):
            if workers := workers_of(self._root):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._chance.choice(workers), signal.SIGKILL)
                    self.num_killed += 1

    def stop(self) -> None:
        self._over.set()
        self.join()


def under_fire(root: Path, num: int, *, seed: int, most: int) -> int:
    """Runs the cells on Ray while its workers are killed; how many were."""
    from preceptor.comparison.ray_launcher import RayLauncher

    killer = Killer(root, seed=seed, most=most)
    killer.start()
    launcher = RayLauncher(root, SMALL, program=FAKE)
    try:
        run_cells(cells(num), root, launcher=launcher)
    finally:
        killer.stop()
        launcher.close()
    return killer.num_killed


def test_ray_gives_the_local_comparison_though_its_workers_are_killed(
    tmp_path: Path, starts: Path, cluster: Any
) -> None:
    expected = locally(tmp_path / "s", 4)
    begun = len(starts.read_text().splitlines())
    (tmp_path / "ray").mkdir()
    num_killed = under_fire(tmp_path / "ray" / "s", 4, seed=1, most=3)
    assert num_killed >= 2
    assert len(starts.read_text().splitlines()) - begun > 4  # some were begun again
    assert concluded(tmp_path / "ray" / "s", 4) == expected


@pytest.mark.slow
def test_ten_sweeps_of_twenty_cells_under_fire_give_the_same_bytes(tmp_path: Path, starts: Path, cluster: Any) -> None:
    """Workers are killed throughout, and in every second trial a whole machine is lost and another one joins."""
    made, machines = cluster
    expected = locally(tmp_path / "s", 20)
    killed = 0
    for trial in range(10):
        root = tmp_path / f"trial{trial}" / "s"
        root.parent.mkdir()
        loss = threading.Timer(1.5, lambda: made.remove_node(machines.pop(), allow_graceful=False))
        if trial % 2:
            loss.start()
        killed += under_fire(root, 20, seed=trial, most=12)
        if trial % 2:
            loss.join()
            machines.append(made.add_node(num_cpus=2, memory=2**30))
        assert concluded(root, 20) == expected, f"trial {trial}"
    assert killed >= 20


def test_a_cell_that_fails_on_ray_is_named_with_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of this machine's own; what asks for more than it has is refused."""
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from preceptor.comparison.ray_launcher import RayLauncher

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("FAKE_RUN_REFUSES", "1")
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 1 CPUs, 9 GPUs .*lower --cpus"):
        RayLauncher(tmp_path / "s", Resources(gpus=9))
    launcher = RayLauncher(tmp_path / "s", SMALL, program=FAKE, num_jobs=1)
    try:
        with pytest.raises(CellFailed, match=r"seed1-x: `seed` is refused; all it said is in .*seed1-x\.log") as caught:
            run_cells(cells(4), tmp_path / "s", launcher=launcher)
    finally:
        launcher.close()
    assert caught.value.exit_code == 2
    assert not (tmp_path / "s" / "seed2-x").exists()
    with pytest.raises(ConfigError, match=r"--address 127\.0\.0\.1:1: no Ray cluster there .*ray start --head"):
        RayLauncher(tmp_path / "s", SMALL, address="127.0.0.1:1")


def test_stopping_a_sweep_on_ray_tells_its_runs_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from preceptor.comparison.ray_launcher import RayLauncher

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("FAKE_RUN_SECONDS", "3")
    launcher = RayLauncher(tmp_path / "s", SMALL, program=FAKE)
    threading.Thread(target=_signal_when, args=(tmp_path / "s" / "seed0-x" / "manifest.json",), daemon=True).start()
    try:
        with pytest.raises(Interrupted, match="the same command goes on"):
            run_cells(cells(1), tmp_path / "s", launcher=launcher)
    finally:
        launcher.close()
    assert not processes_of(tmp_path / "s")


def _signal_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def processes_of(root: Path) -> list[int]:
    """Runs below ``root`` that are at work."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if FAKE[1].encode() in words and any(os.fsencode(root) in word for word in words):
                found.append(int(process.name))
    return found


def workers_of(root: Path) -> list[int]:
    """The parents of the runs below ``root`` that are at work: processes of Ray or of submitit."""
    found = set()
    for number in processes_of(root):
        with contextlib.suppress(OSError):
            found.add(int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1]))
    return sorted(found - {1, os.getpid()})


# ---- what every scheduler's task does ----


ATTENDED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from preceptor.comparison.cells import run_to_end
from test_launchers import FAKE, cells
run_to_end(cells(1)[0], Path({root!r}), Path({root!r}), FAKE)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a run may outlive its worker, and its lock is waited for"
)
def test_a_run_whose_worker_dies_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To catch: a run left behind on a GPU that the scheduler has given to another."""
    monkeypatch.setenv("FAKE_RUN_SECONDS", "30")
    missing(cells(1), tmp_path)
    code = ATTENDED.format(here=str(Path(__file__).parent), root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        while not (tmp_path / "seed0-x" / "manifest.json").exists():
            time.sleep(0.05)
        assert len(processes_of(tmp_path)) == 1
        worker.kill()
    for _ in range(100):
        if not processes_of(tmp_path):
            break
        time.sleep(0.05)
    assert not processes_of(tmp_path)


def test_a_task_waits_for_the_run_that_an_earlier_try_left(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one is at work on the cell, so that the task neither fails nor runs it twice."""
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.3")
    (cell,) = missing(cells(1), tmp_path)
    with subprocess.Popen([*FAKE, *run_words(cell, tmp_path)]) as left:
        while not (tmp_path / cell.name / "manifest.json").exists():
            time.sleep(0.02)
        run_to_end(cell, tmp_path, tmp_path, FAKE)
    assert left.returncode == 0
    assert starts.read_text().splitlines() == ["seed0-x run"]


def test_a_wait_that_is_broken_off_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled task must not leave its run behind, which would go on beside the next try's."""
    monkeypatch.setenv("FAKE_RUN_SECONDS", "30")
    (cell,) = missing(cells(1), tmp_path)
    jobs: list[Job] = []

    class Cancelled(Exception):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGALRM, cancel)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(Cancelled):
            run_to_end(cell, tmp_path, tmp_path, FAKE, started=jobs.append)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (job,) = jobs
    assert job.process.poll() is not None


def test_a_folder_that_a_machine_does_not_share_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s is not there on .*; launch from a folder that all machines share"):
        run_to_end(cells(1)[0], tmp_path / "s", tmp_path, FAKE)


# ---- Slurm ----


def slurm(root: Path, **settings: Any) -> Any:
    pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")
    from preceptor.comparison.slurm_launcher import SlurmLauncher

    return SlurmLauncher(root, SMALL, program=FAKE, settings={"cluster": "local", **settings})


def test_jobs_of_slurm_give_the_local_comparison(tmp_path: Path, starts: Path) -> None:
    expected = locally(tmp_path / "s", 3)
    starts.unlink()
    (tmp_path / "slurm").mkdir()
    run_cells(cells(3), tmp_path / "slurm" / "s", launcher=slurm(tmp_path / "slurm" / "s", partition="gpu", time=5))
    assert sorted(starts.read_text().splitlines()) == [f"seed{s}-x run" for s in range(3)]
    assert concluded(tmp_path / "slurm" / "s", 3) == expected


def test_a_job_that_is_preempted_saves_and_goes_on(
    tmp_path: Path, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's notice of a preemption: the run is told to end, the job is queued again and resumes it."""
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.5")
    launcher = slurm(tmp_path / "s")
    (cell,) = missing(cells(1), tmp_path / "s")
    launcher.start(cell)
    while not (tmp_path / "s" / cell.name / "metrics.jsonl").exists():
        time.sleep(0.05)
    (worker,) = workers_of(tmp_path / "s")
    os.kill(worker, signal.SIGUSR2)
    ended: list[Any] = []
    while not ended:
        time.sleep(0.1)
        ended = launcher.ended()
    assert ended[0].failure is None
    assert not ended[0].again
    assert starts.read_text().splitlines() == ["seed0-x run", "seed0-x resume"]


def test_a_job_that_fails_is_named_and_one_that_is_stopped_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_RUN_REFUSES", "0")
    with pytest.raises(CellFailed, match="seed0-x: `seed` is refused") as caught:
        run_cells(cells(1), tmp_path / "s", launcher=slurm(tmp_path / "s"))
    assert caught.value.exit_code == 2
    monkeypatch.delenv("FAKE_RUN_REFUSES")
    monkeypatch.setenv("FAKE_RUN_SECONDS", "30")
    threading.Thread(target=_signal_when, args=(tmp_path / "t" / "seed0-x" / "manifest.json",), daemon=True).start()
    with pytest.raises(Interrupted):
        run_cells(cells(1), tmp_path / "t", launcher=slurm(tmp_path / "t"))
    for _ in range(100):
        if not processes_of(tmp_path / "t"):
            break
        time.sleep(0.05)
    assert not processes_of(tmp_path / "t")


def test_settings_of_slurm_are_checked_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for settings, said in (
        ({"partion": "gpu"}, r"no setting 'partion' \(did you mean 'partition'\?\)"),
        ({"time": "2h"}, "whole number of minutes, got '2h'"),
        ({"cluster": "pbs"}, "must be slurm or local, got 'pbs'"),
        ({"mem": "3G"}, "no setting 'mem'"),
    ):
        with pytest.raises(ConfigError, match=said):
            slurm(tmp_path / "s", **settings)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch on this machine; .*--print"):
        slurm(tmp_path / "s", cluster="slurm")
    assert not (tmp_path / "s").exists()


# ---- this machine's GPUs ----


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """At each start, the GPU that the run sees, and those of the runs at work."""
    jobs: list[tuple[Job, str]] = []
    found: list[tuple[str, list[str]]] = []
    start = sweep._start

    def starting(cell: Cell, root: Path, program: Sequence[str]) -> Job:
        at_work = [gpu for job, gpu in jobs if job.process.poll() is None]
        job = start(cell, root, program)
        environment = _environment(job.process.pid)
        jobs.append((job, environment["CUDA_VISIBLE_DEVICES"]))
        found.append((jobs[-1][1], at_work))
        return job

    monkeypatch.setattr(sweep, "_start", starting)
    monkeypatch.setenv("FAKE_RUN_SECONDS", "0.2")
    return found


def _environment(pid: int) -> dict[str, str]:
    """Of the run itself, whose ``env`` has given way to it."""
    while FAKE[1] not in (command := Path(f"/proc/{pid}/cmdline").read_text().split("\0")) or command[0] == "env":
        time.sleep(0.005)
    return dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_gpus_are_handed_out_in_turn_and_each_has_one_run(tmp_path: Path, seen: list[tuple[str, list[str]]]) -> None:
    run_cells(cells(6), tmp_path, launcher=Local(tmp_path, num_jobs=3, program=FAKE, gpus=("3", "GPU-b", "5")))
    assert [gpu for gpu, _ in seen[:3]] == ["3", "GPU-b", "5"]
    assert len(seen) == 6
    assert all(gpu not in at_work for gpu, at_work in seen)  # never two on one


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("free", "shared"), [(1224, False), (1226, True)])
def test_two_runs_share_a_gpu_only_while_its_memory_holds_another(
    free: int, shared: bool, tmp_path: Path, seen: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has taken 500 MiB of tensors; a quarter and 600 MiB for CUDA itself are added: 1,225 MiB."""
    monkeypatch.setenv("FAKE_RUN_GPU_MIB", "500")
    monkeypatch.setattr(sweep, "_free_gpu_bytes", lambda gpu: free * 2**20)
    run_cells(cells(3), tmp_path, launcher=Local(tmp_path, num_jobs=2, program=FAKE, gpus=("0",)))
    assert any(gpu in at_work for gpu, at_work in seen) == shared


def test_without_a_number_there_are_as_many_runs_as_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 8)
    assert [Local(Path(), gpus=gpus)._limit for gpus in ((), ("0",), tuple("0123456789"))] == [8, 1, 8]


# ---- any other scheduler ----


def test_printed_lines_begin_a_cell_or_go_on_with_it(tmp_path: Path, starts: Path) -> None:
    expected = locally(tmp_path / "s", 2)
    starts.unlink()
    root = tmp_path / "by hand" / "s"
    planned = missing(cells(2), root)
    killed = subprocess.Popen(["sh", "-c", shell_line(planned[0], root, FAKE)], start_new_session=True)
    while not (root / planned[0].name / "manifest.json").exists():
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for cell in planned:
        subprocess.run(["sh", "-c", shell_line(cell, root, FAKE)], check=True)
    assert starts.read_text().splitlines() == ["seed0-x run", "seed0-x resume", "seed1-x run"]
    assert concluded(root, 2) == expected


def test_a_failure_keeps_its_code_on_the_way_through_a_scheduler() -> None:
    failure = CellFailed("seed0: refused", 3)
    kind, arguments = failure.__reduce__()
    assert (str(kind(*arguments)), kind(*arguments).exit_code) == ("seed0: refused", 3)
