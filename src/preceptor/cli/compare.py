"""``preceptor compare``: seeds × inputs as processes, or finished runs, and what may be claimed of their arms."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.cli.arguments import EXIT_CODES, Command, Parser
from preceptor.cli.run import add_run
from preceptor.cli.systems import configuration, systems
from preceptor.config import to_dict
from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.systems import find_system, known_systems

if TYPE_CHECKING:
    from preceptor.comparison.runs import FinishedRun
    from preceptor.comparison.sweep import Cell

DESCRIPTION = """\
Compares arms over seeds and inputs.

  preceptor compare reading --preset smoke --seeds 0-9 --articles A.txt B.txt --out runs/sweep
  preceptor compare reading --seeds 0-9 --out runs/sweep -- --set update.steps=60
  preceptor compare runs/a runs/b runs/c

With a system it runs every seed on every input, several runs at a time with one thread each, and words after `--` are
options of `preceptor run` for each of them. Started again with the same words it runs what is missing; it may be killed
at any moment. With folders of finished runs (or of a sweep) it compares these: runs whose configurations differ in seed
and input alone are one set of arms, and where anything else differs each configuration's arms are arms of their own.
"""
EPILOG = f"""\
DIR then holds comparison.json (arms, paired differences, intervals, verdict), result.json and report.html (all runs as
one), seconds.json (what each run took, which is nobody's result), and of a sweep a folder for every run and logs/.

{EXIT_CODES}"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="SYSTEM | RUN", nargs="+", help=f"one of: {', '.join(known_systems())}; or run folders"
    )
    parser.add_argument(
        "--arms", metavar="A,B,...", help="the first is compared with each other (default: as in a run)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the sweep, or for the comparison of runs")
    group = parser.add_argument_group("a sweep")
    group.add_argument("--preset", metavar="NAME", default="default", help="a named configuration; see preceptor list")
    group.add_argument("--seeds", metavar="N|N-M", nargs="+", default=[], help="such as 0-9, or 1 5 7")
    for option, (owners, key) in _input_options().items():
        text = f"{', '.join(owners)}: a run for each value of {key}"
        group.add_argument(f"--{option.replace('_', '-')}", dest=option, metavar="X", nargs="+", default=[], help=text)
    group.add_argument("--jobs", metavar="N", type=_num_jobs, help="runs at a time (default: by cores and memory)")


def _input_options() -> dict[str, tuple[list[str], str]]:
    """Options of systems whose every value makes a run, with the systems that have them and the key."""
    options: dict[str, tuple[list[str], str]] = {}
    for name, system in systems().items():
        for option, key in system.inputs.items():
            options.setdefault(option, ([], key))[0].append(name)
    return options


