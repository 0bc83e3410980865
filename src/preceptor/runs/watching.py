"""Looking at a run at work from outside: its newest rows and whether anybody is at it. It changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.runs.files import is_locked
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.progress import PLAN_NAME


class MetricsTail:
    """The rows of a ``metrics.jsonl`` that another process is writing, as they are at each look.

    A resume cuts rows off and writes them again, so the file is read anew whenever it has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._seen: tuple[int, int] | None = None

    def look(self) -> bool:
        """Reads the file if it has changed; whether it had."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return False  # the run has not done its first step
        now = (status.st_size, status.st_mtime_ns)
        if now == self._seen:
            return False
        self.rows, self._seen = list(read_jsonl(self.path)), now
        return True


def is_at_work(folder: Path) -> bool:
    """Whether a process holds the run's lock and has not finished: no note in a copied folder can say otherwise."""
    return not (folder / "result.json").is_file() and is_locked(folder)


def planned_steps(folder: Path) -> int | None:
    """How many steps the run will have in all; None where it has not said so (yet)."""
    try:
        return int(json.loads((folder / PLAN_NAME).read_text())["num_steps"])
    except FileNotFoundError:
        return None


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalar metrics of a row by name; those of sections with dots, lists and text left out."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": number for name, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[key] = float(value)
    return found
