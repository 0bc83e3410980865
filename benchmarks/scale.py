"""Two and four processes of one thread against one process of one thread: the same run, timed by its own steps.

The first step and everything around the steps (imports, evaluation) are left out. On a busy machine the processes wait
for each other, and the figure says nothing. The same holds of four processes on fewer than four cores: they are
measured, to see what oversubscription costs, and have no bar. With ``--rounds 2`` it takes about seven minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import OURS, Bar, Comparison
from preceptor.errors import NumericError

ALONE, TOGETHER, FOUR = "one process", f"{OURS}, 2 processes", f"{OURS}, 4 processes"
PROCESSES = {ALONE: 1, TOGETHER: 2, FOUR: 4}
WARM_UP = 1
"""Steps that are not timed: kernels are chosen and memory is taken in them."""

READING = (
    *("data.num_pairs=12", "data.num_probes=0", "episode.batch_size=32", "episode.query_tokens=8"),
    *("evaluation.every=0", "evaluation.num_episodes=2", "evaluation.num_orders=4", "evaluation.best_of=4"),
    # The same passes however many processes share the batch: without it one process holds all 32 episodes in one
    # backward pass, which takes 1.6 times as long as two of 16, and two processes seem to be more than twice as fast.
    "update.micro_batch_size=8",
    "save_every=1000",
)
CURRICULUM = (
    *("update.batch_tokens=8192", "ppo.prompts=32", "ppo.prompt_tokens=32", "ppo.continuation_tokens=32"),
    *("controls.rules=[]", "controls.frozen_policy=false", "validation.every=1000", "difficulty.every=1000"),
    "save_every=1000",
)
SYSTEMS = {"reading": READING, "curriculum": CURRICULUM}


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Updates of reading and of the curriculum with the starter model; each process has one thread."""
    steps = WARM_UP + (1 if quick else 4)
    for system, settings in SYSTEMS.items():
        overrides = [*settings, f"update.steps={steps}"]
        yield Comparison(
            benchmark="scale",
            case=f"{system}, {steps - WARM_UP} updates, {os.cpu_count()} cores",
            ways={way: timed(system, overrides, size=size) for way, size in PROCESSES.items()},
            bars=() if quick else (Bar(ALONE, at_least=1.6, way=TOGETHER),),
            details={"settings": overrides},
            units=dict.fromkeys(PROCESSES, steps - WARM_UP),
        )


def timed(system: str, overrides: Sequence[str], *, size: int) -> Callable[[], dict[str, float]]:
    """A call that runs ``system`` in ``size`` processes and gives the seconds of its updates."""

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            rows = updates(system, overrides, Path(folder) / "run", size=size)
        seconds = sum(row["seconds"] for row in rows)
        return {"wall": seconds, "cpu": size * seconds}  # each process computes or waits all the while

    return run


def updates(
    system: str, overrides: Sequence[str], out: Path, *, size: int, module: Sequence[str] = ("preceptor",)
) -> list[dict[str, Any]]:
    """The metrics of every update but the first of a run of ``system`` in ``size`` processes, whose folder is ``out``.

    Args:
        system: its name.
        overrides: of its preset ``smoke``.
        out: the run's folder.
        size: processes of one thread each.
        module: what is run in the place of ``preceptor``, and its first arguments.

    Raises:
        NumericError: the run failed.
    """
    launcher = [] if size == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"]
    words = ["run", system, "--preset", "smoke", "--threads", "1", "--no-report", "--out", str(out)]
    sets = [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *module, *words, *sets],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    if done.returncode:
        raise NumericError(f"{system} on {size} processes failed: {done.stderr.strip()[-300:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # Of the first method alone: the others of a curriculum train without rollouts.
    return [row for row in rows if row.get("arm_number", 1) == 1][WARM_UP:]
