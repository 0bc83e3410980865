"""From a preset, a file, flags and overrides to a system's configuration."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preceptor.config import from_dict, load_config, to_dict
from preceptor.errors import ConfigError, did_you_mean
from preceptor.strict_yaml import read_yaml, write_yaml
from preceptor.systems.base import System


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
            raise ConfigError(f"`{key}` must be above {before}, which the run was planned with, got {value}")
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
