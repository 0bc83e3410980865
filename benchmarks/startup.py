"""Start-up: what a user waits for before anything happens, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.measurement import Bar, Comparison

ENTRY = "import sys; from preceptor.cli import main; sys.exit(main())"
"""What the installed script runs."""

COMMANDS = {
    "import preceptor": (["-c", "import preceptor"], 0.1),
    "preceptor --help": (["-c", ENTRY, "--help"], 0.5),
    "preceptor run reading --print-config": (["-c", ENTRY, "run", "reading", "--print-config"], None),
}


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Each command beside an empty Python, whose own start is part of every figure."""
    for name, (arguments, seconds) in list(COMMANDS.items())[: 1 if quick else None]:
        yield Comparison(
            benchmark="start-up",
            case=name,
            ways={"ours": process(arguments), "python -c pass": process(["-c", "pass"])},
            bars=() if seconds is None else (Bar("python -c pass", seconds_at_most=seconds),),
        )


def process(arguments: list[str]) -> Callable[[], object]:
    """A call that runs Python with ``arguments``."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
