"""The files of a comparison, each replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.comparison.runs import FinishedRun, grouped
from preceptor.errors import ConfigError
from preceptor.report.run_folder import RunFolder
from preceptor.report.sections import Section
from preceptor.report.seeds import merged_charts
from preceptor.runs.environment import flattened
from preceptor.runs.files import replace_file, storage_errors
from preceptor.runs.folder import FORMAT
from preceptor.runs.metrics import row_json


def write_comparison(
    folder: Path,
    comparison: Mapping[str, Any],
    merged: Mapping[str, Any],
    runs: Sequence[FinishedRun],
    *,
    sections: Callable[[RunFolder], list[Section]] | None = None,
) -> None:
    """``comparison.json``, ``result.json`` of all runs as one with their charts, and ``seconds.json`` beside them.

    ``sections`` are those of the system, which name its curves.

    Raises :class:`ConfigError` for a folder that is a run itself, whose own result would be lost.
    """
    # A run's result.json has the same name as a comparison's and must never be overwritten.
    if (folder / "manifest.json").exists():
        raise ConfigError(f"{folder} is a run of its own; choose another --out for the comparison")
    with storage_errors(f"create {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    groups = grouped(runs, inputs=_inputs(comparison, runs))
    folders = [(group.label, run.path) for group in groups for run in group.runs]
    merged = {**merged, "charts": merged_charts(folders, sections)}
    # Kept out of comparison.json, which must not depend on how fast the machine was.
    taken = {run.path.name: run.seconds for run in runs}
    seconds = {
        "what": "seconds of training steps; no two runs share them, so they are no part of the comparison",
        "total": sum(value or 0.0 for value in taken.values()),
        "runs": taken,
    }
    for name, content in (("result", merged), ("comparison", comparison), ("seconds", seconds)):
        # Through the strict writer first: NaN becomes null, and what is no JSON is an error. Then indented for people.
        text = json.dumps(json.loads(row_json({"format": FORMAT, **content})), indent=2, ensure_ascii=False)
        replace_file(folder / f"{name}.json", text + "\n")


def _inputs(comparison: Mapping[str, Any], runs: Sequence[FinishedRun]) -> list[str]:
    """The keys in which runs of one group differ: all that differ at all, but for those that a group's label names."""
    configs = [flattened(run.config) for run in runs]
    named = {part.partition("=")[0] for group in comparison["groups"] for part in group["label"].split(", ")}
    differing = [key for key in configs[0] if any(config.get(key) != configs[0][key] for config in configs)]
    return [key for key in differing if key not in named]
