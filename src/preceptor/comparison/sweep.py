"""Runs the cells of a sweep, several at once, each as a ``preceptor run`` of its own in its own folder.

A cell that has its ``result.json`` is not run again; one that was stopped is resumed from its last checkpoint, which
gives the same numbers as if it had run through. So a sweep that was killed at any moment is started again with the same
words and ends with the same results.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.comparison.runs import current_config
from preceptor.errors import ConfigError, Interrupted, LockedError, PreceptorError
from preceptor.runs.environment import changes, flattened
from preceptor.runs.files import storage_errors
from preceptor.runs.record import plain_config, read_manifest

LOGS = "logs"
"""Folder of a sweep with what each cell said."""

_LOCKED = LockedError.exit_code
# Often enough that a free core is used at once, seldom enough to cost nothing.
_POLL_SECONDS = 0.2
# For how long a cell that another process holds is left alone.
_LOCKED_SECONDS = 2.0
# Room for cells that have not reached their own peak yet.
_MEMORY_MARGIN = 1.25


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    config: Mapping[str, Any]  # resolved, as plain values
    arguments: tuple[str, ...]  # of `preceptor run`, but for --out


class CellFailed(PreceptorError, RuntimeError):
    """A cell ended with an error; ``exit_code`` is the cell's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    resumes: bool


def run_cells(
    cells: Sequence[Cell],
    root: Path,
    *,
    num_jobs: int | None = None,
    program: Sequence[str] = (sys.executable, "-m", "preceptor"),
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run what is missing of ``cells`` below ``root``, at most ``num_jobs`` at a time (None: one for each core).

    However many are allowed, another cell starts only while the memory that is free holds one more of the largest seen
    so far. The first failure stops the sweep once the cells at work have ended; Ctrl-C and SIGTERM are passed on to
    them, and they save.

    Raises:
        ConfigError: a cell's folder holds a run of another configuration.
        CellFailed: a cell ended with an error, which the message repeats.
        Interrupted: after the cells at work have saved.
    """
    # All of them before any is started: a mistake in the last cell should not cost the time of the others.
    for cell in cells:
        _check(root / cell.name, cell)
    waiting = [cell for cell in cells if not is_finished(root / cell.name)]
    say(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished")
    with storage_errors(f"create {root / LOGS}"):
        (root / LOGS).mkdir(parents=True, exist_ok=True)
    limit = num_jobs or os.cpu_count() or 1
    # The state of the sweep is on disk alone; these lists are only what this process has started.
    running: list[_Running] = []
    failure: CellFailed | None = None
    locked_until: dict[str, float] = {}
    peak = 0
    with _stop_signals() as stop:
        while running or (waiting and failure is None and not stop):
            # The peak outlives its process: cells are alike, so the largest so far predicts the next.
            peak = max([peak, *(_peak_bytes(job.process.pid) for job in running)])
            ready = [cell for cell in waiting if locked_until.get(cell.name, 0.0) <= time.monotonic()]
            # The newest cell must have done a step before its memory says anything; until then no other is started.
            settled = not running or _has_stepped(root / running[-1].cell.name)
            fits = not running or (settled and peak * _MEMORY_MARGIN < _available_bytes())
            # One start a round, so that every new cell is counted in the memory before the next.
            if ready and failure is None and not stop and len(running) < limit and fits:
                waiting.remove(ready[0])
                running.append(_start(ready[0], root, program))
                continue
            time.sleep(_POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                code = job.process.returncode
                # The result decides, not the exit code: a run that wrote its result has done its work.
                if is_finished(root / job.cell.name):
                    done = len(cells) - len(waiting) - len(running)
                    say(f"{job.cell.name} is finished ({done} of {len(cells)})")
                elif code == _LOCKED or (not job.resumes and _is_begun(root / job.cell.name)):
                    # A process that outlived a killed sweep is at work on it, and ends by itself. It may have come
                    # first after a look at the folder; what else fails a fresh run fails its resume as well.
                    locked_until[job.cell.name] = time.monotonic() + _LOCKED_SECONDS
                    waiting.append(job.cell)
                # The first failure is the one reported; those after it are often its consequence.
                elif not stop:
                    failure = failure or _failure(job)
            if stop:
                # Cells run in sessions of their own, so the signal reaches them only through here, exactly once.
                for job in running:
                    with contextlib.suppress(ProcessLookupError):
                        job.process.send_signal(stop[0])
                _wait_all(running)
                break
    if stop:
        raise Interrupted("stopped; what was saved is kept, and the same command goes on", stop[0])
    if failure is not None:
        raise failure


def is_finished(folder: Path) -> bool:
    """Whether a run has ended: its result is written last, and in one step."""
    return (folder / "result.json").is_file()


def _is_begun(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _check(folder: Path, cell: Cell) -> None:
    if not _is_begun(folder):
        return
    wanted = flattened(plain_config(cell.config))
    manifest = read_manifest(folder)
    # Compared key by key in today's names, so that a run made before a key was renamed still counts as the same.
    if differing := changes(flattened(current_config(manifest["system"], manifest["config"])), wanted):
        raise ConfigError(
            f"{folder} was run with another configuration ({', '.join(differing[:3])}); choose another --out"
        )


def _start(cell: Cell, root: Path, program: Sequence[str]) -> _Running:
    folder, log = root / cell.name, root / LOGS / f"{cell.name}.log"
    resumes = _is_begun(folder)
    words = ["resume", str(folder)] if resumes else ["run", *cell.arguments, "--out", str(folder)]
    if not resumes and not any(word.partition("=")[0] == "--group" for word in cell.arguments):
        words.append(f"--group={root.resolve().name}")  # trackers show the seeds together
    # Appended: a resumed cell's log keeps what was said before it was stopped.
    with storage_errors(f"write {log}"), log.open("ab") as output:
        process = subprocess.Popen(
            [*program, *words, "--no-report"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches the sweep alone, which passes it on once
        )
    return _Running(cell, process, log, resumes)


def _failure(job: _Running) -> CellFailed:
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # The program prints its own errors as one line with this prefix; the last such line is the cause.
    said = [line.removeprefix("preceptor: error: ") for line in lines if line.startswith("preceptor: ")]
    code = job.process.returncode
    reason = said[-1] if said else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    # Popen gives a negative code for a signal.
    return CellFailed(f"{job.cell.name}: {reason}; all it said is in {job.log}", code if code > 0 else 1)


def _has_stepped(folder: Path) -> bool:
    """Whether a run has done its first step, so that its memory says something of what a run needs."""
    metrics = folder / "metrics.jsonl"
    return is_finished(folder) or (metrics.is_file() and metrics.stat().st_size > 0)


def _wait_all(running: Sequence[_Running]) -> None:
    for job in running:
        job.process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals to stop that have come, Ctrl-C or SIGTERM; while the block runs they do nothing else."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: came.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far, or 0 where the system does not say."""
    return _kibibytes(Path(f"/proc/{pid}/status"), "VmHWM:")


def _available_bytes() -> int:
    """Memory that a new process can have without others being swapped out; without limit where it is not known."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable:") or sys.maxsize


def _kibibytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0  # the process has just ended, or this is no Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
