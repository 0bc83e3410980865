"""TensorBoard, trackio and Weights & Biases as views of ``metrics.jsonl``, which stays the record."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from preceptor.errors import ConfigError, MissingExtraError, ServiceError, did_you_mean
from preceptor.runs.files import replace_file

TRACKERS = ("tensorboard", "trackio", "wandb")


class Tracker(Protocol):
    """Something that shows the metrics of a run elsewhere."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the numbers of ``row`` at ``step``."""

    def close(self) -> None:
        """Writes out what is buffered."""


def check_trackers(names: Iterable[str]) -> None:
    """Raises before a run begins what ``open_tracker`` would raise in it.

    ``ConfigError`` for a name that is not in ``TRACKERS``, ``MissingExtraError`` when its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"tracker {name!r} is not known{did_you_mean(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}"
            )
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"tracking with {name}", package=name, extra=name)


def open_tracker(name: str, folder: Path, *, first_step: int, config: Mapping[str, Any]) -> Tracker:
    """The tracker ``name`` for the run in ``folder``; steps from ``first_step`` on that it has do not double."""
    check_trackers([name])
    if name == "tensorboard":
        return TensorBoard(folder, first_step=first_step)
    return Trackio(folder, config=config) if name == "trackio" else WandB(folder, config=config)


class TensorBoard:
    """Event files under ``tensorboard/`` in the run folder; nothing leaves the machine."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Tells the reader to forget what an earlier process wrote from this step on.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one scalar for each number; NaN stays NaN."""
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class Trackio:
    """A run in trackio's local database (``trackio show`` opens it); nothing leaves the machine.

    The run's name there stays in the folder, so that a resumed run goes on in the same chart.
    """

    PROJECT = "preceptor"

    def __init__(self, folder: Path, *, config: Mapping[str, Any]) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        note = folder / "trackio-name"
        if not note.exists():
            replace_file(note, f"{folder.name}-{secrets.token_hex(4)}")
        name = note.read_text().strip()
        # A resume repeats rows bit for bit, so those that the database has are left out. It is asked, and not a note of
        # ours: trackio writes in the background, and a killed process may not have got that far.
        last_step = SQLiteStorage.get_max_step_for_run(self.PROJECT, name)
        self._next_step = 0 if last_step is None else int(last_step) + 1
        with contextlib.redirect_stdout(sys.stderr):  # its greeting is no output of ours
            self._run = trackio.init(
                project=self.PROJECT,
                name=name,
                resume="allow",
                config=dict(config),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Stores the numbers of ``row``, unless the database has this step."""
        if step >= self._next_step:
            self._run.log(_numbers(row), step=step)

    def close(self) -> None:
        """Waits until everything is stored."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class WandB:
    """A run at Weights & Biases; its id stays in the folder, so that a resumed run goes on in the same chart."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any]) -> None:
        import wandb

        note = folder / "wandb-id"
        if not note.exists():
            replace_file(note, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project="preceptor",
                id=note.read_text().strip(),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(config),
            )
        except wandb.Error as error:
            raise ServiceError(
                f"W&B refused the run: {error}; log in with: wandb login, or leave the tracker out"
            ) from error
        # The service cannot take rows back. A resume repeats them bit for bit, so those it has are left out.
        self._next_step = int(self._run.step)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the numbers of ``row``, unless the service has this step."""
        if step >= self._next_step:
            self._run.log(_numbers(row), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of ``row``, those of a mapping under dotted names; lists and text stay in the JSONL alone.

    >>> _numbers({"loss": 1.0, "weights": {"books": 0.5, "code": 0.5}, "arm": "uniform"})
    {'loss': 1.0, 'weights.books': 0.5, 'weights.code': 0.5}
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, int | float) or getattr(value, "ndim", None) == 0:
            found[key] = float(value)
    return found
