"""Finished runs as they are read back, and which of them measured the same thing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.config import from_dict, to_dict
from preceptor.errors import ConfigError, DataError, StorageError
from preceptor.runs.environment import flattened
from preceptor.runs.files import storage_errors
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.record import read_manifest, require_unchanged
from preceptor.systems import find_system

TIMES = ("seconds",)
"""Metrics that no two runs share: they are told, and stay out of what is compared."""


class FinishedRun(NamedTuple):
    """What a comparison takes from a run's folder."""

    path: Path
    system: str
    config: dict[str, Any]
    seed: int
    code: str
    result: dict[str, Any]
    records: list[dict[str, Any]]
    seconds: float | None  # of training, summed over its steps; None where the metrics do not say


class Group(NamedTuple):
    """Runs whose configurations differ in their seed and their input alone."""

    label: str  # what sets the group apart from the first one, empty where there is one group
    runs: list[FinishedRun]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for run in self.runs for record in run.records]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


def read_finished(path: Path) -> FinishedRun:
    """The finished run in ``path``.

    Raises :class:`ConfigError` for a folder that is no run or a run that has not ended, :class:`StorageError` for one
    that is damaged or has changed since it ended, :class:`DataError` for a result without records.
    """
    # manifest.json is written first and result.json last, so the two tell "no run" and "not ended" apart.
    if not (path / "manifest.json").is_file():
        raise ConfigError(f"{path} is not a run folder (no manifest.json); give the folders of finished runs")
    manifest = read_manifest(path)
    if not (path / "result.json").is_file():
        raise ConfigError(f"{path} has not ended (no result.json); go on with: preceptor resume {path}")
    require_unchanged(path)
    with storage_errors(f"read {path / 'result.json'}"):
        text = (path / "result.json").read_bytes()
    try:
        result = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{path / 'result.json'} is damaged ({error}); restore it from a copy") from error
    records = result.get("records") if isinstance(result, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or not records:
        raise DataError(f"{path / 'result.json'} has no records of arms; runs of {manifest['system']} have no controls")
    return FinishedRun(
        path=path,
        system=str(manifest["system"]),
        config=current_config(str(manifest["system"]), manifest["config"]),
        seed=int(manifest["seed"]),
        code=str(manifest["code"].get("commit")),
        result=result,
        # Seconds differ between two runs of the same seed, and would make equal results unequal.
        records=[{key: value for key, value in record.items() if key not in TIMES} for record in records],
        seconds=_seconds(path / "metrics.jsonl"),
    )


def current_config(name: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A run's ``recorded`` configuration with the keys of today: old names renamed, later keys at their defaults.

    It stays as it is where the system called ``name`` is not installed or no longer accepts it.
    """
    with contextlib.suppress(ConfigError):
        return to_dict(from_dict(find_system(name).Config, recorded))
    # An uninstalled system, or keys that it no longer takes: the record itself is all there is.
    return dict(recorded)


def _seconds(metrics: Path) -> float | None:
    rows = [row["seconds"] for row in read_jsonl(metrics) if isinstance(row.get("seconds"), int | float)]
    return float(sum(rows)) if rows else None


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """``paths`` with every folder that is no run, but holds some (a sweep's), replaced by them."""
    folders = []
    # A folder with runs inside, such as a sweep's, stands for its runs; one level down and no further.
    for path in paths:
        inside = sorted(manifest.parent for manifest in path.glob("*/manifest.json"))
        folders += inside if inside and not (path / "manifest.json").is_file() else [path]
    return folders


def grouped(runs: Sequence[FinishedRun], *, inputs: Sequence[str]) -> list[Group]:
    """Runs by configuration; ``inputs`` are the keys that name what a run is about, which groups may mix.

    Runs of one group are merged into one set of records. Where configurations differ in anything else, each becomes a
    group with a label, such as ``update.learning_rate=1e-05``, and its arms are arms of their own.

    Raises :class:`ConfigError` for runs of several systems, and for two runs of a group that measured the same cell.
    """
    if len(systems := sorted({run.system for run in runs})) > 1:
        raise ConfigError(f"only runs of one system can be compared, got {' and '.join(systems)}")
    shared = {"seed", *inputs}
    kinds: dict[str, list[FinishedRun]] = {}
    for run in runs:
        # The configuration without seed and input, as text, identifies the group.
        own = {key: value for key, value in flattened(run.config).items() if key not in shared}
        kinds.setdefault(json.dumps(own, sort_keys=True), []).append(run)
    flat = [flattened(members[0].config) for members in kinds.values()]
    # Only keys that differ go into the labels, so that they stay readable.
    differing = [
        key for key in flat[0] if key not in shared and any(other.get(key) != flat[0][key] for other in flat[1:])
    ]
    groups = [
        Group(", ".join(f"{key}={_shown(config.get(key))}" for key in differing), members)
        for config, members in zip(flat, kinds.values(), strict=True)
    ]
    for group in groups:
        _check_cells(group)
    return groups


def _check_cells(group: Group) -> None:
    owner: dict[tuple[Any, ...], Path] = {}
    for run in group.runs:
        for record in run.records:
            cell = tuple(record.get(key) for key in ("arm", "item", "split", "seed"))
            first = owner.setdefault(cell, run.path)
            # Seed None marks what does not depend on the seed (an oracle); every run measures that again, to the same
            # result.
            if first != run.path and record.get("seed") is not None:
                raise ConfigError(
                    f"{first} and {run.path} both measured arm {cell[0]!r} on item {cell[1]!r} with seed {cell[3]}; "
                    "leave one out, or run it with another seed"
                )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).strip('"') or "''"


def merged_records(group: Group) -> list[dict[str, Any]]:
    """The group's records, one a cell: what is the same under every seed (seed null) is taken once."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in group.records:
        # setdefault keeps the first of several equal ones.
        cells.setdefault(tuple(record.get(key) for key in ("arm", "item", "split", "seed")), record)
    return list(cells.values())


def shared_config(runs: Sequence[FinishedRun]) -> Mapping[str, Any]:
    """The first run's configuration: that of all but for seed and input."""
    return runs[0].config
