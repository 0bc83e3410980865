"""``python -m tools.mutants``: plants each fault of ``faults.yaml`` in a copy and says which ones no test catches.

A fault is one changed line of the sources, with the tests that should see it: those of the same path, mostly, and the
examples of its own docstrings. Each is planted alone, in a copy of the tree, and its tests run until the first one
fails. What has been tried already is in the results file, so that a run that was stopped goes on where it was; delete
the file to begin anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

from tools.mutants.trial import LIBRARIES, run_tests

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults.yaml")
COPIED = ("src", "tests", "benchmarks", "examples", "docs", "tools", "pyproject.toml", "README.md", "CHANGELOG.md")
FORKS = multiprocessing.get_context("forkserver")
USAGE_ERROR = 4
"""Exit code of pytest where a test file is not there, or a ``conftest.py`` cannot be imported."""

OUTCOMES = {0: "survived", 1: "caught", 2: "caught"}
"""By the exit code of pytest; 2 is an error while tests were collected, as of a module that cannot be imported."""


class Fault(NamedTuple):
    """``old``, a text that occurs once in ``file``, becomes ``new``."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return hashlib.sha256("\0".join((self.file, self.old, self.new)).encode()).hexdigest()[:16]

    def planted(self, source: str) -> str | None:
        """``source`` with the fault, or None where the line has changed since and the fault is stale."""
        return source.replace(self.old, self.new) if source.count(self.old) == 1 else None


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """All faults of the list, in its order."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Fault(row["file"], row["old"], row["new"], tuple(row["tests"])) for row in listed]


def try_fault(fault: Fault, copy: Path, *, timeout: float) -> tuple[str, str]:
    """``caught``, ``survived``, ``timeout`` (which counts as caught), ``stale``, or pytest's exit code; and by what."""
    target, failed = copy / fault.file, copy / "failed"
    source = target.read_text(encoding="utf-8")
    planted = fault.planted(source)
    if planted is None:
        return "stale", ""
    failed.unlink(missing_ok=True)
    target.write_text(planted, encoding="utf-8")
    trial = FORKS.Process(target=run_tests, args=(copy, (fault.file, *fault.tests), failed))
    try:
        trial.start()
        trial.join(timeout)
        if trial.exitcode is None:
            return "timeout", ""
    finally:
        if trial.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(trial.pid, signal.SIGKILL)  # with all that its tests have started
        trial.join()
        target.write_text(source, encoding="utf-8")
    by = failed.read_text(encoding="utf-8") if failed.is_file() else ""
    if trial.exitcode == USAGE_ERROR and all((copy / test).exists() for test in fault.tests):
        return "caught", "a conftest that cannot be imported"
    if trial.exitcode in (-signal.SIGTERM, -signal.SIGINT):
        return "caught", "a signal that a test sends to itself"
    outcome = OUTCOMES.get(trial.exitcode)
    if outcome is None or bool(by) != (outcome == "caught"):  # a trial that broke down by itself has caught nothing
        outcome = f"pytest ended with {trial.exitcode}"
    return outcome, by


def copies(number: int, folder: Path) -> Iterator[Path]:
    """``number`` copies of the tree, one for each fault that is tried at a time."""
    for index in range(number):
        copy = folder / f"copy{index}"
        copy.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy2(source, copy / name)
        yield copy


def try_all(faults: Sequence[Fault], results: Path, *, jobs: int, timeout: float) -> None:
    """Adds a line to ``results`` for each of ``faults``, as soon as it has been tried."""
    free: queue.Queue[Path] = queue.Queue()
    writing = threading.Lock()

    def one(fault: Fault) -> None:
        copy = free.get()
        try:
            outcome, by = try_fault(fault, copy, timeout=timeout)
        finally:
            free.put(copy)
        with writing, results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": fault.key, "outcome": outcome, "by": by, **fault._asdict()}) + "\n")
        print(f"{outcome}: {fault.file}: {fault.old}" + (f" ({by})" if by else ""), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        for copy in copies(jobs, Path(folder)):
            free.put(copy)
        list(pool.map(one, faults))


def tried(results: Path) -> dict[str, str]:
    """Outcomes by key; the last one counts."""
    if not results.is_file():
        return {}
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {row["key"]: row["outcome"] for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where at least 95 % of the faults tried are caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="faults in files whose path holds TEXT")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th fault alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults tried at a time")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of the tests of one fault")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.jsonl", metavar="FILE")
    parser.add_argument("--again", action="store_true", help="try those again that survived")
    given = parser.parse_args(argv)

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    FORKS.set_forkserver_preload(list(LIBRARIES))
    chosen = [fault for fault in read_faults() if given.only in fault.file][:: given.every]
    given.results.parent.mkdir(parents=True, exist_ok=True)
    known = tried(given.results)
    kept = {"caught", "timeout"} if given.again else {"caught", "timeout", "survived"}
    try_all(
        [fault for fault in chosen if known.get(fault.key) not in kept],
        given.results,
        jobs=given.jobs,
        timeout=given.timeout,
    )
    outcomes = {fault: tried(given.results)[fault.key] for fault in chosen}
    counted = {fault: outcome for fault, outcome in outcomes.items() if outcome != "stale"}
    caught = sum(outcome in ("caught", "timeout") for outcome in counted.values())
    for fault, outcome in outcomes.items():
        if outcome not in ("caught", "timeout"):
            print(f"\n{outcome}: {fault.file}\n  - {fault.old}\n  + {fault.new}")
    share = caught / len(counted) if counted else 1.0
    print(f"\n{caught} of {len(counted)} faults caught ({100 * share:.1f} %), {len(outcomes) - len(counted)} stale")
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
