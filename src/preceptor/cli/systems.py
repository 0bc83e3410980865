"""What the command line makes of a system: its configuration from options, its presets, its services."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from preceptor.errors import ConfigError
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import System
from preceptor.systems.configuration import configuration as system_configuration


def systems() -> dict[str, System]:
    """Every system by name, imported."""
    return {name: find_system(name) for name in known_systems()}


def configuration(system: System, options: argparse.Namespace) -> Any:
    """The configuration that ``options`` ask for: preset, file, options that stand for keys, ``--set``."""
    given = {flag: value for flag, value in vars(options).items() if value is not None}
    flags = system.flags
    for flag in {flag for other in systems().values() for flag in other.flags} & given.keys() - flags.keys():
        raise ConfigError(f"--{flag.replace('_', '-')} is no option of {system.name}; its own are {_spelled(flags)}")
    own = {flag: given[flag] for flag in flags if flag in given}
    return system_configuration(system, preset=options.preset, file=options.config, flags=own, overrides=options.set)


def _spelled(flags: Mapping[str, str]) -> str:
    return ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
