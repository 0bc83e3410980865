"""``preceptor list``: what can be run, and what can be chosen."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from preceptor.systems import find_system, known_systems
from preceptor.systems.base import presets


def _systems(incomplete: str) -> list[str]:
    return [name for name in known_systems() if name.startswith(incomplete)]


def list_choices(
    system: Annotated[
        str | None,
        typer.Argument(metavar="[SYSTEM]", help="This system alone.", show_default=False, autocompletion=_systems),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> int:
    """Name the systems and what can be chosen in each, a line each."""
    # A system that is named is loaded alone.
    chosen = {name: find_system(name) for name in (known_systems() if system is None else [system])}
    everything = {name: {"presets": presets(each), **each.choices} for name, each in chosen.items()}
    if as_json:
        described = {name: {"description": chosen[name].summary, **kinds} for name, kinds in everything.items()}
        print(json.dumps(described, indent=2, ensure_ascii=False))
        return 0
    for name, kinds in everything.items():
        print(f"{name:<12}{chosen[name].summary}")
        for kind, choices in kinds.items():
            if choices:
                print(f"  {kind}")
            for choice, summary in choices.items():
                print(f"    {choice:<21} {summary}")
    return 0
