"""The four kinds of curriculum run: on datasets, on tasks with a verifier, of a teacher over tasks, in planted worlds.

Each has its loop, its result and its check; which one a configuration asks for is decided here and nowhere else. A
kind's modules are imported when it is asked for: reading a result needs none of what trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Replayed, Services
    from preceptor.systems.curriculum.config import CurriculumConfig


def kind_of(config: Mapping[str, Any]) -> str:
    """``planted``, ``teacher``, ``tasks`` or ``datasets``; runs of earlier versions lack the first two sections.

    >>> kind_of({"tasks": {"tasks": [{"name": "add"}]}, "amortised": {"steps": 0}})
    'tasks'
    """
    if config.get("planted", {}).get("worlds"):
        return "planted"
    if not config.get("tasks", {}).get("tasks"):
        return "datasets"
    return "teacher" if config.get("amortised", {}).get("steps") else "tasks"


def train(config: CurriculumConfig, run: Run, services: Services) -> dict[str, Any]:
    """Runs what ``config`` asks for inside ``run``; gives ``result.json``."""
    kind = kind_of(config.model_dump())
    if kind == "planted":
        from preceptor.systems.curriculum.planted import play_worlds

        return play_worlds(config, run)
    if kind == "teacher":
        from preceptor.systems.curriculum.tasks.amortised import train_teacher

        return train_teacher(config, run)
    if kind == "tasks":
        from preceptor.systems.curriculum.tasks.loop import train_on_tasks

        return train_on_tasks(config, run, services)
    from preceptor.systems.curriculum.loop import train_on_datasets

    return train_on_datasets(config, run, services)


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """``result.json`` of one run, or of several of one kind, from their records."""
    kind = kind_of(config)
    if kind == "planted":
        from preceptor.systems.curriculum.planted import planted_result as of_records
    elif kind == "teacher":
        from preceptor.systems.curriculum.tasks.judged import judged_result as of_records
    elif kind == "tasks":
        from preceptor.systems.curriculum.tasks.result import task_result as of_records
    else:
        from preceptor.systems.curriculum.result import result as of_records
    return of_records(records, config=config, seeds=seeds)


def verify(config: CurriculumConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """What was recorded beside the same numbers computed again, on the CPU.

    Args:
        config: of the run.
        folder: of the run.
        services: not used.

    Raises:
        DataError: a decision is of a method that the configuration does not have.
    """
    kind = kind_of(config.model_dump())
    if kind == "planted":
        from preceptor.systems.curriculum.planted import verify_worlds as again
    elif kind == "teacher":
        from preceptor.systems.curriculum.tasks.amortised import verify_teacher as again
    elif kind == "tasks":
        from preceptor.systems.curriculum.tasks.verify import verify_tasks as again
    else:
        from preceptor.systems.curriculum.verify import verify_datasets as again
    yield from again(config, folder)
