"""Preceptor: use RL to steer how a language model trains, and measure against strong baselines how much it helps.

>>> import preceptor
>>> result = preceptor.run("reading", preset="smoke", out=folder)  # doctest: +SKIP
>>> print(result.order)  # doctest: +SKIP
>>> model = result.model()  # doctest: +SKIP

What is listed in ``__all__`` is the public interface, which follows Semantic Versioning; so are the run folder's files,
``preceptor.objectives`` and ``preceptor.mixtures``. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.version import __version__

if TYPE_CHECKING:
    import preceptor.mixtures as mixtures
    from preceptor.result import Result
    from preceptor.systems.base import Services
    from preceptor.systems.surgery.repair import Repair
    from preceptor.systems.surgery.theater import SurgicalTheater

__all__ = ["Result", "SurgicalTheater", "__version__", "compare", "load", "mixtures", "repair", "resume", "run"]

_LAZY = {"Result": "preceptor.result", "SurgicalTheater": "preceptor.systems.surgery.theater"}


def run(
    system: str,
    *,
    preset: str = "default",
    config: str | Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    trackers: Sequence[str] = (),
    name: str | None = None,
    tags: Sequence[str] = (),
    project: str = "preceptor",
    group: str | None = None,
    report: bool = True,
    quiet: bool = False,
    **flags: Any,
) -> Result:
    """Trains a system and measures what the training was worth.

    Args:
        system: ``reading``, ``curriculum``, ``surgery``, ``bandit``, ``pretrain``, or one that a package brings.
        preset: a named configuration; ``preceptor list`` names them.
        config: a YAML file with the keys that differ from the preset.
        overrides: single keys, ``{"update.steps": 60}`` or ``["update.steps=60"]``; they win over all else.
        out: the run folder to make; ``runs/SYSTEM-DATE-N`` by default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        threads: CPU threads; another number gives other last bits. By default as many as there are cores.
        trackers: ``tensorboard``, ``wandb``, ``trackio``, besides ``metrics.jsonl``.
        name: what trackers and the page call the run; the folder's name by default.
        tags: of the run, for trackers and the page.
        project: where trackers put the run.
        group: of runs that trackers show together, such as the seeds of a comparison.
        report: write ``report.html`` at the end.
        quiet: show no progress.
        **flags: the system's own: ``model="path/to/model"``, ``article="page.txt"``, ``seed=3``, …

    Raises:
        preceptor.errors.PreceptorError: of the kind that says what is wrong, in one line.
    """
    from preceptor import api
    from preceptor.systems import find_system
    from preceptor.systems.base import configuration

    with api.launched(os.environ) as world:
        chosen = find_system(system)
        file = None if config is None else Path(config)
        resolved = configuration(chosen, preset=preset, file=file, flags=flags, overrides=overrides)
        return api.start(
            chosen,
            resolved,
            _services(),
            preset=preset,
            out=None if out is None else Path(out),
            device=device,
            threads=threads,
            trackers=trackers,
            name=name,
            tags=tags,
            project=project,
            group=group,
            report=report,
            quiet=quiet,
            world=world,
        )


def resume(
    folder: str | Path,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    device: str | None = None,
    threads: int | None = None,
    allow_inexact: bool = False,
    quiet: bool = False,
) -> Result:
    """Goes on with the run in ``folder`` from its last checkpoint, to the same numbers bit for bit.

    ``overrides`` lets it go on past its planned end (``{"update.steps": 60}``); no other key may change. Another
    ``device`` or number of ``threads`` needs ``allow_inexact``.
    """
    from preceptor import api

    with api.launched(os.environ) as world:
        return api.go_on(
            Path(folder),
            _services(),
            overrides=overrides,
            device=device,
            threads=threads,
            allow_inexact=allow_inexact,
            quiet=quiet,
            world=world,
        )


def compare(*folders: str | Path, methods: Sequence[str] = (), out: str | Path | None = None) -> Result:
    """Compares finished runs of one system: paired differences over seeds and inputs, and what may be claimed.

    Runs whose configurations differ in seed and input alone are one set of methods; where anything else differs, each
    configuration's methods are methods of their own.

    Args:
        *folders: of finished runs, or of a sweep that ``preceptor compare SYSTEM --seeds 0-9 --out DIR`` made.
        methods: the first is compared with each other one; by default as in a run.
        out: folder for ``comparison.json``, ``result.json`` and the page; ``runs/comparison-DATE-N`` by default.
    """
    from preceptor import api

    return api.compare([Path(folder) for folder in folders], methods=methods, out=None if out is None else Path(out))


def repair(
    model: str,
    *,
    surgeon: str | Path,
    text: str | Path,
    out: str | Path | None = None,
    evaluations: int = 3,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> Repair:
    """Repairs a model in a few edits of its attention, each accepted by a test on text the surgeon has not seen.

    Args:
        model: ``starter`` or a model folder, which is left as it is.
        surgeon: folder of a finished ``preceptor run surgery --preset planted``.
        text: a file of text that the model should predict.
        out: where the repaired model goes; ``MODEL-repaired`` by default.
        evaluations: edits that may be tried.
        seed: of the windows of text.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        threads: CPU threads.
    """
    from preceptor import api

    return api.repair(
        model,
        surgeon=Path(surgeon),
        text=Path(text),
        out=None if out is None else Path(out),
        evaluations=evaluations,
        seed=seed,
        device=device,
        threads=threads,
    )


def load(folder: str | Path) -> Result:
    """The result of the finished run, or of the comparison, in ``folder``."""
    from preceptor.result import Result

    return Result(folder)


def _services() -> Services:
    """What systems and environments take from the surroundings of this process."""
    from preceptor import api

    return api.services(os.environ)


def __getattr__(name: str) -> Any:
    import importlib

    if name == "mixtures":
        return importlib.import_module("preceptor.mixtures")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'preceptor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
