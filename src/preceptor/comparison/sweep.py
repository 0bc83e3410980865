"""Runs the cells of a sweep, several at once, each as a ``preceptor run`` of its own in its own folder.

The state of a sweep is on the disk alone. So one that was killed at any moment is started again with the same words and
ends with the same results, also with another launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from preceptor.comparison.cells import (
    LOCKED_SECONDS,
    LOGS,
    Cell,
    CellFailed,
    Ended,
    Job,
    Launcher,
    check_folder,
    how_it_ended,
    is_finished,
    start_process,
)
from preceptor.errors import Interrupted
from preceptor.runs.files import storage_errors
from preceptor.runs.metrics import read_jsonl

# Often enough that a free core is used at once, seldom enough to cost nothing.
_POLL_SECONDS = 0.2
_LOCKED_SECONDS = LOCKED_SECONDS
# Room for cells that have not reached their own peak yet.
_MEMORY_MARGIN = 1.25
# What a process holds of a GPU besides its tensors: CUDA's context and kernels.
_GPU_CONTEXT_BYTES = 600 * 2**20

PROGRAM = (sys.executable, "-m", "preceptor")


def run_cells(
    cells: Sequence[Cell],
    root: Path,
    *,
    num_jobs: int | None = None,
    program: Sequence[str] = PROGRAM,
    say: Callable[[str], None] = lambda text: None,
    launcher: Launcher | None = None,
) -> None:
    """Run what is missing of ``cells`` below ``root`` with ``launcher`` (None: :class:`Local` with ``num_jobs``).

    The first failure stops the sweep once the cells at work have ended; Ctrl-C and SIGTERM are passed on to them, and
    they save.

    Raises:
        ConfigError: a cell's folder holds a run of another configuration.
        CellFailed: a cell ended with an error, which the message repeats.
        Interrupted: after the cells at work have saved.
    """
    waiting = missing(cells, root)
    say(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished")
    launcher = launcher or Local(root, num_jobs=num_jobs, program=program)
    num_done = len(cells) - len(waiting)

    def take() -> Cell | None:
        return waiting.pop(0) if waiting else None

    def ended(cell: Cell, failure: CellFailed | None) -> None:
        nonlocal num_done
        if failure is not None:
            raise failure
        num_done += 1
        say(f"{cell.name} is finished ({num_done} of {len(cells)})")

    carry_out(launcher, take, ended)


def missing(cells: Sequence[Cell], root: Path) -> list[Cell]:
    """The cells that are not finished below ``root``, where the folder for what they say is made.

    Raises :class:`ConfigError` for a folder that holds a run of another configuration.
    """
    # All of them before any is started: a mistake in the last cell should not cost the time of the others.
    for cell in cells:
        check_folder(root / cell.name, cell)
    with storage_errors(f"create {root / LOGS}"):
        (root / LOGS).mkdir(parents=True, exist_ok=True)
    return [cell for cell in cells if not is_finished(root / cell.name)]


def carry_out(
    launcher: Launcher,
    take: Callable[[], Cell | None],
    ended: Callable[[Cell, CellFailed | None], None],
    *,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Start the cells that ``take`` gives, while the launcher has room, until it gives none and all have ended.

    Args:
        launcher: where they run.
        take: the next cell, None when there is none.
        ended: told how each cell ended. What it raises stops the sweep once the cells at work have ended.
        look: called several times a second, to watch the cells at work.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the cells at work have saved.
    """
    # These lists are only what this process has started.
    at_work: list[Cell] = []
    again: list[tuple[float, Cell]] = []  # when another process may have left it, and the cell
    failure: Exception | None = None
    with _stop_signals() as stop:
        while not stop:
            if failure is None and launcher.has_room():
                cell = take()
                if cell is None and again and again[0][0] <= time.monotonic():
                    cell = again.pop(0)[1]
                # One start a round, so that every new cell is counted before the next.
                if cell is not None:
                    at_work.append(cell)
                    launcher.start(cell)
                    continue
            if not at_work and (failure is not None or not again):
                break
            time.sleep(_POLL_SECONDS)
            for one in launcher.ended():
                at_work.remove(one.cell)
                if one.again:
                    again.append((time.monotonic() + _LOCKED_SECONDS, one.cell))
                    continue
                # Stopped cells fail by the signal, which is no fault of theirs.
                if stop:
                    continue
                try:
                    ended(one.cell, one.failure)
                except Exception as error:  # noqa: BLE001 - raised below, when the cells at work have ended
                    # The first failure is the one reported; those after it are often its consequence.
                    failure = failure or error
            if not stop:
                look()
        # Cells run in sessions of their own, so the signal reaches them only through here, exactly once.
        for cell in at_work:
            launcher.stop(cell, stop[0])
        while at_work:
            time.sleep(_POLL_SECONDS)
            for one in launcher.ended():
                at_work.remove(one.cell)
    if stop:
        raise Interrupted("stopped; what was saved is kept, and the same command goes on", stop[0])
    if failure is not None:
        raise failure


