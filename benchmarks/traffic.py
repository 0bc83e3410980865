"""``python -m benchmarks.traffic FILE …``: Preceptor's command line, in a process whose collective calls are counted.

The first process writes what its gradient sums and its other calls took and carried to ``FILE``, as JSON, and the bytes
of each gradient sum in their order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preceptor.cli import main
from preceptor.runs import world

KINDS = ("gradients", "other")


class Counter:
    """Calls, bytes and seconds (waiting for the others included) of the collective calls of this process."""

    def __init__(self) -> None:
        self.counts = {kind: {"calls": 0, "bytes": 0, "seconds": 0.0} for kind in KINDS}
        self.sums: list[float] = []  # bytes of each sum of gradients
        self.kind = "other"

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, with the bytes of the tensors that it is given as its own part."""

        def counting(*tensors: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = call(*tensors, **options)
            count = self.counts[self.kind]
            count["calls"] += 1
            own: torch.Tensor = tensors[-1]  # `all_gather` has the places of the others first
            count["bytes"] += own.nbytes
            count["seconds"] += time.perf_counter() - began
            return result

        return counting

    def gradients(self, sum_gradients: Callable[..., None]) -> Callable[..., None]:
        """``sum_gradients``, whose calls are counted apart."""

        def summing(of: world.World, parameters: Iterable[nn.Parameter]) -> None:
            self.kind = "gradients"
            before = self.counts["gradients"]["bytes"]
            try:
                sum_gradients(of, parameters)
            finally:
                self.kind = "other"
                self.sums.append(self.counts["gradients"]["bytes"] - before)

        return summing


def count() -> Counter:
    """Counts the collective calls of this process from now on."""
    counter = Counter()
    for name in ("all_reduce", "all_gather"):
        setattr(world.dist, name, counter.counted(getattr(world.dist, name)))
    setattr(world.World, "sum_gradients", counter.gradients(world.World.sum_gradients))  # noqa: B010 - mypy's method
    return counter


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    counter = count()
    sys.argv = ["preceptor", *words]
    try:
        code = main()
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(path).write_text(json.dumps({**counter.counts, "sums": counter.sums}))
    sys.exit(code)
