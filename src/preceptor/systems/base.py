"""What a system is to the rest of Preceptor: one object with its name, configuration, loop and everything made of it.

A system of your own is such an object too. Name it in the entry-point group ``preceptor.systems`` of your package, and
``preceptor run`` knows it::

    [project.entry-points."preceptor.systems"]
    mine = "my_package.mine:SYSTEM"

Nothing here imports torch, so that help and listings come at once: functions are given by :func:`lazy`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from preceptor.report.run_folder import RunFolder
    from preceptor.report.sections import Section
    from preceptor.runs.folder import Run


@dataclass(frozen=True)
class Services:
    """What a system takes from its surroundings; the command line and :func:`preceptor.runs` read the environment.

    Attributes:
        cache_dir: downloads and bought embeddings.
        openai_api_key: of the openai embedder, if there is one.
        openai_base_url: where that embedder's requests go, if not to the SDK's own default.
        vllm_api_key: of the vLLM server that writes rollouts, if it asks for one.
    """

    cache_dir: Path
    openai_api_key: str | None = None
    openai_base_url: str | None = None
    vllm_api_key: str | None = None


class Replayed(NamedTuple):
    """One recorded number beside the same number computed again from the recorded decisions alone."""

    where: str  # such as "step 3, episode 17"
    recorded: float
    recomputed: float


class Train(Protocol):
    """A system's loop: trains inside ``run``, measures every baseline, and gives what ``result.json`` says."""

    def __call__(self, config: Any, run: Run, services: Services) -> dict[str, Any]: ...


class Result(Protocol):
    """``result.json`` from records (a baseline's metrics on an item under a seed), of one run or of many."""

    def __call__(
        self, records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
    ) -> dict[str, Any]: ...


class Lazy(str):
    """``"package.module:function"``, in a :class:`System` in place of the function, imported when it is asked for."""

    def resolve(self) -> Any:
        """The function."""
        module, _, name = self.partition(":")
        return getattr(importlib.import_module(module), name)


def lazy(target: str) -> Any:
    """``target`` as a :class:`Lazy`, of whatever type the function has."""
    return Lazy(target)


@dataclass(frozen=True)
class System:
    """A teacher, a student, a reward and controls that can be run, resumed, compared, reported and replayed.

    Attributes:
        name: on the command line and in run folders.
        summary: one line.
        Config: class of the configuration, a frozen model with ``seed`` and ``save_every`` (steps) among its keys.
        streams: names of the random streams that ``train`` draws from.
        train: the loop.
        result: what records amount to; None for a system without controls, whose runs cannot be compared.
        sections: what the page shows of a run besides what it shows of every run.
        verify: recorded decisions executed again without the policy; None where nothing is recorded.
        flags: options of the command line that stand for configuration keys (``{"article": "data.article"}``).
        inputs: options of ``preceptor compare`` whose every value makes a run, and the key that each sets.
        choices: what ``preceptor list`` shows: kind → name → line.
        extendable: keys that ``preceptor resume --set`` may raise to go on past the planned end.
        presets: folder of the preset files; None is the package's own.
        distributed: whether ``train`` can run on many processes (``run.world``); others are refused there.
    """

    name: str
    summary: str
    Config: Any
    streams: tuple[str, ...]
    train: Train
    result: Result | None = None
    sections: Callable[[RunFolder], list[Section]] | None = None
    verify: Callable[[Any, Path, Services], Iterator[Replayed]] | None = None
    flags: Mapping[str, str] = field(default_factory=lambda: {"seed": "seed"})
    inputs: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    extendable: tuple[str, ...] = ()
    presets: Path | None = None
    distributed: bool = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value.resolve() if isinstance(value, Lazy) else value
