"""Trials of a campaign, counted class by class in a file, so that a stopped campaign goes on where it was."""

from __future__ import annotations

import json
import random
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

HANG_SECONDS = 60.0
"""A trial that takes longer hangs."""


@dataclass(frozen=True)
class Class:
    """A kind of trial.

    Attributes:
        trials: how many there are to be.
        bar: what must hold in each.
        trial: gets a random generator of the trial's own and the campaign's folder; returns what went wrong, or None.
        seconds: after which a trial hangs.
    """

    trials: int
    bar: str
    trial: Callable[[random.Random, Path], str | None]
    seconds: float = HANG_SECONDS


class _Hangs(BaseException):
    """Not an ``Exception``, which the code under trial may catch."""


class Campaign:
    """The counts in ``folder/tally.json``."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._path = folder / "tally.json"
        self.counts: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def run(self, classes: Mapping[str, Class], *, seconds: float) -> int:
        """Trials of every class in turn, so that a short run tries all of them; 1 if any ever failed."""
        end = time.monotonic() + seconds
        for name in classes:
            self.counts.setdefault(name, {"done": 0, "failures": []})
        while time.monotonic() < end:
            open_classes = [name for name, each in classes.items() if self.counts[name]["done"] < each.trials]
            if not open_classes:
                break
            for name in open_classes:
                # As much time for each class as for the others, at least one trial.
                share = time.monotonic() + min(10.0, max(0.0, end - time.monotonic()) / len(open_classes))
                self._trials(name, classes[name], until=share)
                if time.monotonic() >= end:
                    break
        for name, each in classes.items():
            print(self.line(name, each), flush=True)
        return int(any(self.counts[name]["failures"] for name in classes))

    def _trials(self, name: str, each: Class, *, until: float) -> None:
        count = self.counts[name]
        while count["done"] < each.trials:
            fault = self._one(name, each, count["done"])
            if fault is not None:
                count["failures"].append({"trial": count["done"], "fault": fault})
            count["done"] += 1
            if time.monotonic() >= until:
                break
        self._path.write_text(json.dumps(self.counts, indent=1) + "\n")

    def _one(self, name: str, each: Class, index: int) -> str | None:
        """The trial ``index`` of a class, the same whenever it is run."""

        def alarm(_number: int, _frame: FrameType | None) -> None:
            raise _Hangs

        previous = signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, each.seconds)
        try:
            return each.trial(random.Random(f"{self.seed} {name} {index}"), self.folder)
        except _Hangs:
            return f"hangs: longer than {each.seconds:g} s"
        except Exception:  # noqa: BLE001 - whatever it is, it is what the campaign looks for
            return traceback.format_exc(limit=-4)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def line(self, name: str, each: Class) -> str:
        """How far a class is, and its first failure."""
        count = self.counts[name]
        failures = count["failures"]
        told = f"{name}: {count['done']:,} of {each.trials:,}, {len(failures)} failures ({each.bar})"
        if failures:
            told += f"; the first in trial {failures[0]['trial']}: {' '.join(failures[0]['fault'].split())[-300:]}"
        return told
