"""What a system is to the rest of Preceptor: one object with its name, configuration, loop and everything made of it.

At the end, how its configuration is found: from a preset, a file, flags and overrides.

A system of your own is such an object too. Name it in the entry-point group ``preceptor.systems`` of your package, and
``preceptor run`` knows it::

    [project.entry-points."preceptor.systems"]
    mine = "my_package.mine:SYSTEM"

Nothing here imports torch, so that help and listings come at once: functions are given by :func:`lazy`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.resources
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from preceptor.config import from_dict, load_config, to_dict
from preceptor.errors import ConfigError, did_you_mean
from preceptor.strict_yaml import read_yaml, write_yaml

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


# ---- the configuration of a system -----------------------------------------------------------------------------------


def configuration(
    system: System,
    *,
    preset: str = "default",
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Any:
    """The configuration of ``system``; a later layer wins key by key.

    Args:
        system: whose configuration it is.
        preset: a name of :func:`presets`.
        file: a YAML file with the keys that differ.
        flags: values of the system's own flags (``{"article": "page.txt"}``).
        overrides: ``"a.b=value"`` each, or a mapping from dotted keys to values.

    Raises:
        ConfigError: with all faults of all layers together.
    """
    given = dict(flags or {})
    if strangers := given.keys() - system.flags.keys():
        name = sorted(strangers)[0]
        hint = did_you_mean(name, system.flags) or f"; its own are {', '.join(system.flags)}"
        raise ConfigError(f"{name!r} is no option of {system.name}{hint}")
    assignments = [_assignment(key, given[flag]) for flag, key in system.flags.items() if given.get(flag) is not None]
    if isinstance(overrides, Mapping):
        assignments += [_assignment(key, value) for key, value in overrides.items()]
    else:
        assignments += overrides
    known = presets(system)
    if preset not in known:
        hint = did_you_mean(preset[:100], known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"unknown preset {preset[:100]!r} of {system.name}{hint}")
    with importlib.resources.as_file(preset_folder(system) / f"{preset}.yaml") as path:
        layer = path if path.is_file() else None  # `default` needs no file: it is the defaults of the code
        return load_config(system.Config, preset=layer, file=file, overrides=assignments)


def extended_configuration(system: System, config: Any, overrides: Iterable[str] | Mapping[str, Any]) -> Any:
    """``config`` with ``overrides`` that let a run go on past its planned end.

    Raises:
        ConfigError: a key is not among ``system.extendable``, or its value is not above what it was.
    """
    if isinstance(overrides, Mapping):
        changed = dict(overrides)
    else:
        changed = {key: read_yaml(value).value for key, _, value in (text.partition("=") for text in overrides)}
    if refused := [key for key in changed if key not in system.extendable]:
        allowed = f"only {', '.join(system.extendable)} may" if system.extendable else "none may"
        raise ConfigError(
            f"`{refused[0]}` cannot change in a run of {system.name} that has begun, {allowed}; "
            "start a new run for anything else"
        )
    old = to_dict(config)
    new = copy.deepcopy(old)
    for key, value in changed.items():
        *sections, last = key.split(".")
        functools.reduce(operator.getitem, sections, new)[last] = value
    longer = from_dict(system.Config, new)
    for key, value in changed.items():
        before = functools.reduce(operator.getitem, key.split("."), old)
        if value <= before:
            raise ConfigError(
                f"`{key}` must be above {before}, which the run is planned with, got {value}; to go on to {before}, "
                "leave it out"
            )
    return longer


def _assignment(key: str, value: Any) -> str:
    """``key=value`` as it would be typed."""
    if isinstance(value, Path):
        value = str(value)
    return f"{key}={value if isinstance(value, str) else write_yaml(_plain(value))}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def preset_folder(system: System) -> Any:
    """Where the presets of a system lie: its own folder, or this package's."""
    return system.presets or importlib.resources.files("preceptor") / "presets" / system.name


def presets(system: System) -> dict[str, str]:
    """The presets of a system with the first line of comment of each; ``default`` is always among them."""
    folder = preset_folder(system)
    found = {"default": "the defaults"}
    for file in sorted(folder.iterdir(), key=lambda file: str(file.name)) if folder.is_dir() else ():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found
