"""``preceptor compare``: seeds × inputs as processes, or finished runs, and what may be claimed of their arms."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.cli import launching, options
from preceptor.cli.launching import configuration_of_run
from preceptor.cli.parsing import PassingCommand, SystemGroup, made, system_command
from preceptor.config import to_dict
from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import System

if TYPE_CHECKING:
    from preceptor.comparison.cells import Cell
    from preceptor.comparison.runs import FinishedRun

HELP = """\
Compare arms over seeds and inputs, or finished runs.

\b
  preceptor compare reading --seeds 0-9 --articles A.txt B.txt --out runs/all
  preceptor compare reading --seeds 0-9 --set update.steps=60 --out runs/ten
  preceptor compare reading --seeds 0-9 --out runs/ten -- --model DIR
  preceptor compare runs/a runs/b runs/c

With a system it runs every seed on every input, several runs at a time with one thread each; words after -- are options
of `preceptor run` for each of them. Started again with the same words it runs what is missing, and it may be killed at
any moment. The runs are processes of this machine, tasks of a Ray cluster (--launcher ray) or jobs of Slurm
(--launcher slurm), and --print lists them for any other scheduler; the comparison is the same.

With folders of finished runs (or of a sweep) it compares these: runs whose configurations differ in seed and input
alone are one set of arms, and where anything else differs each configuration has arms of its own.
"""
EPILOG = f"""\
DIR then holds comparison.json (arms, paired differences, intervals, verdict), result.json and report.html (all runs as
one), seconds.json (how long each run took), and of a sweep a folder for every run and logs/.

