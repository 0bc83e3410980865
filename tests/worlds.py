"""Worlds of several processes for tests: forked from the one that runs the test, so that nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from preceptor.runs.world import World, joined

TIMEOUT = 300.0
"""Seconds after which a world that does not end is a failure."""


def launcher_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells process ``rank``."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # as torchrun sets it where it is not set
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # threads that read weights do not go well with a process that was forked
    }


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def in_processes(size: int, function: Callable[[int], Any]) -> list[Any]:
    """What ``function`` gives for each rank in a process of its own, whose environment is a launcher's."""
    context = multiprocessing.get_context("fork")
    port, results = free_port(), context.Queue()

    def process(rank: int) -> None:
        os.environ.update(launcher_variables(rank, size, port))
        try:
            results.put((rank, function(rank), None))
        except BaseException:  # noqa: BLE001 - whatever it was, the test fails with its traceback
            results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(0)  # nothing of the test's own process is torn down here

    processes = [context.Process(target=process, args=(rank,), daemon=True) for rank in range(size)]
    for each in processes:
        each.start()
    given: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = results.get(timeout=TIMEOUT)
            assert error is None, f"process {rank} of {size}: {error}"
            given[rank] = result
    finally:
        for each in processes:
            each.join(5 if len(given) == size else 0.1)
            each.kill()
    return [given[rank] for rank in range(size)]


def in_world(size: int, function: Callable[[World], Any]) -> list[Any]:
    """What ``function`` gives in each process of a world, in rank order; fails with what one of them raised."""

    def joining(_: int) -> Any:
        with joined(os.environ) as world:
            return function(world)

    return in_processes(size, joining)