def _num_jobs(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 4 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {short_repr(text)}")
    return int(text)


def _compare(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from preceptor.comparison.runs import read_finished, run_folders

    first = options.what[0]
    # A folder named like a system is given as ./reading.
    if first in known_systems():
        if len(options.what) > 1:
            raise ConfigError(f"unexpected argument {short_repr(options.what[1])}; a sweep is of one system, {first}")
        return _compare_system(first, options)
    if not Path(first).is_dir():
        hint = did_you_mean(first[:100], known_systems()) or f"; there are {', '.join(known_systems())}"
        raise ConfigError(f"{short_repr(first)} is neither a folder nor a system{hint}")
    given = [name for name in (*_input_options(), "seeds", "passed") if getattr(options, name)]
    if given:
        raise ConfigError(f"--{given[0]} belongs to a sweep; give a system instead of folders")
    runs = [read_finished(path) for path in run_folders([Path(path) for path in options.what])]
    return _conclude(runs, options)


def _compare_system(name: str, options: argparse.Namespace) -> int:
    from preceptor.comparison.runs import read_finished
    from preceptor.comparison.sweep import run_cells

    if options.out is None:
        raise ConfigError("a sweep needs a folder; give --out DIR")
    cells = _cells(name, options)
    _check_arms(name, _arms(options))
    run_cells(cells, options.out, num_jobs=options.jobs, say=lambda text: print(text, flush=True))
    return _conclude([read_finished(options.out / cell.name) for cell in cells], options)


def _cells(name: str, options: argparse.Namespace) -> list[Cell]:
    """Every seed on every input, each with its whole configuration, so that a fault is found before anything runs."""
    from preceptor.comparison.sweep import Cell

    system = find_system(name)
    inputs = system.inputs
    for option in _input_options():
        if getattr(options, option) and option not in inputs:
            raise ConfigError(f"--{option} is no option of {name}")
    own = [option for option in inputs if getattr(options, option)]
    seeds = _seeds(options.seeds)
    cells: list[Cell] = []
    for *values, seed in product(*(dict.fromkeys(getattr(options, option)) for option in own), seeds):
        words = [name, "--preset", options.preset, *options.passed, "--seed", str(seed), "--threads", "1"]
        for option, value in zip(own, values, strict=True):
            words += ["--set", f"{inputs[option]}={value}"]
        parsed = _run_options(words)
        stems = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(value).stem)[:40] for value in values]
        cell_name = "-".join([f"seed{seed}", *stems])
        number = sum(cell.name == cell_name or cell.name.startswith(f"{cell_name}~") for cell in cells)
        cell_name += f"~{number + 1}" if number else ""
        cells.append(Cell(cell_name, to_dict(configuration(system, parsed)), tuple(words)))
    return cells


def _run_options(words: Sequence[str]) -> argparse.Namespace:
    """``words`` as options of ``preceptor run``, which must leave to the sweep what is the sweep's."""
    parser = Parser(prog="preceptor run", allow_abbrev=False, add_help=False)
    add_run(parser)
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        raise ConfigError(f"unexpected argument {short_repr(unknown[0])} after --; see preceptor run --help")
    for flag in ("--seed", "--threads", "--preset"):
        if sum(word == flag or word.startswith(f"{flag}=") for word in words) > 1:
            raise ConfigError(f"{flag} cannot stand after --; a sweep gives it to each run")
    if parsed.out is not None or parsed.print_config:
        raise ConfigError("--out and --print-config cannot stand after --; a sweep has a folder for each run")
    return parsed


def _seeds(words: Sequence[str]) -> list[int]:
    seeds: dict[int, None] = {}
    for word in [part for given in words for part in given.split(",") if part]:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or 0) - int(match[1]) > 10_000:
            raise ConfigError(f"--seeds must be numbers or ranges such as 0-9, got {short_repr(word)}")
        seeds |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not seeds:
        raise ConfigError("a sweep needs seeds; give --seeds 0-9")
    return list(seeds)


def _arms(options: argparse.Namespace) -> list[str]:
    return [arm.strip() for arm in (options.arms or "").split(",") if arm.strip()]


def _check_arms(name: str, arms: Sequence[str]) -> None:
    """Refuse a misspelled arm before hours of runs, where the system says which arms there are."""
    known = find_system(name).choices.get("arms", {})
    for arm in arms:
        if known and arm not in known:
            hint = did_you_mean(arm[:100], known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{name} has no arm {short_repr(arm)}{hint}")


def _conclude(runs: Sequence[FinishedRun], options: argparse.Namespace) -> int:
    from rich.console import Console

    from preceptor.api import compared
    from preceptor.comparison.table import comparison_tables

    comparison, result = compared(runs, methods=_arms(options), out=options.out)
    console = Console()
    print(f"{runs[0].system}: {len(runs)} runs, {len(comparison['seeds'])} seeds")
    for table in comparison_tables(comparison):
        console.print(table)
    print(f"\n{comparison['verdict']}\n")
    if result is not None:
        print(f"results: {result.folder / 'comparison.json'}")
        print(f"report:  {result.folder / 'report.html'}")
    return 0


COMPARE = Command(
    "run arms over seeds and inputs, or take finished runs, and say what may be claimed",
    _add_arguments,
    _compare,
    description=DESCRIPTION,
    epilog=EPILOG,
    passes_on=True,
)
