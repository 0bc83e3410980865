"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere. Goes to stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAN_NAME = "plan.json"
"""File of a run folder that says how many steps it will have, the controls' included."""

COLUMNS = {
    "reward": "reward",
    "kl": "KL",
    "selection_entropy": "selection entropy",
    "passed": "passed",
    "tokens_per_second": "tokens/s",
}
"""Metrics shown when a row has them, and what they are called on the screen."""


class Progress:
    """Shows steps, chosen metrics and the time left, on stderr so that stdout stays free for results.

    On a terminal a bar that moves at every step; elsewhere a line at the first and last step and every
    ``every_seconds``. ``enabled=False`` (worker ranks, quiet runs) prints nothing. ``first_step`` is where a resumed
    run starts, so that the time left is judged by this process's own pace.
    """

    def __init__(
        self,
        total: int,
        *,
        first_step: int = 0,
        columns: Mapping[str, str] = COLUMNS,
        every_seconds: float = 10.0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.columns = columns
        self.enabled = enabled
        self._first_step = first_step
        self._every_seconds = every_seconds
        self._clock = clock
        self._started = clock()
        self._last_line: float | None = None
        self._console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._bar: RichProgress | None = None
        if enabled and self._console.is_interactive:  # a dumb terminal gets lines
            self._bar = RichProgress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,  # no thread: it moves when a step is done
                redirect_stdout=sys.stdout.isatty(),  # results piped elsewhere must not come to the screen
            )
            self._task = self._bar.add_task("", total=total, completed=first_step, text="")
            self._bar.start()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Says that ``step`` steps are done, the last one with the metrics ``row``."""
        if not self.enabled:
            return
        parts = [f"{label} {_short(row[key])}" for key, label in self.columns.items() if row.get(key) is not None]
        if (left := self._seconds_left(step)) is not None:
            parts.append(f"{duration(left)} left")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            self._bar.refresh()
            return
        now = self._clock()
        if self._last_line is None or now - self._last_line >= self._every_seconds or step >= self.total:
            self._last_line = now
            self._console.print(f"step {step}/{self.total}  {text}".rstrip())

    def notice(self, text: str) -> None:
        """Prints one line above the bar."""
        if self.enabled:
            self._console.print(text)

    def close(self) -> None:
        """Leaves the terminal as it was; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds_left(self, step: int) -> float | None:
        done = step - self._first_step
        # No step of this process yet, so nothing is known of its pace.
        if done <= 0 or step >= self.total:
            return None
        return (self._clock() - self._started) / done * (self.total - step)


def _short(value: Any) -> str:
    """A number in at most seven characters or so; NaN stays visible."""
    if not isinstance(value, int | float):
        # numpy numbers and tensors of one element.
        value = float(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """``4:05`` or ``2:04:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
