"""A run of seconds that uses everything that has state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.systems.base import Services

STEPS = 4
SETTINGS = (
    "data.datasets=[{name: dialogue, location: 'builtin:dialogue'}, "
    "{name: noise, location: 'builtin:noise', target: false}]",
    "data.block_tokens=24",
    f"update.steps={STEPS}",
    "update.batch_tokens=96",
    "update.learning_rate=0.005",
    "update.warm_up_steps=1",
    "mixture.settings={threshold: 0.0}",
    "difficulty.every=2",
    "difficulty.refresh_every=2",
    "difficulty.sample_size=5",
    "ppo.prompts=3",
    "ppo.group_size=2",
    "ppo.prompt_tokens=4",
    "ppo.continuation_tokens=5",
    "ppo.rewards=[{name: repetition, weight: 1.0}, {name: log_likelihood, weight: 0.1}]",
    "value.width=16",
    "value.num_layers=1",
    "validation.every=2",
    "validation.rows=3",
    "validation.prompt_tokens=3",
    "controls.rules=[uniform]",
    "controls.static_grid=none",
    "save_every=1",
)
METHODS = ("learning_progress+ppo", "frozen_policy", "learning_progress", "uniform")
SERVICES = Services(cache_dir=Path("cache"))  # the system takes nothing from it
TIMING = {"seconds", "tokens_per_second", "peak_memory_mib"}


def arguments(model: Path, out: Path, changes: Sequence[str] = ()) -> list[str]:
    """The command line of the small run."""
    sets = [part for setting in (*SETTINGS, *changes) for part in ("--set", setting)]
    common = ["run", "curriculum", "--model", str(model), "--threads", "1", "--no-report", "--out", str(out)]
    return [*common, *sets]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without what depends on the clock."""
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in parsed]


def result_of(folder: Path) -> dict[str, Any]:
    """``result.json`` of a run."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
