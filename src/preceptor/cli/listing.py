"""``preceptor list``: what can be run, and what can be chosen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from preceptor.cli.arguments import Command
from preceptor.systems import find_system, known_systems
from preceptor.systems.configuration import presets

DESCRIPTION = """\
Names the systems, and of each its presets, arms, rewards, rules and embedders, a line each.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", metavar="SYSTEM", nargs="?", help="this system alone (default: all)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def _list(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    names = known_systems() if options.system is None else [options.system]
    chosen = {name: find_system(name) for name in names}
    everything = {name: {"presets": presets(system), **system.choices} for name, system in chosen.items()}
    if options.json:
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


LIST = Command(
    "name the systems and what can be chosen in each, a line each", _add_arguments, _list, DESCRIPTION, epilog=""
)
