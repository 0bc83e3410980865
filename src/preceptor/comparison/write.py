"""The files of a comparison, each replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.comparison.runs import FinishedRun
from preceptor.errors import ConfigError
from preceptor.run.files import replace_file, storage_errors
from preceptor.run.strict_json import row_json


def write_comparison(
    folder: Path, comparison: Mapping[str, Any], merged: Mapping[str, Any], runs: Sequence[FinishedRun]
) -> None:
    """``comparison.json``, ``result.json`` of all runs as one, and ``seconds.json`` beside them.

    Raises :class:`ConfigError` for a folder that is a run itself, whose own result would be lost.
    """
    if (folder / "manifest.json").exists():
        raise ConfigError(f"{folder} is a run of its own; choose another --out for the comparison")
    with storage_errors(f"create {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    taken = {run.path.name: run.seconds for run in runs}
    seconds = {
        "what": "seconds of training steps; no two runs share them, so they are no part of the comparison",
        "total": sum(value or 0.0 for value in taken.values()),
        "runs": taken,
    }
    for name, content in (("result", merged), ("comparison", comparison), ("seconds", seconds)):
        text = json.dumps(json.loads(row_json(content)), indent=2, ensure_ascii=False)
        replace_file(folder / f"{name}.json", text + "\n")
