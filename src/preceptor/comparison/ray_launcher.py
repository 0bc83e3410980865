"""Cells as tasks of Ray, on this machine or on a cluster: each states its CPUs, GPUs and memory, and Ray finds room.

A task whose worker or machine is lost is tried again by Ray and goes on from the cell's last checkpoint. All machines
see the folder of the sweep under the same path, and have the same Preceptor.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preceptor.comparison.cells import Cell, CellFailed, Ended, Resources, run_to_end
from preceptor.errors import ConfigError, MissingExtraError, PreceptorError, short_repr

MAX_LOST = 100
"""How often a cell's worker may be lost. A cell goes on from its checkpoint, so that each try brings it further."""


class RayLauncher:
    """Tasks of the Ray cluster at ``address`` (None: one of this machine's own, which ends with the sweep).

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: no cluster is found at ``address``, or no machine of it has what a cell asks for.
    """

    def __init__(
        self,
        root: Path,
        resources: Resources,
        *,
        address: str | None = None,
        num_jobs: int | None = None,
        program: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._ray = _imported()
        self._root, self._limit = root.resolve(), num_jobs
        self._tasks: dict[Any, Cell] = {}
        self._owns = not self._ray.is_initialized()
        if self._owns:
            _connect(self._ray, address)
        try:
            _check_feasible(self._ray, resources, address=address, say=say)
        except ConfigError:
            self.close()
            raise
        self._asked = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": resources.memory}
        self._program = tuple(program)

    def has_room(self) -> bool:
        """Ray queues what does not fit yet, so that there is always room but for ``num_jobs``."""
        return self._limit is None or len(self._tasks) < self._limit

    def start(self, cell: Cell) -> None:
        task = self._ray.remote(max_retries=MAX_LOST, **self._asked)(run_to_end).options(name=cell.name)
        self._tasks[task.remote(cell, self._root, Path.cwd(), self._program)] = cell

    def ended(self) -> list[Ended]:
        if not self._tasks:
            return []
        over, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0, fetch_local=False)
        return [Ended(self._tasks.pop(task), failure) for task in over for failure in [self._failure(task)]]

    def _failure(self, task: Any) -> CellFailed | None:
        cell, errors = self._tasks[task], self._ray.exceptions
        try:
            self._ray.get(task)
        except errors.TaskCancelledError:
            return CellFailed(f"{cell.name}: stopped", 130)
        except errors.RayTaskError as error:  # raised by the cell's own work, on its machine
            cause = error.cause
            if isinstance(cause, CellFailed):
                return cause
            code = cause.exit_code if isinstance(cause, PreceptorError) else 1
            return CellFailed(f"{cell.name}: {cause or error}", code)
        except errors.RayError as error:
            said = str(error).strip().partition("\n")[0]
            return CellFailed(f"{cell.name}: its worker was lost {MAX_LOST} times or could not start ({said})", 1)
        return None

    def stop(self, cell: Cell, signal_number: int) -> None:
        for task, its in self._tasks.items():
            if its == cell:
                self._ray.cancel(task)  # raises KeyboardInterrupt in the task, which tells the cell to save

    def close(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)
        if self._owns:
            # Cancelled tasks save before they end.
            while self._tasks and self._ray.is_initialized():
                self.ended()
                time.sleep(0.1)
            self._ray.shutdown()


def _imported() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError("--launcher ray", package="ray", extra="ray") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is not None:
        _check_reachable(address)
    try:
        # "local" is said, since without an address Ray would take a cluster that happens to run here.
        if address is None:
            ray.init("local", include_dashboard=False, **settings)
        else:
            ray.init(address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise _no_cluster(address or "local", said) from error


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not (host and colon and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(f"--address must be HOST:PORT or auto, got {short_repr(address)}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, str(error.strerror or error)) from error


def _no_cluster(address: str, said: str) -> ConfigError:
    return ConfigError(
        f"--address {address}: no Ray cluster there ({said}); start one with `ray start --head`, or leave --address "
        "out for one of this machine's own"
    )


def _check_feasible(ray: Any, wanted: Resources, *, address: str | None, say: Callable[[str], None]) -> None:
    """Refuse what would wait for ever on one machine; a cluster may grow, so that there it is only said."""
    asked = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": wanted.memory}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(has.get(kind, 0) >= amount for kind, amount in asked.items()) for has in machines):
        return
    most = {kind: max((has.get(kind, 0) for has in machines), default=0) for kind in asked}
    fault = (
        f"no machine of the Ray cluster has {wanted.cpus:g} CPUs, {wanted.gpus:g} GPUs and "
        f"{wanted.memory / 2**30:.1f} GiB for a cell (at most {most['CPU']:g}, {most['GPU']:g} and "
        f"{most['memory'] / 2**30:.1f} GiB)"
    )
    if address is None:
        raise ConfigError(f"{fault}; lower --cpus, --gpus or --memory")
    say(f"{fault}; cells wait until one joins")
