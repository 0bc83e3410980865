"""What every benchmark shares: ways that take turns, their agreement, and the row that is recorded."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from preceptor.errors import NumericError
from preceptor.runs.device import exact_matmul_precision
from preceptor.runs.environment import environment

OURS = "ours"


@dataclass(frozen=True)
class Spread:
    """Numbers over the rounds."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Bar:
    """What is promised: ``at_least`` times as fast as ``against``, at most a share of its memory, or of seconds.

    ``limit_at_least`` is the share of the hardware's limit that the way itself reaches.
    """

    against: str
    at_least: float | None = None
    memory_at_most: float | None = None
    seconds_at_most: float | None = None
    limit_at_least: float | None = None
    way: str = OURS


@dataclass(frozen=True)
class Comparison:
    """Ways of doing the same work.

    Attributes:
        benchmark: its name.
        case: the sizes, in words.
        ways: what is timed; each is called once a round.
        bars: what is promised of them.
        agreement: largest differences between what the ways gave, found before anything is timed.
        details: sizes for the record.
        units: work of one call (tokens, steps), for a rate; per way where they differ.
        memory: extra MiB of each way, where measured.
        ideal_seconds: what the hardware's bandwidth or arithmetic alone would take, per way.
        device: where it ran.
    """

    benchmark: str
    case: str
    ways: Mapping[str, Callable[[], object]]
    bars: Sequence[Bar] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    ideal_seconds: Mapping[str, float] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def alternate(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Spread]]:
    """Wall and process CPU seconds of each way over ``rounds`` turns: A B A B, so that a busy spell meets both.

    A way that returns a ``dict`` with ``wall`` and ``cpu`` has measured itself (set-up left out); what else the
    dictionary holds are parts of the wall time.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            result = run()
            own = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            if isinstance(result, dict) and own.keys() <= result.keys():
                own = {clock: float(value) for clock, value in result.items()}
            for clock, value in own.items():
                seconds[name].setdefault(clock, []).append(value)
    return {name: {clock: Spread.of(values) for clock, values in clocks.items()} for name, clocks in seconds.items()}


def measure(comparison: Comparison, *, rounds: int, threads: int) -> dict[str, Any]:
    """The row of ``history.jsonl``, but for the commit; ``speed_up`` is a way's time per unit over that of ours."""
    load_average = os.getloadavg()[0]
    seconds = alternate(comparison.ways, rounds)
    per_unit = {
        way: {clock: spread.median / comparison.units.get(way, 1.0) for clock, spread in clocks.items()}
        for way, clocks in seconds.items()
    }
    speed_up = {
        f"{ours} over {way}": {clock: per_unit[way][clock] / per_unit[ours][clock] for clock in ("wall", "cpu")}
        for ours in per_unit
        if ours.startswith(OURS)
        for way in per_unit
        if way != ours
    }
    shares = {way: ideal / seconds[way]["wall"].median for way, ideal in comparison.ideal_seconds.items()}
    return {
        "benchmark": comparison.benchmark,
        "case": comparison.case,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment(comparison.device, threads),
        "faster_matmul": exact_matmul_precision(comparison.device),
        "load_average": load_average,
        "rounds": rounds,
        "details": dict(comparison.details),
        "largest_difference": dict(comparison.agreement),
        "units": dict(comparison.units),
        "seconds": {
            way: {clock: asdict(spread) for clock, spread in clocks.items()} for way, clocks in seconds.items()
        },
        "extra_memory_mib": dict(comparison.memory),
        "share_of_limit": shares,
        "speed_up": speed_up,
        "bars": [
            asdict(bar) | {"holds": holds(bar, seconds, speed_up, comparison.memory, shares)} for bar in comparison.bars
        ],
    }


def holds(
    bar: Bar,
    seconds: Mapping[str, Mapping[str, Spread]],
    speed_up: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, float],
    shares: Mapping[str, float],
) -> bool:
    """Whether the medians meet ``bar`` (in wall time)."""
    fast = bar.at_least is None or speed_up[f"{bar.way} over {bar.against}"]["wall"] >= bar.at_least
    small = bar.memory_at_most is None or memory[bar.way] <= bar.memory_at_most * memory[bar.against]
    soon = bar.seconds_at_most is None or seconds[bar.way]["wall"].median <= bar.seconds_at_most
    near = bar.limit_at_least is None or shares[bar.way] >= bar.limit_at_least
    return fast and small and soon and near


def require_equal(what: str, difference: float, *, at_most: float) -> float:
    """``difference``, if rounding explains it.

    Raises:
        NumericError: it does not.
    """
    if not difference <= at_most:
        raise NumericError(f"{what} differ by {difference:.2e} between the ways, at most {at_most:.0e} is allowed")
    return difference


def measured_precision(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` under the product kernel that a run of Preceptor would choose; peers keep torch's own setting."""

    def measured() -> Any:
        with matmul_precision(exact_matmul_precision(torch.device("cpu"))):
            return run()

    return measured


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
