"""The weights of tasks' levels computed again from the recorded groups, without the policy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

from preceptor.errors import DataError
from preceptor.objectives.task_rules import Groups
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.base import Replayed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.tasks.state import mixture_of


def verify_tasks(config: CurriculumConfig, folder: Path) -> Iterator[Replayed]:
    """Each recorded weight beside the same weight computed again.

    The oracle is left out: what it was told is not among the groups.

    Raises:
        DataError: a decision is of a rule that the configuration does not have.
    """
    tasks = config.tasks
    rows = (row for row in read_jsonl(folder / "decisions.jsonl") if row["kind"] == "groups")
    for rule, rule_rows in groupby(rows, key=lambda row: row["arm"]):
        if rule not in (tasks.rule, *tasks.controls):
            raise DataError(f"{folder / 'decisions.jsonl'} has the rule {rule}, which is not in the configuration")
        mixture = mixture_of(config, rule, folder=folder)
        if mixture.rule.asks_for_success:
            continue
        for row in rule_rows:
            groups = Groups(
                sources=torch.tensor(row["sources"]),
                success=torch.tensor(row["success"], dtype=torch.float64),
                advantage=torch.tensor(row["advantage"], dtype=torch.float64),
                size=row["group_size"],
            )
            weights = mixture.update(groups, progress=row["progress"])
            for source, (recorded, weight) in enumerate(zip(row["weights"], weights.tolist(), strict=True)):
                yield Replayed(f"{rule}, step {row['step']}, weight of source {source + 1}", recorded, weight)