{options.EXIT_CODES}"""

Arms = Annotated[
    str,
    typer.Option(
        "--arms",
        metavar="A,B,...",
        help="Compare the first of these arms with each other one.  [default: as in a run]",
        autocompletion=options.arms_completed,
        show_default=False,
    ),
]
Destination = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder of the comparison.", show_default=False)
]


class CompareGroup(SystemGroup):
    """``preceptor compare SYSTEM`` and ``preceptor compare RUN...``."""

    metavar = "SYSTEM|RUN..."

    def made_for(self, word: str) -> Any:
        """The command that sweeps a system, or that compares finished runs, the first of them ``word``."""
        if word in known_systems():  # a folder named like a system is given as ./reading
            system = find_system(word)
            settings = {"cls": PassingCommand, "help": HELP, "epilog": EPILOG}
            return system_command(system, _sweep, system.inputs, several=True, **settings)
        if Path(word).is_dir():
            return made(_compared(Path(word)), name=word, help=HELP, epilog=EPILOG)
        hint = did_you_mean(word[:100], known_systems()) or f"; there are {', '.join(known_systems())}"
        raise ConfigError(f"{short_repr(word)} is neither a folder nor a system{hint}")


APP = typer.Typer(cls=CompareGroup, rich_markup_mode=None, help=HELP, epilog=EPILOG)


def _compared(first: Path) -> Any:
    def compared(
        folders: Annotated[
            list[Path] | None, typer.Argument(metavar="RUN", help="Further finished runs.", show_default=False)
        ] = None,
        *,
        arms: Arms = "",
        out: Destination = None,
        log_level: options.LogLevel = "warning",
    ) -> int:
        from preceptor.comparison.runs import read_finished, run_folders

        # A folder that holds runs, such as a sweep's, stands for all of them.
        runs = [read_finished(path) for path in run_folders([first, *(folders or [])])]
        return _conclude(runs, arms=_names(arms), out=out)

    return compared


def _sweep(
    system: System,
    *,
    context: typer.Context,
    seeds: Annotated[
        list[str] | None, typer.Option("--seeds", metavar="N|N-M", help="Such as 0-9, or 1 5 7.", show_default=False)
    ] = None,
    preset: options.Preset = "default",
    overrides: options.Overrides = None,
    arms: Arms = "",
    out: Destination = None,
    launcher: launching.Launcher = "local",
    jobs: launching.Jobs = None,
    cpus: launching.Cpus = None,
    gpus: launching.Gpus = None,
    memory: launching.Memory = None,
    address: launching.Address = None,
    slurm: launching.Slurm = None,
    print_cells: Annotated[
        bool,
        typer.Option(
            "--print",
            help="List the missing runs as shell commands, for any other scheduler, and stop.",
            rich_help_panel=launching.PANEL,
        ),
    ] = False,
    log_level: options.LogLevel = "warning",
    **given: list[str] | None,
) -> int:
    from preceptor.comparison.runs import read_finished
    from preceptor.comparison.sweep import run_cells

    launch = launching.launch_of(launcher, jobs=jobs, cpus=cpus, gpus=gpus, memory=memory, address=address, slurm=slurm)
    if out is None:
        raise ConfigError("a sweep needs a folder; give --out DIR")
    inputs = {flag: values for flag, values in given.items() if values is not None}
    passed = [*context.meta["passed"], *(f"--set={setting}" for setting in overrides or ())]
    cells = _cells(system, inputs, seeds=_seeds(seeds or []), preset=preset, passed=passed)
    _check_arms(system, _names(arms))
    if print_cells:
        return _print_cells(cells, out)
    with launching.launched(launch, out, device=launching.device_of(cells[0].arguments), say=_say) as its:
        run_cells(cells, out, say=_say, launcher=its)
    return _conclude([read_finished(out / cell.name) for cell in cells], arms=_names(arms), out=out)


def _say(text: str) -> None:
    print(text, flush=True)


def _print_cells(cells: Sequence[Cell], out: Path) -> int:
    """The runs that are missing, a line each on the standard output and nothing else there, so that it can be piped."""
    from preceptor.comparison.cells import check_folder, is_finished, shell_line

    for cell in cells:
        check_folder(out / cell.name, cell)
    missing = [cell for cell in cells if not is_finished(out / cell.name)]
    for cell in missing:
        print(shell_line(cell, out))
    note = f"{len(missing)} of {len(cells)} runs are missing; when all have ended, the same command without --print "
    print(f"preceptor: {note}compares them", file=sys.stderr)
    return 0


def _cells(
    system: System, inputs: Mapping[str, Sequence[str]], *, seeds: Sequence[int], preset: str, passed: Sequence[str]
) -> list[Cell]:
    """Every seed on every input, each with its whole configuration, so that a fault is found before anything runs."""
    from preceptor.comparison.cells import Cell

    cells: list[Cell] = []
    # An input that is given twice would be the same run twice.
    combinations = product(*(dict.fromkeys(given) for given in inputs.values()))
    for values, seed in product(combinations, seeds):
        # One thread each: several runs share the cores, and a fixed number keeps their results exact.
        words = ["--preset", preset, *passed, "--seed", str(seed), "--threads", "1"]
        for flag, value in zip(inputs, values, strict=True):
            words += ["--set", f"{system.inputs[flag]}={value}"]
        config = configuration_of_run(system, words)
        # Folder names in characters that every file system takes.
        stems = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(value).stem)[:40] for value in values]
        name = "-".join([f"seed{seed}", *stems])
        # Inputs may share a stem (a/x.txt and b/x.txt); the later one gets a number.
        number = sum(cell.name == name or cell.name.startswith(f"{name}~") for cell in cells)
        name += f"~{number + 1}" if number else ""
        cells.append(Cell(name, to_dict(config), (system.name, *words)))
    return cells


def _seeds(words: Sequence[str]) -> list[int]:
    # A dictionary keeps the order given and drops repetitions.
    seeds: dict[int, None] = {}
    for word in [part for given in words for part in given.split(",") if part]:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
        # At most 10,001 seeds in a range: a slip of the finger should not ask for a billion runs.
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or 0) - int(match[1]) > 10_000:
            raise ConfigError(f"--seeds must be numbers or ranges such as 0-9, got {short_repr(word)}")
        seeds |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not seeds:
        raise ConfigError("a sweep needs seeds; give --seeds 0-9")
    return list(seeds)


def _names(arms: str) -> list[str]:
    return [arm.strip() for arm in arms.split(",") if arm.strip()]


def _check_arms(system: System, arms: Sequence[str]) -> None:
    """Refuse a misspelled arm before hours of runs, where the system says which arms there are."""
    known = system.choices.get("arms", {})
    for arm in arms:
        if known and arm not in known:
            hint = did_you_mean(arm[:100], known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{system.name} has no arm {short_repr(arm)}{hint}")


def _conclude(runs: Sequence[FinishedRun], *, arms: Sequence[str], out: Path | None) -> int:
    from rich.console import Console

    from preceptor.api import compared
    from preceptor.comparison.table import comparison_tables

    comparison, result = compared(runs, methods=arms, out=out)
    console = Console()
    print(f"{runs[0].system}: {len(runs)} runs, {len(comparison['seeds'])} seeds")
    for table in comparison_tables(comparison):
        console.print(table)
    print(f"\n{comparison['verdict']}\n")
    if result is not None:
        print(f"results: {result.folder / 'comparison.json'}")
        print(f"report:  {result.folder / 'report.html'}")
    return 0
