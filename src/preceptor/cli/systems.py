"""What belongs to a system, found by its name: its configuration class, options, presets and surroundings."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.config import load_config
from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.strict_yaml import write_yaml
from preceptor.systems import SYSTEMS, SystemInfo

PRETRAINING = SystemInfo("preceptor.pretraining", "PretrainConfig", "train a small language model from text files")


def system_named(name: str) -> SystemInfo:
    """The system called ``name``; raises :class:`ConfigError` with the nearest that there is."""
    if name not in SYSTEMS:
        hint = did_you_mean(name[:100], SYSTEMS) or f"; there are {', '.join(SYSTEMS)}"
        raise ConfigError(f"unknown system {short_repr(name)}{hint}")
    return SYSTEMS[name]


def module_of(system: SystemInfo, name: str) -> Any:
    """The module ``name`` (``config``, ``train``, …) of a system."""
    return importlib.import_module(f"{system.module}.{name}")


def config_class(system: SystemInfo) -> Any:
    """The class of a system's configuration."""
    return getattr(module_of(system, "config"), system.config)


def flags_of(system: SystemInfo) -> Mapping[str, str]:
    """Options of a system that stand for configuration keys."""
    flags: Mapping[str, str] = getattr(module_of(system, "config"), "FLAGS", {"seed": "seed"})
    return flags


def inputs_of(system: SystemInfo) -> Mapping[str, str]:
    """Options of ``preceptor compare`` whose every value makes a run, each with the key that it sets."""
    inputs: Mapping[str, str] = getattr(module_of(system, "config"), "INPUTS", {})
    return inputs


def choices_of(system: SystemInfo) -> Mapping[str, Mapping[str, str]]:
    """What ``preceptor list`` shows of a system besides its presets: kind, then name and line."""
    choices: Mapping[str, Mapping[str, str]] = getattr(module_of(system, "config"), "CHOICES", {})
    return choices


def configuration(system: SystemInfo, name: str, options: argparse.Namespace) -> Any:
    """The configuration that ``options`` ask for: preset, file, options that stand for keys, ``--set``."""
    given = {flag: value for flag, value in vars(options).items() if value is not None}
    flags = flags_of(system)
    for flag in {flag for other in SYSTEMS.values() for flag in flags_of(other)} & given.keys() - flags.keys():
        raise ConfigError(f"--{flag.replace('_', '-')} is no option of {name}; its own are {_spelled(flags)}")
    overrides = [
        f"{key}={value if isinstance(value := given[flag], str) else write_yaml(value)}"
        for flag, key in flags.items()
        if flag in given
    ]
    overrides += options.set
    known = presets(name)
    if options.preset not in known:
        hint = did_you_mean(options.preset[:100], known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"unknown preset {short_repr(options.preset)} of {name}{hint}")
    with importlib.resources.as_file(preset_folder(name) / f"{options.preset}.yaml") as preset:
        layer = preset if preset.is_file() else None  # `default` needs no file: it is the defaults of the code
        return load_config(config_class(system), preset=layer, file=options.config, overrides=overrides)


def _spelled(flags: Mapping[str, str]) -> str:
    return ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)


def preset_folder(name: str) -> Any:
    """Where the presets of a system lie inside the package."""
    return importlib.resources.files("preceptor") / "presets" / name


def presets(name: str) -> dict[str, str]:
    """The presets of a system with the first line of comment of each; ``default`` is always among them."""
    folder = preset_folder(name)
    found = {"default": "the defaults"}
    for file in sorted(folder.iterdir(), key=lambda file: str(file.name)) if folder.is_dir() else ():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def needs_of(system: SystemInfo, environ: Mapping[str, str]) -> dict[str, Any]:
    """What a system's ``train`` and ``replay`` take from the environment."""
    surroundings = {"cache_dir": cache_dir(environ), "openai_api_key": environ.get("OPENAI_API_KEY")}
    return {need: surroundings[need] for need in system.needs}


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where downloads and bought embeddings are kept: PRECEPTOR_CACHE_DIR, else the XDG cache folder."""
    if own := environ.get("PRECEPTOR_CACHE_DIR"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "preceptor"
