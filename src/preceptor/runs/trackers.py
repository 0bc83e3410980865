"""TensorBoard, trackio and Weights & Biases as views of ``metrics.jsonl``, which stays the record.

A run that trains one method after the other (the learned one, then its baselines) has a curve for each, over the
method's own steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from preceptor.errors import ConfigError, MissingExtraError, ServiceError, did_you_mean
from preceptor.runs.files import replace_file
from preceptor.runs.metrics import read_jsonl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRACKERS = ("tensorboard", "trackio", "wandb")
OWN_STEPS = ("arm_step", "stretch_step")
"""Columns of ``metrics.jsonl`` that count a method's own steps."""
TABLE = ("method", "metric", "mean", "low", "high", "unit")
"""Columns of the table of methods: the interval is from low to high."""


class Tracker(Protocol):
    """Something that shows the metrics of a run elsewhere."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the numbers of ``row`` at ``step``."""

    def conclude(self, result: Mapping[str, Any], page: Path | None) -> None:
        """Shows what came of the run: verdict, methods and, if there is one, the page."""

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


def open_tracker(name: str, folder: Path, *, first_step: int, manifest: Mapping[str, Any]) -> Tracker:
    """The tracker ``name`` for the run in ``folder``; steps from ``first_step`` on that it has do not double.

    ``manifest`` is the run's: its name, tags, project and group, and its configuration.
    """
    check_trackers([name])
    trackers: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}
    return trackers[name](folder, first_step=first_step, manifest=manifest)


class TensorBoard:
    """Event files under ``tensorboard/`` in the run folder, in a folder for each method; nothing leaves the machine.

    TensorBoard draws the methods as curves of one chart, since their folders hold scalars of the same names.
    """

    def __init__(self, folder: Path, *, first_step: int, manifest: Mapping[str, Any]) -> None:
        self._root = folder / "tensorboard"
        self._writers: dict[str | None, SummaryWriter] = {}
        self._step = first_step - 1
        if not self._root.exists():
            configuration = json.dumps(manifest["config"], indent=2, ensure_ascii=False)
            self._writer(None, 0).add_text("configuration", f"```json\n{configuration}\n```", 0)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one scalar for each number; NaN stays NaN."""
        point = Point.of(step, row)
        for key, value in point.numbers.items():
            self._writer(point.method, point.step).add_scalar(key, value, point.step)
        self._step = step

    def conclude(self, result: Mapping[str, Any], page: Path | None) -> None:
        """Writes verdict, methods and the page's path as text."""
        writer = self._writer(None, self._step + 1)  # forgets no row
        writer.add_text("result", _as_markdown(result), self._step)
        if page is not None:
            writer.add_text("page", f"`{page.resolve()}`", self._step)

    def close(self) -> None:
        """Flushes and closes the event files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, method: str | None, step: int) -> SummaryWriter:
        if method not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._root if method is None else self._root / re.sub(r"[^\w.+-]", "_", method)
            # Tells the reader to forget what an earlier process wrote from this step on.
            self._writers[method] = SummaryWriter(str(folder), purge_step=step)
        return self._writers[method]


class Trackio:
    """A run in trackio's local database (``trackio show`` opens it); nothing leaves the machine.

    Its name there stays in the folder. A resumed run is written anew from ``metrics.jsonl``: trackio stores in the
    background, so that nobody knows how far a killed process got, and what it has cannot be cut off at a step.
    """

    def __init__(self, folder: Path, *, first_step: int, manifest: Mapping[str, Any]) -> None:
        import trackio

        project = manifest.get("project", "preceptor")
        note = folder / "trackio-name"
        if not note.exists():
            replace_file(note, f"{manifest.get('name', folder.name)}-{secrets.token_hex(4)}")
        name = note.read_text().strip()
        with contextlib.suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(project):
                if run.name == name:
                    run.delete()
        with contextlib.redirect_stdout(sys.stderr):  # its greeting is no output of ours
            self._run = trackio.init(
                project=project,
                name=name,
                group=manifest.get("group"),
                config={**manifest["config"], "tags": list(manifest.get("tags", ()))},
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        if (metrics := folder / "metrics.jsonl").is_file():
            for row in read_jsonl(metrics):
                if row["step"] < first_step:
                    self.log(row["step"], row)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Stores the numbers of ``row``."""
        self._run.log(Point.of(step, row).prefixed(), step=step)

    def conclude(self, result: Mapping[str, Any], page: Path | None) -> None:
        """Stores verdict and methods as text."""
        import trackio

        self._run.log({"result": trackio.Markdown(_as_markdown(result))})

    def close(self) -> None:
        """Waits until everything is stored."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class WandB:
    """A run at Weights & Biases; its id stays in the folder, so that a resumed run goes on in the same chart."""

    def __init__(self, folder: Path, *, first_step: int, manifest: Mapping[str, Any]) -> None:
        import wandb

        note = folder / "wandb-id"
        if not note.exists():
            replace_file(note, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=manifest.get("project", "preceptor"),
                id=note.read_text().strip(),
                resume="allow",
                name=manifest.get("name", folder.name),
                group=manifest.get("group"),
                tags=list(manifest.get("tags", ())),
                dir=str(folder),
                config=dict(manifest["config"]),
            )
        except wandb.Error as error:
            raise ServiceError(
                f"W&B refused the run: {error}; log in with: wandb login, or leave the tracker out"
            ) from error
        # The service cannot take rows back. A resume repeats them bit for bit, so those it has are left out.
        self._next_step = int(self._run.step)
        self._methods: set[str] = set()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the numbers of ``row``, unless the service has this step."""
        point = Point.of(step, row)
        if point.method is not None and point.method not in self._methods:
            self._methods.add(point.method)
            # The x-axis of a method's charts is its own step, not the run's.
            self._run.define_metric(f"{point.method}/step", hidden=True)
            self._run.define_metric(f"{point.method}/*", step_metric=f"{point.method}/step")
        if step >= self._next_step:
            self._run.log(point.prefixed(), step=step)

    def conclude(self, result: Mapping[str, Any], page: Path | None) -> None:
        """Sends the verdict to the summary, and the table of methods and the page as one artifact."""
        import wandb

        self._run.summary["verdict"] = result.get("verdict", "")
        # An artifact takes up no step: a run that later goes on past its end still has its next one free.
        artifact = wandb.Artifact(f"result-{self._run.id}", type="result")
        artifact.add(wandb.Table(columns=list(TABLE), data=_table(result)), "methods")
        if page is not None:
            artifact.add_file(str(page))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


