"""Cells as jobs of Slurm, through submitit: one job a cell, which states its CPUs, GPUs, memory and time.

A job that is preempted or out of time saves and goes back into the queue; one whose machine was lost is submitted
again. Both go on from the cell's last checkpoint. submitit keeps what it passes to its jobs in the folder ``slurm``.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.comparison.cells import STOP_SECONDS, Cell, CellFailed, Ended, Job, Resources, run_to_end
from preceptor.errors import ConfigError, MissingExtraError, PreceptorError, did_you_mean, short_repr
from preceptor.runs.files import is_locked

FOLDER = "slurm"
DAY = 24 * 60
"""Minutes that a job may take where nothing is said; submitit's own five are too few."""
MAX_LOST = 3
"""How often a job may end without a word before its cell counts as failed."""


class SlurmLauncher:
    """Jobs of the cluster that this machine can submit to.

    ``settings`` are submitit's: ``partition``, ``account``, ``time`` (minutes), ``constraint`` and others of
    ``sbatch``; ``cluster=local`` runs the same jobs as processes of this machine, to try them.

    Raises:
        MissingExtraError: submitit is not installed.
        ConfigError: there is no Slurm here, or no setting of that name.
    """

    def __init__(
        self,
        root: Path,
        resources: Resources,
        *,
        settings: Mapping[str, str | int] | None = None,
        num_jobs: int | None = None,
        program: Sequence[str] = (),
    ) -> None:
        self._submitit = _imported()
        self._root, self._limit, self._program = root.resolve(), num_jobs, tuple(program)
        given = dict(settings or {})
        cluster = str(given.pop("cluster", "slurm"))
        _check(self._submitit, cluster, given)
        self._executor = self._submitit.AutoExecutor(self._root / FOLDER, cluster=cluster)
        self._executor.update_parameters(
            timeout_min=given.pop("time", DAY),
            cpus_per_task=math.ceil(resources.cpus),
            gpus_per_node=math.ceil(resources.gpus),
            mem_gb=resources.memory / 2**30,
            **{f"slurm_{key}": value for key, value in given.items()},
        )
        self._jobs: dict[str, tuple[Any, Cell]] = {}  # by name of the cell
        self._lost: dict[str, int] = {}
        self._stopped: set[str] = set()

    def has_room(self) -> bool:
        """Slurm queues what does not fit yet, so that there is always room but for ``num_jobs``."""
        return self._limit is None or len(self._jobs) < self._limit

    def start(self, cell: Cell) -> None:
        self._executor.update_parameters(name=cell.name)
        job = self._executor.submit(CellTask(cell, self._root, Path.cwd(), self._program))
        self._jobs[cell.name] = job, cell
        self._stopped.discard(cell.name)

    def ended(self) -> list[Ended]:
        over = [name for name, (job, _) in self._jobs.items() if job.done()]
        return [self._how_it_ended(*self._jobs.pop(name)) for name in over]

    def _how_it_ended(self, job: Any, cell: Cell) -> Ended:
        if cell.name in self._stopped:
            return Ended(cell, CellFailed(f"{cell.name}: stopped", 130))
        try:
            return Ended(cell, job.result())
        except self._submitit.core.utils.FailedJobError as error:
            said = str(error).strip().splitlines()
            return Ended(cell, CellFailed(f"{cell.name}: {said[-1] if said else 'failed'}; see {job.paths.stderr}", 1))
        except self._submitit.core.utils.UncompletedJobError:
            # Killed from outside: a lost machine, or too little memory, which another try will not mend.
            self._lost[cell.name] = self._lost.get(cell.name, 0) + 1
            if self._lost[cell.name] < MAX_LOST:
                return Ended(cell, again=True)
            fault = f"{cell.name}: job {job.job_id} ended {MAX_LOST} times without a result ({job.state})"
            return Ended(cell, CellFailed(f"{fault}; see {job.paths.stderr}, and whether --memory is enough", 1))

    def stop(self, cell: Cell, signal_number: int) -> None:
        self._stopped.add(cell.name)
        self._jobs[cell.name][0].cancel(check=False)

    def close(self) -> None:
        for _, cell in self._jobs.values():
            self.stop(cell, 0)


class CellTask:
    """What a job does: it runs its cell to the end, and returns a failure, whose code an exception would lose."""

    def __init__(self, cell: Cell, root: Path, cwd: Path, program: Sequence[str]) -> None:
        self.arguments = (cell, root, cwd, tuple(program))

    def __call__(self) -> CellFailed | None:
        try:
            run_to_end(*self.arguments, started=self._note)
        except CellFailed as failure:
            return failure
        except PreceptorError as error:
            return CellFailed(f"{self.arguments[0].name}: {error}", error.exit_code)
        return None

    def _note(self, job: Job) -> None:
        self._job = job

    def checkpoint(self) -> Any:
        """Called by submitit when the job is preempted or out of time: the cell saves, and the job is queued again."""
        if (job := self.__dict__.pop("_job", None)) is not None:
            _, root, *_ = self.arguments
            with contextlib.suppress(ProcessLookupError):
                job.process.terminate()
            # Not `process.wait`: this interrupts the one of `run_to_end`, which holds its lock. The run's own lock is
            # free when it has saved; one that takes too long is ended by Slurm, and goes on from an older checkpoint.
            deadline = time.monotonic() + STOP_SECONDS
            while is_locked(root / job.cell.name) and time.monotonic() < deadline:
                time.sleep(0.1)
        return _imported().helpers.DelayedSubmission(self)


def _imported() -> Any:
    try:
        import submitit
        import submitit.core.utils
    except ImportError as error:
        raise MissingExtraError("--launcher slurm", package="submitit", extra="slurm") from error
    return submitit


def _check(submitit: Any, cluster: str, settings: Mapping[str, Any]) -> None:
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"--slurm cluster must be slurm or local, got {short_repr(cluster)}")
    # Those that a cell states itself are not to be given twice.
    own = {"cpus_per_task", "gpus_per_node", "mem", "job_name", "map_count", "array_parallelism"}
    known = sorted(submitit.SlurmExecutor._valid_parameters() - own)
    for key in settings:
        if key not in known:
            hint = did_you_mean(key[:100], [*known, "cluster"]) or f"; there are {', '.join(known)}"
            raise ConfigError(f"--slurm has no setting {short_repr(key)}{hint}")
    if not isinstance(settings.get("time", DAY), int):
        raise ConfigError(f"--slurm time must be a whole number of minutes, got {short_repr(settings['time'])}")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "--launcher slurm: there is no sbatch on this machine; submit from a login node, list the cells with "
            "--print, or try the jobs as processes with --slurm cluster=local"
        )
