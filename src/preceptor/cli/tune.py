"""``preceptor tune``: a search over a configuration's values, and what may be said of the best one found."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.cli import launching, options
from preceptor.cli.launching import configuration_of_run
from preceptor.cli.parsing import PassingCommand, SystemGroup, system_command
from preceptor.config import schema, to_dict
from preceptor.errors import ConfigError, short_repr
from preceptor.systems import find_system
from preceptor.systems.base import System
from preceptor.tuning.space import Dimension, parsed_search

if TYPE_CHECKING:
    from preceptor.comparison.cells import Cell
    from preceptor.tuning.search import Outcome, Search

HELP = """\
Search a configuration's values for the best metric.

\b
  preceptor tune reading --search update.learning_rate=1e-6:1e-3:log \\
    --metric reward --trials 30 --out runs/tuned
  preceptor tune bandit --search update.baseline=none,bandit_mean \\
    --metric reward --trials 12 --out runs/tuned -- --device cpu

Every trial is a run. The first ten trials are drawn at random, later ones where earlier ones did well (Optuna's TPE). A
trial's value is the mean of the metric over its last ten rows of metrics.jsonl; after five trials, one whose value is
below the median of the others at the same step is stopped. Words after -- are options of `preceptor run` for each
trial. Started again with the same words it takes up what was stopped, and with more --trials it goes on.

The best of many trials is lucky as well as good, so that its value is biased. The search ends in the command that
measures it on fresh seeds; report that number.
"""
EPILOG = f"""\
DIR then holds tune.json (every trial), trials.journal (Optuna's record), logs/ and a folder for every trial.

{options.EXIT_CODES}"""

NUM_JOBS = 4
"""Trials at a time on a cluster: more at once means that each is proposed from less."""

NUM_FRESH = 10
"""Seeds of the comparison that the search ends in."""


class TuneGroup(SystemGroup):
    """``preceptor tune SYSTEM``."""

    def made_for(self, word: str) -> Any:
        """The command that searches the values of a system's configuration."""
        return system_command(find_system(word), _tune, {}, cls=PassingCommand, help=HELP, epilog=EPILOG)


APP = typer.Typer(cls=TuneGroup, rich_markup_mode=None, help=HELP, epilog=EPILOG)


def _searched(ctx: typer.Context, incomplete: str) -> list[str]:
    system = options.system_of(ctx)
    return [f"{key}=" for key in schema(system.Config) if key.startswith(incomplete)] if system else []


def _tune(
    system: System,
    *,
    context: typer.Context,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="KEY=RANGE",
            help="KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B,C; several, or repeated.",
            autocompletion=_searched,
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="A metric of metrics.jsonl, such as reward.", show_default=False),
    ] = None,
    direction: Annotated[
        str,
        typer.Option(
            "--direction",
            metavar="D",
            help="Whether more of it is better (max) or less (min).",
            autocompletion=lambda incomplete: [name for name in ("max", "min") if name.startswith(incomplete)],
        ),
    ] = "max",
    trials: Annotated[str, typer.Option("--trials", metavar="N", help="Trials to be tried in all.")] = "20",
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of every trial, and of what is proposed.")] = "0",
    preset: options.Preset = "default",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of it.", show_default=False)] = None,
    launcher: launching.Launcher = "local",
    jobs: launching.Jobs = None,
    cpus: launching.Cpus = None,
    gpus: launching.Gpus = None,
    memory: launching.Memory = None,
    address: launching.Address = None,
    slurm: launching.Slurm = None,
    log_level: options.LogLevel = "warning",
) -> int:
    # Every fault of the words is found here, before Optuna is imported or anything is written.
    launch = launching.launch_of(launcher, jobs=jobs, cpus=cpus, gpus=gpus, memory=memory, address=address, slurm=slurm)
    space = parsed_search(search or [], system.Config)
    faults = []
    if not metric:
        faults.append("a search needs what to judge by; give --metric NAME (docs/metrics.md lists them)")
    if direction not in ("max", "min"):
        faults.append(f"--direction must be max or min, got {short_repr(direction)}")
    if not (trials.isdecimal() and len(trials) <= 5 and int(trials) >= 1):
        faults.append(f"--trials must be a whole number from 1, got {short_repr(trials)}")
    if not (seed.isdecimal() and len(seed) <= 9):
        faults.append(f"--seed must be a whole number from 0, got {short_repr(seed)}")
    if out is None:
        faults.append("a search needs a folder; give --out DIR")
    if faults or out is None or metric is None:
        raise ConfigError(*faults)
    passed = context.meta["passed"]
    words = ["--preset", preset, *passed, "--seed", seed, "--threads", "1"]
    _check_corners(system, words, space)

    from preceptor.tuning.search import Plan, Search

    def cell_of(number: int, values: Mapping[str, Any]) -> Cell:
        from preceptor.comparison.cells import Cell

        own = [*words, *_set(space, values)]
        return Cell(f"trial{number:04}", to_dict(configuration_of_run(system, own)), (system.name, *own))

    plan = Plan(system.name, metric, direction == "max", space, tuple(words), int(seed))
    if launch.num_jobs is None and launch.name != "local":
        launch = launch._replace(num_jobs=NUM_JOBS)
    device = launching.device_of((system.name, *words))
    found = Search(plan, out, cell_of)
    try:
        with launching.launched(launch, out, device=device, say=_say) as its:
            found.run(int(trials), its, say=_say)
        _conclude(found, preset=preset, passed=passed)
    finally:
        found.close()
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _set(space: Sequence[Dimension], values: Mapping[str, Any]) -> list[str]:
    return [word for dimension in space for word in ("--set", dimension.assignment(values[dimension.key]))]


