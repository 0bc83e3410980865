"""What the command line makes of a system: its configuration from options, its presets, its services."""

from __future__ import annotations

import argparse
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.config import load_config
from preceptor.errors import ConfigError, nearest
from preceptor.plain_yaml import shown, write_flow
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import Services, System


def systems() -> dict[str, System]:
    """Every system by name, imported."""
    return {name: find_system(name) for name in known_systems()}


def configuration(system: System, options: argparse.Namespace) -> Any:
    """The configuration that ``options`` ask for: preset, file, options that stand for keys, ``--set``."""
    given = {flag: value for flag, value in vars(options).items() if value is not None}
    flags = system.flags
    for flag in {flag for other in systems().values() for flag in other.flags} & given.keys() - flags.keys():
        raise ConfigError(f"--{flag.replace('_', '-')} is no option of {system.name}; its own are {_spelled(flags)}")
    overrides = [
        f"{key}={value if isinstance(value := given[flag], str) else write_flow(value)}"
        for flag, key in flags.items()
        if flag in given
    ]
    overrides += options.set
    known = presets(system)
    if options.preset not in known:
        hint = nearest(options.preset[:100], known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"unknown preset {shown(options.preset)} of {system.name}{hint}")
    with importlib.resources.as_file(preset_folder(system) / f"{options.preset}.yaml") as preset:
        layer = preset if preset.is_file() else None  # `default` needs no file: it is the defaults of the code
        return load_config(system.Config, preset=layer, file=options.config, overrides=overrides)


def _spelled(flags: Mapping[str, str]) -> str:
    return ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)


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


def services(environ: Mapping[str, str]) -> Services:
    """What systems take from the environment."""
    return Services(
        cache_dir=cache_dir(environ),
        openai_api_key=environ.get("OPENAI_API_KEY"),
        openai_base_url=environ.get("OPENAI_BASE_URL"),
    )


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where downloads and bought embeddings are kept: PRECEPTOR_CACHE_DIR, else the XDG cache folder."""
    if own := environ.get("PRECEPTOR_CACHE_DIR"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "preceptor"
