"""Recorded runs, whose decisions the environments must pay alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preceptor.cli import main

READING = {"data.num_pairs": 4, "data.num_probes": 1, "episode.query_tokens": 2}
QUICK = {
    **READING, "update.steps": 3, "evaluation.every": 0, "evaluation.num_episodes": 2, "evaluation.num_orders": 3,
    "evaluation.best_of": 1, "evaluation.beam_width": 1,
}  # fmt: skip
STUDY = {"study.num_train_pools": 1, "study.num_eval_pools": 1, "study.mode": "asked"}


def recorded(folder: Path, system: str, *options: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The decisions of a run made now."""
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    arguments = ["run", system, *options, "--out", str(folder), "--threads", "1", "--no-report", *sets]
    assert main(arguments) == 0
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


def read_pairs(decision: dict[str, Any]) -> list[int]:
    """The order that a decision of reading records."""
    return [span["pair"] for span in decision["policy_spans"] if span["kind"] == "value"]