def _check_corners(system: System, words: Sequence[str], space: Sequence[Dimension]) -> None:
    """Refuse a range that the configuration does not allow, before any trial runs."""
    for dimension in space:
        for corner in dimension.corners():
            configuration_of_run(system, [*words, "--set", dimension.assignment(corner)])


def _conclude(search: Search, *, preset: str, passed: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from preceptor.tuning.search import best

    plan, outcomes = search.plan, search.outcomes()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    table.add_column("")
    table.add_column(Text(plan.metric), justify="right")
    table.add_column("steps", justify="right")
    for dimension in plan.space:
        table.add_column(Text(dimension.key.replace(".", ".\n")), justify="right", overflow="fold")
    for outcome in outcomes:
        value = "-" if outcome.value is None else f"{outcome.value:.4g}"
        values = [_shown(outcome.values[dimension.key]) for dimension in plan.space]
        table.add_row(str(outcome.number), outcome.state, value, str(outcome.steps), *map(Text, values))
    Console().print(table)
    print(f"trials:  {search.write()}")
    if (found := best(outcomes)) is None:
        print("\nNo trial ran to its end, so that there is nothing to recommend.")
        return
    print(f"\n{_verdict(plan.metric, outcomes, found)}\n")
    # The same words as the trial's own, but for the seed and the threads, which are the trial's.
    chosen = ["--preset", preset, *passed, *_set(plan.space, found.values)]
    print(f"run it:      {shlex.join(['preceptor', 'run', plan.system, *chosen])}")
    seeds = f"{plan.seed + 1}-{plan.seed + NUM_FRESH}"
    fresh, usual = (
        search.root.with_name(f"{search.root.name}-fresh"),
        search.root.with_name(f"{search.root.name}-usual"),
    )
    sweep = ["preceptor", "compare", plan.system, "--seeds", seeds, "--preset", preset, "--out"]
    print(f"measure it:  {shlex.join([*sweep, str(fresh), '--', *passed, *_set(plan.space, found.values)])}")
    print(f"beside:      {shlex.join([*sweep, str(usual), *(['--', *passed] if passed else [])])}")
    print(f"and compare: {shlex.join(['preceptor', 'compare', str(fresh), str(usual)])}")


def _verdict(metric: str, outcomes: Sequence[Outcome], found: Outcome) -> str:
    """What may be said of the best trial."""
    counts = Counter(outcome.state for outcome in outcomes)
    states = ", ".join(f"{counts[state]} {state}" for state in ("finished", "pruned", "failed") if counts[state])
    trials = f"{len(outcomes)} trials ({states})"
    if len(outcomes) == 1:
        return f"One trial was tried, under one seed: {metric} {found.value:.4g}."
    return (
        f"The best of {trials} is trial {found.number}, with {metric} {found.value:.4g}. That number is biased: all "
        f"trials had one seed, and the best of {len(outcomes)} is the luckiest as well as the best. What the "
        "configuration is worth is measured on fresh seeds."
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
