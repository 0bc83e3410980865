"""A cell of a sweep: one ``preceptor run`` in a folder of its own, begun or resumed by whoever comes first.

A cell that has its ``result.json`` is not run again; one that was stopped is resumed from its last checkpoint, which
gives the same numbers as if it had run through. So it does not matter which process, machine or scheduler runs a cell,
nor how often it was stopped on the way.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from preceptor.comparison.runs import current_config
from preceptor.errors import ConfigError, LockedError, PreceptorError, StorageError
from preceptor.runs.environment import changes, flattened
from preceptor.runs.files import is_locked, storage_errors
from preceptor.runs.record import plain_config, read_manifest

LOGS = "logs"
"""Folder of a sweep with what each cell said."""

LOCKED = LockedError.exit_code
LOCKED_SECONDS = 2.0
"""For how long a cell that another process holds is left alone."""

STOP_SECONDS = 60.0
"""For how long a cell that was told to stop may take to save."""


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    config: Mapping[str, Any]  # resolved, as plain values
    arguments: tuple[str, ...]  # of `preceptor run`, but for --out


class Resources(NamedTuple):
    """What one cell asks of a scheduler."""

    cpus: float = 1.0
    gpus: float = 0.0  # Ray takes a part of one too
    memory: int = 2 * 2**30  # bytes


class CellFailed(PreceptorError, RuntimeError):
    """A cell ended with an error; ``exit_code`` is the cell's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[CellFailed], tuple[str, int]]:
        return type(self), (str(self), self.exit_code)


class Ended(NamedTuple):
    """A cell that is no longer at work, and how it ended: well, with ``failure``, or to be started ``again``."""

    cell: Cell
    failure: CellFailed | None = None
    again: bool = False  # another process holds it; try later


class Launcher(Protocol):
    """Where cells are run: processes here, tasks of a Ray cluster, jobs of Slurm. It holds no state of the sweep."""

    def has_room(self) -> bool:
        """Whether another cell may be started now."""

    def start(self, cell: Cell) -> None:
        """Begin ``cell``, or resume it where it was begun."""

    def ended(self) -> list[Ended]:
        """The cells that have ended since the last call."""

    def stop(self, cell: Cell, signal_number: int) -> None:
        """Tell ``cell`` to save and end; it is among the ended ones when it has."""

    def close(self) -> None:
        """Give back what the launcher holds; cells that are still at work are told to save and end."""


class Job(NamedTuple):
    """A cell's process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    resumes: bool


def is_finished(folder: Path) -> bool:
    """Whether a run has ended: its result is written last, and in one step."""
    return (folder / "result.json").is_file()


def is_begun(folder: Path) -> bool:
    """Whether a run has been started in ``folder``: its manifest is written first."""
    return (folder / "manifest.json").is_file()


def check_folder(folder: Path, cell: Cell) -> None:
    """Raises :class:`ConfigError` for a folder that holds a run of another configuration than the cell's."""
    if not is_begun(folder):
        return
    wanted = flattened(plain_config(cell.config))
    manifest = read_manifest(folder)
    # Compared key by key in today's names, so that a run made before a key was renamed still counts as the same.
    if differing := changes(flattened(current_config(manifest["system"], manifest["config"])), wanted):
        raise ConfigError(
            f"{folder} was run with another configuration ({', '.join(differing[:3])}); choose another --out"
        )


def run_words(cell: Cell, root: Path) -> list[str]:
    """The words after ``preceptor`` that begin ``cell`` below ``root``."""
    words = ["run", *cell.arguments, "--out", str(root / cell.name)]
    if not any(word.partition("=")[0] == "--group" for word in cell.arguments):
        words.append(f"--group={root.resolve().name}")  # trackers show the seeds together
    return [*words, "--no-report"]


def resume_words(cell: Cell, root: Path) -> list[str]:
    """The words after ``preceptor`` that go on with ``cell``."""
    return ["resume", str(root / cell.name), "--no-report"]


