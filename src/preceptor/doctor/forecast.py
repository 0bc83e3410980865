"""What the configured run will take, measured by letting it begin for real in a folder that is thrown away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from preceptor.doctor.check import Check
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.progress import duration
from preceptor.runs.watching import MetricsTail, planned_steps

NUM_STEPS = 2
"""Steps that are waited for at least; the first is left out, since it pays for warming up."""

MIN_SECONDS = 5.0
"""For how long steps are watched, unless the run ends before."""


def forecast(arguments: list[str], folder: Path, *, timeout: float = 180.0) -> tuple[Check, Check]:
    """Time and memory of ``preceptor run ARGUMENTS``, from its first steps.

    ``folder`` is where the short run is made. The time is that of the steps alone: the measurement of the controls at
    the end comes on top.
    """
    # A real run in a process of its own: imports, loading and the first step are measured as they will be.
    command = [sys.executable, "-m", "preceptor", "run", *arguments, "--out", str(folder), "--no-report"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    tail, peak = MetricsTail(folder / "metrics.jsonl"), 0
    seen: list[tuple[int, float]] = []  # rows, and when there were so many
    try:
        # Until enough steps and seconds are seen, the run ends by itself, or patience does.
        while process.poll() is None and time.monotonic() - began < timeout:
            peak = max(peak, _peak_bytes(process.pid))
            if tail.look() and tail.rows:
                seen.append((len(tail.rows), time.monotonic()))
            # The first entry is after the first step, whose warm-up is thereby left out of the pace.
            if seen and seen[-1][0] >= NUM_STEPS and time.monotonic() - seen[0][1] >= MIN_SECONDS:
                break
            time.sleep(0.1)
    # SIGTERM lets the run close its files; what is slower than 20 s is killed. The folder is thrown away in any case.
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
    metrics = list(read_jsonl(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").is_file() else []
    if not metrics:
        lines = said.decode(errors="replace").strip().splitlines() or [f"no step within {timeout:.0f} s"]
        reason = lines[-1].removeprefix("preceptor: error: ")
        fault = Check("fail", "first step", reason, "mend this, or make the run smaller")
        return fault, Check("warn", "memory", "unknown: there was no step")
    return _time(seen, planned_steps(folder)), _memory(metrics, peak)


def _time(seen: list[tuple[int, float]], num_steps: int | None) -> Check:
    if len(seen) < 2:
        return Check("warn", "time", "unknown: too few steps were seen")
    # Differences of both counts and times, so that start-up does not enter.
    (first, begin), (last, end) = seen[0], seen[-1]
    seconds = (end - begin) / (last - first)
    if num_steps is None:
        return Check("ok", "time", f"{seconds:.2g} s a step")
    total = f"{num_steps:,} steps in about {duration(seconds * num_steps)} at this pace"
    return Check("ok", "time", f"{seconds:.2g} s a step, {total}; measuring the arms at the end comes on top")


def _memory(metrics: list[dict[str, Any]], peak: int) -> Check:
    told = [row["peak_memory_mib"] for row in metrics if isinstance(row.get("peak_memory_mib"), int | float)]
    # The log tells the GPU's memory, the process table the machine's; the larger counts.
    mebibytes = max([peak / 2**20, *told])
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    figure = f"{mebibytes:,.0f} MiB after {len(metrics)} steps, of {have:,.0f} MiB"
    remedy = "lower the batch or micro-batch size, or train an adapter"
    # A fifth is left for growth: later batches may be longer, and the measurement at the end has its own.
    return Check("ok" if mebibytes < 0.8 * have else "warn", "memory", figure, remedy)


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has just ended, or this is no Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
