"""``python -m benchmarks.gpu_session``: all that a GPU is asked for, in one go and a few minutes.

The parts of ``benchmarks.gpu`` (decode, update, decoding by a CUDA graph, episodes, a GRPO step), how busy the GPU is
while decoding, a smoke run of every system and the tests marked ``gpu``. Each part is a process of its own under a time
limit; what it measures is appended to ``rows.jsonl`` at once, how it ended to ``parts.jsonl``. So a part that fails,
or a machine that is taken away, costs what was not yet measured and nothing else. ``--quick`` does the same at tiny
sizes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu
from benchmarks.__main__ import verdicts
from benchmarks.measurement import measure
from preceptor.errors import PreceptorError, did_you_mean
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.runs.environment import environment

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("bandit", "reading", "curriculum", "surgery")
LIMITS = {
    "decode": 100.0,
    "update": 60.0,
    "busy": 45.0,
    "graphs": 60.0,
    "episodes": 60.0,
    **{f"smoke-{system}": 60.0 for system in SYSTEMS},
    "tests": 60.0,
    "grpo": 120.0,
}
"""Seconds of each part at most, in the order in which they run: what is asked for most comes first, and what takes
longest last. Together they are more than a session has; what is no longer begun is said."""

_TAIL = 2_000
"""Characters of a part's output that are kept."""


def command(part: str, out: Path, *, quick: bool) -> list[str]:
    """What runs ``part``, whose rows go to ``out``."""
    if part.startswith("smoke-"):
        system = part.removeprefix("smoke-")
        device = "cpu" if quick else "cuda"
        words = ["run", system, "--preset", "smoke", "--device", device, "--no-report", "--out", str(out / part)]
        return [sys.executable, "-m", "preceptor", *words]
    if part == "tests":
        return [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-n0",
            "-p",
            "no:cacheprovider",
            "-q",
            "tests/lm",
            "tests/runs",
        ]
    return [sys.executable, "-m", "benchmarks.gpu_session", "--measure", part, "--out", str(out), *["--quick"] * quick]


def session(parts: Sequence[str], out: Path, *, seconds: float, quick: bool) -> bool:
    """Runs ``parts`` one after another for ``seconds`` in all; whether all of them ended well.

    A line of ``parts.jsonl`` says how each ended: ``done``, ``failed``, ``out of time`` or ``not begun``.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin, statuses = time.monotonic(), []
    for part in parts:
        left = seconds - (time.monotonic() - begin)
        limit = min(LIMITS[part], left)
        row = {"part": part, "status": "not begun", "seconds": 0.0, "limit": limit, "tail": ""}
        if limit > 1:
            row |= run_part(command(part, out, quick=quick), limit)
        _append(out / "parts.jsonl", row)
        print(f"{part}: {row['status']} after {row['seconds']:.0f} s", flush=True)
        if row["status"] == "failed":
            print(row["tail"], flush=True)
        statuses.append(row["status"])
    return all(status == "done" for status in statuses)


def run_part(words: Sequence[str], limit: float) -> dict[str, Any]:
    """``status``, ``seconds`` and the end of the output of a command that may take ``limit`` seconds.

    It has a process group of its own, which is killed as a whole: a part may have children.
    """
    begin = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "out of time"
    return {"status": status, "seconds": time.monotonic() - begin, "tail": output[-_TAIL:]}


def measure_part(part: str, out: Path, *, quick: bool) -> None:
    """Appends a row for each comparison of ``part`` as soon as it is measured."""
    torch.set_num_threads(1 if quick else torch.get_num_threads())
    lm = gpu.model(quick=quick)
    rounds = 1 if quick or part == "grpo" else 3
    for row in (
        [busy(lm, *((2, 4) if quick else (8, 32)))]
        if part == "busy"
        else (measure(each, rounds=rounds, threads=torch.get_num_threads()) for each in gpu.PARTS[part](lm, quick))
    ):
        _append(out / "rows.jsonl", row)
        print(json.dumps(row), *verdicts(row), sep="\n", flush=True)


def busy(lm: LanguageModel, batch_size: int, num_tokens: int) -> dict[str, Any]:
    """How much of a decode step the GPU computes, and how many kernels a step launches.

    A share far below 1 says that decode is bound by launches, and that CUDA graphs would pay. On a CPU the operators
    are counted in the kernels' place, and the share says nothing.
    """
    on_gpu = lm.device.type == "cuda"
    decoder = Decoder(lm, batch_size=batch_size)
    decoder.append([[lm.begin_token] * 64] * batch_size)
    generator = torch.Generator().manual_seed(0)
    decoder.generate(4, sampling=Sampling(), generator=generator)  # kernels are chosen
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    begin = time.perf_counter()
    decoder.generate(num_tokens, sampling=Sampling(), generator=generator)
    if on_gpu:
        torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    with profile(activities=activities) as seen:  # a pass of its own: profiling slows launches down
        decoder.generate(num_tokens, sampling=Sampling(), generator=generator)
        if on_gpu:
            torch.cuda.synchronize()
    events = [event for event in seen.events() if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    computing = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events) / 1e6
    return {
        "benchmark": "gpu busy",
        "case": f"decode, batch {batch_size}, {num_tokens} tokens",
        **environment(lm.device, torch.get_num_threads()),
        "seconds_a_step": wall / num_tokens,
        "kernels_a_step": len(events) / num_tokens,
        "share_busy": computing / wall,
        "bars": [],
    }


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, on the disk before anything else happens."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the session, or one part of it; returns the exit code (1: a part did not end well)."""
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := [part for part in options.parts if part not in LIMITS]:
        parser.error(f"there is no part '{unknown[0]}'{did_you_mean(unknown[0], LIMITS)}; {', '.join(LIMITS)}")
    out = options.out or ROOT / "build" / time.strftime("gpu-%Y%m%d-%H%M%S")
    try:
        if options.measure:
            measure_part(options.measure, out, quick=options.quick)
            return 0
        if not (options.quick or torch.cuda.is_available()):
            print("gpu_session: error: there is no CUDA device; --quick tries the script on the CPU", file=sys.stderr)
            return 2
        return 0 if session(options.parts, out, seconds=60 * options.minutes, quick=options.quick) else 1
    except PreceptorError as error:
        print(f"gpu_session: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "parts", metavar="PART", nargs="*", default=list(LIMITS), help=f"which: {', '.join(LIMITS)} (all)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="default build/gpu-DATE-TIME")
    parser.add_argument("--minutes", metavar="M", type=float, default=8.0, help="for all parts together (default 8)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--measure", metavar="PART", choices=("busy", *gpu.PARTS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
