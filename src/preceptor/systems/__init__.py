"""The systems that Preceptor can run, by name: its own, and those that other packages name as entry points.

Each package here defines a ``SYSTEM``; it is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from preceptor.errors import ConfigError, did_you_mean
from preceptor.systems.base import System

GROUP = "preceptor.systems"
"""Entry-point group in which other packages name their systems."""

OWN = {
    "reading": "preceptor.systems.reading:SYSTEM",
    "bandit": "preceptor.systems.bandit:SYSTEM",
    "curriculum": "preceptor.systems.curriculum:SYSTEM",
    "surgery": "preceptor.systems.surgery:SYSTEM",
    "pretrain": "preceptor.pretraining:SYSTEM",
}


@cache
def known_systems() -> dict[str, str]:
    """Where the system of each name is found (``"package.module:SYSTEM"``); nothing is imported."""
    # Preceptor's own names come first and cannot be taken over.
    return OWN | {point.name: point.value for point in entry_points(group=GROUP) if point.name not in OWN}


def find_system(name: str) -> System:
    """The system called ``name``.

    Raises ``ConfigError`` with the nearest name that there is, or for an entry point that names no such system.
    """
    targets = known_systems()
    if name not in targets:
        hint = did_you_mean(name[:100], targets) or f"; there are {', '.join(targets)}"
        raise ConfigError(f"unknown system {name[:100]!r}{hint}")
    module, _, attribute = targets[name].partition(":")
    try:
        system = getattr(importlib.import_module(module), attribute or "SYSTEM")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"system {name!r} cannot be imported from {targets[name]}: {error}") from error
    if not isinstance(system, System) or system.name != name:
        raise ConfigError(f"{targets[name]} must be a System called {name!r}, got {system!r:.80}")
    return system