def shell_line(cell: Cell, root: Path, program: Sequence[str] = ("preceptor",)) -> str:
    """One line for any POSIX shell that begins the cell or goes on with it, so that a scheduler may try it again.

    >>> print(shell_line(Cell("seed0", {}, ("bandit", "--seed", "0")), Path("runs/all")))
    if [ -e runs/all/seed0/manifest.json ]; then preceptor resume runs/all/seed0 --no-report; else preceptor run \
bandit --seed 0 --out runs/all/seed0 --group=all --no-report; fi
    """
    manifest = shlex.quote(str(root / cell.name / "manifest.json"))
    resume, run = (shlex.join([*program, *words(cell, root)]) for words in (resume_words, run_words))
    return f"if [ -e {manifest} ]; then {resume}; else {run}; fi"


def start_process(cell: Cell, root: Path, program: Sequence[str], *, cwd: Path | None = None) -> Job:
    """``cell`` as a process of its own that says into ``root/logs``."""
    log = root / LOGS / f"{cell.name}.log"
    resumes = is_begun(root / cell.name)
    words = resume_words(cell, root) if resumes else run_words(cell, root)
    # Appended: a resumed cell's log keeps what was said before it was stopped.
    with storage_errors(f"write {log}"), log.open("ab") as output:
        process = subprocess.Popen(
            [*program, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches the sweep alone, which passes it on once
            cwd=cwd,
        )
    return Job(cell, process, log, resumes)


def how_it_ended(job: Job, root: Path) -> Ended:
    """What became of a cell whose process has ended."""
    folder, code = root / job.cell.name, job.process.returncode
    # The result decides, not the exit code: a run that wrote its result has done its work.
    if is_finished(folder):
        return Ended(job.cell)
    # A process that outlived a killed sweep is at work on it, and ends by itself. It may have come first after a look
    # at the folder; what else fails a fresh run fails its resume as well.
    if code == LOCKED or (not job.resumes and is_begun(folder)):
        return Ended(job.cell, again=True)
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # The program prints its own errors as one line with this prefix; the last such line is the cause.
    said = [line.removeprefix("preceptor: error: ") for line in lines if line.startswith("preceptor: ")]
    # Popen gives a negative code for a signal.
    reason = said[-1] if said else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    message = f"{job.cell.name}: {reason}; all it said is in {job.log}"
    return Ended(job.cell, CellFailed(message, code if code > 0 else 1))


# Runs the words after it, told to save (SIGTERM) when the process that started it dies, so that no cell is left behind
# on a machine whose GPU the scheduler has given to another; SIGUSR2 is Slurm's notice, and its receiver is the parent.
_ATTENDED = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def run_to_end(
    cell: Cell, root: Path, cwd: Path, program: Sequence[str] = (), *, started: Callable[[Job], None] = lambda job: None
) -> None:
    """Runs ``cell`` to its end in a process below this one: the work of a scheduler's task, which may be tried again.

    A cell that another process holds, such as that of an earlier try, is waited for. If this process dies, the cell's
    saves and ends; so it does when an exception (a cancelled task) ends the wait.

    Args:
        cell: what to run.
        root: folder of the sweep, which every machine of the cluster must share.
        cwd: folder that relative paths of the cell are meant from.
        program: what runs the words of a cell; empty is this Python's own Preceptor.
        started: told of every process.

    Raises:
        CellFailed: the cell ended with an error, which the message repeats.
        StorageError: a folder is not there on this machine.
    """
    for folder in (root, cwd):
        if not folder.is_dir():
            where = socket.gethostname()
            raise StorageError(f"{folder} is not there on {where}; launch from a folder that all machines share")
    program = program or (sys.executable, "-m", "preceptor")
    attended = (sys.executable, "-c", _ATTENDED, str(os.getpid()), *program)
    # A result without a free lock is one whose process has a seal to write yet.
    while not is_finished(root / cell.name) or is_locked(root / cell.name):
        if is_locked(root / cell.name):
            time.sleep(LOCKED_SECONDS / 10)
            continue
        job = start_process(cell, root, attended, cwd=cwd)
        started(job)
        try:
            job.process.wait()
        finally:
            if job.process.poll() is None:  # something else ended the wait: a cancelled task, a job that is preempted
                _end(job)
        ended = how_it_ended(job, root)
        if ended.failure is not None:
            raise ended.failure
        if ended.again:
            time.sleep(LOCKED_SECONDS / 10)


def _end(job: Job) -> None:
    """Tell the process of ``job`` to save and end, and wait for it; one that takes too long is killed."""
    with contextlib.suppress(ProcessLookupError):
        job.process.terminate()
    try:
        job.process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()
