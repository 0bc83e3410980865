"""``preceptor list``: what can be run, and what can be chosen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from preceptor.cli.arguments import Command
from preceptor.cli.systems import PRETRAINING, choices_of, presets, system_named
from preceptor.systems import SYSTEMS

DESCRIPTION = """\
Names the systems, and of each its presets, arms, rewards, rules and embedders, a line each.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", metavar="SYSTEM", nargs="?", help="this system alone (default: all)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def _list(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    systems = {**SYSTEMS, "pretrain": PRETRAINING}
    if options.system is not None and options.system not in systems:
        system_named(options.system)  # raises, with the nearest name
    chosen = {name: system for name, system in systems.items() if options.system in (None, name)}
    everything = {name: {"presets": presets(name), **choices_of(system)} for name, system in chosen.items()}
    if options.json:
        described = {name: {"description": chosen[name].description, **kinds} for name, kinds in everything.items()}
        print(json.dumps(described, indent=2, ensure_ascii=False))
        return 0
    for name, kinds in everything.items():
        print(f"{name:<12}{chosen[name].description}")
        for kind, choices in kinds.items():
            if choices:
                print(f"  {kind}")
            for choice, summary in choices.items():
                print(f"    {choice:<21} {summary}")
    return 0


LIST = Command(
    "name the systems and what can be chosen in each, a line each", _add_arguments, _list, DESCRIPTION, epilog=""
)