class Local:
    """Processes of this machine, at most ``num_jobs`` at a time (None: one for each core, or for each GPU).

    However many are allowed, another cell starts only while the memory that is free holds one more of the largest seen
    so far. ``gpus`` are the ids of GPUs as ``CUDA_VISIBLE_DEVICES`` names them: each cell sees one of them, the one
    with the fewest cells, in turn. Two share a GPU only where ``num_jobs`` is above the number of GPUs, and its free
    memory holds one more of the largest cell.
    """

    def __init__(
        self,
        root: Path,
        *,
        num_jobs: int | None = None,
        program: Sequence[str] = PROGRAM,
        gpus: Sequence[str] = (),
    ) -> None:
        cores = os.cpu_count() or 1
        self._root, self._program, self._gpus = root, program, tuple(gpus)
        self._limit = num_jobs or (min(cores, len(gpus)) if gpus else cores)
        self._running: list[Job] = []
        self._gpu_of: dict[str, str] = {}  # by name of the cell
        self._peak = self._gpu_peak = 0  # bytes; they outlive the process: cells are alike, and the next is predicted
        self._turn = 0
        self._stopped: set[str] = set()

    def has_room(self) -> bool:
        if not self._running:
            return True
        self._peak = max([self._peak, *(_peak_bytes(job.process.pid) for job in self._running)])
        # The newest cell must have done a step before its memory says anything; until then no other is started.
        settled = _has_stepped(self._root / self._running[-1].cell.name)
        fits = settled and self._peak * _MEMORY_MARGIN < _available_bytes()
        return len(self._running) < self._limit and fits and self._fits_gpu()

    def start(self, cell: Cell) -> None:
        self._stopped.discard(cell.name)
        program = list(self._program)
        if self._gpus:
            gpu = self._next_gpu()
            self._turn = self._gpus.index(gpu) + 1
            self._gpu_of[cell.name] = gpu
            program = ["env", f"CUDA_VISIBLE_DEVICES={gpu}", *program]
        self._running.append(_start(cell, self._root, program))

    def ended(self) -> list[Ended]:
        over = [job for job in self._running if job.process.poll() is not None]
        for job in over:
            self._running.remove(job)
            self._note_gpu_peak(job)
            self._gpu_of.pop(job.cell.name, None)
        return [self._how_it_ended(job) for job in over]

    def _how_it_ended(self, job: Job) -> Ended:
        ended = how_it_ended(job, self._root)
        if job.cell.name in self._stopped and not is_finished(self._root / job.cell.name):
            return Ended(job.cell, CellFailed(f"{job.cell.name}: stopped", 130))
        return ended

    def stop(self, cell: Cell, signal_number: int) -> None:
        for job in self._running:
            if job.cell == cell:
                self._stopped.add(cell.name)
                with contextlib.suppress(ProcessLookupError):
                    job.process.send_signal(signal_number)

    def close(self) -> None:
        for job in self._running:
            self.stop(job.cell, signal.SIGTERM)

    def _num_cells(self, gpu: str) -> int:
        return list(self._gpu_of.values()).count(gpu)

    def _next_gpu(self) -> str:
        turn = self._turn % len(self._gpus)
        # The first of the least loaded, counted from the one whose turn it is.
        return min(self._gpus[turn:] + self._gpus[:turn], key=self._num_cells)

    def _fits_gpu(self) -> bool:
        if not self._gpus or not self._num_cells(gpu := self._next_gpu()):
            return True
        for job in self._running:
            self._note_gpu_peak(job)
        return self._gpu_peak * _MEMORY_MARGIN + _GPU_CONTEXT_BYTES < _free_gpu_bytes(gpu)

    def _note_gpu_peak(self, job: Job) -> None:
        metrics = self._root / job.cell.name / "metrics.jsonl"
        if self._gpus and metrics.is_file():
            told = [row["peak_memory_mib"] for row in read_jsonl(metrics) if row.get("peak_memory_mib")]
            self._gpu_peak = max([self._gpu_peak, *(int(mebibytes * 2**20) for mebibytes in told)])


_start = start_process


def _has_stepped(folder: Path) -> bool:
    """Whether a run has done its first step, so that its memory says something of what a run needs."""
    metrics = folder / "metrics.jsonl"
    return is_finished(folder) or (metrics.is_file() and metrics.stat().st_size > 0)


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


def _free_gpu_bytes(gpu: str) -> int:
    """Free memory of a GPU as its driver tells it; without limit where it is not known."""
    words = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(said.split()[0]) * 2**20  # in MiB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return sys.maxsize


def _kibibytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0  # the process has just ended, or this is no Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