@dataclass(frozen=True)
class Point:
    """The numbers of one row, the method whose curves they belong to (``None``: the run's own), and where on them."""

    method: str | None
    step: int
    numbers: dict[str, float]

    @classmethod
    def of(cls, step: int, row: Mapping[str, Any]) -> Self:
        """The point of ``row``, written at ``step``.

        >>> Point.of(9, {"arm": "uniform", "arm_number": 4, "arm_step": 1, "loss": 2.5, "uniform": {"kl": 0.5}})
        Point(method='uniform', step=1, numbers={'loss': 2.5, 'kl': 0.5})
        >>> Point.of(9, {"step": 9, "loss": 2.5})
        Point(method=None, step=9, numbers={'loss': 2.5})
        """
        column = next((name for name in OWN_STEPS if name in row), None)
        if column is None or "arm" not in row:
            return cls(None, step, _numbers({key: value for key, value in row.items() if key != "step"}))
        method = str(row["arm"])
        rest = {key: row[key] for key in row if key not in ("step", "arm_number", *OWN_STEPS, method)}
        # What a row says of its own method under the method's name goes without that name.
        return cls(method, int(row[column]), _numbers(rest) | _numbers(row.get(method) or {}))

    def prefixed(self) -> dict[str, float]:
        """The numbers for a tracker with one set of names: ``METHOD/NAME``, and ``METHOD/step``."""
        if self.method is None:
            return self.numbers
        return {f"{self.method}/{key}": value for key, value in [*self.numbers.items(), ("step", self.step)]}


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


def _table(result: Mapping[str, Any]) -> list[list[Any]]:
    """Every method's metrics as rows of ``TABLE``, of the metrics that the result's own table has."""
    wanted = result.get("table")
    return [
        [method, metric, estimate["mean"], estimate["low"], estimate["high"], estimate["unit"]]
        for method, metrics in result.get("arms", {}).items()
        for metric, estimate in metrics.items()
        if wanted is None or metric in wanted
    ]


def _as_markdown(result: Mapping[str, Any]) -> str:
    """Verdict and table of methods."""
    lines = [str(result.get("verdict", "")), ""]
    if rows := _table(result):
        lines += ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
