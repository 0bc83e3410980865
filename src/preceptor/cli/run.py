"""``preceptor run | pretrain | resume | report | export``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.api import go_on, launched, services, start
from preceptor.cli import options
from preceptor.cli.parsing import SystemGroup, system_command
from preceptor.config import dump_yaml
from preceptor.result import Result, write_page
from preceptor.systems import find_system
from preceptor.systems.base import System, configuration


class RunGroup(SystemGroup):
    """``preceptor run SYSTEM``."""

    def made_for(self, word: str) -> Any:
        """The command that runs a system, or ConfigError with the nearest system that there is."""
        return run_command(find_system(word))


APP = typer.Typer(
    cls=RunGroup,
    rich_markup_mode=None,
    epilog=options.EXIT_CODES,
    help=f"""\
Train a system and measure what the training was worth.

`preceptor run SYSTEM --help` shows the options of a system.

{options.CONFIGURATION}""",
)


def pretrain() -> Any:
    """The command ``preceptor pretrain``: that system's, besides ``preceptor run pretrain``."""
    return run_command(find_system("pretrain"))


def run_command(system: System) -> Any:
    """The command that runs ``system``."""
    text = f"{system.summary[:1].upper()}{system.summary[1:]}.\n\n{options.CONFIGURATION}"
    return system_command(system, _run, system.flags, help=text, epilog=options.EXIT_CODES)


def _run(
    system: System,
    *,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    print_config: options.PrintConfig = False,
    out: options.Out = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tracker: options.Trackers = None,
    name: options.Name = None,
    tag: options.Tags = None,
    project: options.Project = "preceptor",
    group: options.Group = None,
    no_report: options.NoReport = False,
    log_level: options.LogLevel = "warning",
    **flags: Any,
) -> int:
    with launched(os.environ) as world:
        # Every fault of the configuration is reported before anything heavy is imported or written.
        resolved = configuration(system, preset=preset, file=config, flags=flags, overrides=overrides or ())
        if print_config:
            if world is None or world.is_first:
                print(dump_yaml(resolved), end="")
            return 0
        result = start(
            system,
            resolved,
            services(os.environ),
            preset=preset,
            out=out,
            device=device,
            threads=threads,
            trackers=tracker or (),
            name=name,
            tags=tag or (),
            project=project,
            group=group,
            report=not no_report,
            world=world,
        )
        return _show(result) if world is None or world.is_first else 0


def resume(
    folder: options.Folder,
    *,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Go on past the planned end: update.steps=60.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="D", help="Another device than before; needs --allow-inexact.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            parser=options.num_threads,
            help="Another number of CPU threads; needs --allow-inexact.",
            show_default=False,
        ),
    ] = None,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Go on though last bits (or more) will differ.")
    ] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html at the end.")] = False,
    log_level: options.LogLevel = "warning",
) -> int:
    """Go on with a run that was stopped, from its last checkpoint."""
    with launched(os.environ) as world:
        result = go_on(
            folder,
            services(os.environ),
            overrides=overrides or (),
            device=device,
            threads=threads,
            allow_inexact=allow_inexact,
            report=not no_report,
            world=world,
        )
        return _show(result) if world is None or world.is_first else 0


def report(
    folder: options.Folder,
    *,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Also write the page's charts as SVG files.", show_default=False),
    ] = None,
) -> int:
    """Write report.html, one self-contained page about a run."""
    print(f"report:  {write_page(folder)}")
    if figures is not None:
        from preceptor.report.svg import write_figures

        print(f"figures: {len(write_figures(folder, figures))} in {figures}")
    return 0


def export(
    folder: options.Folder,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into the weights of its base.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", metavar="NAME", help="Also upload it to the hub as user/model.", show_default=False
        ),
    ] = None,
) -> int:
    """Write the model that a run trained, as Transformers loads it."""
    from preceptor.runs.export import export_model
    from preceptor.runs.export import push_to_hub as push

    written = export_model(folder, to, merge=merge)
    print(f"model:   {written}")
    if push_to_hub is not None:
        print(f"hub:     {push(written, push_to_hub)}")
    return 0


def _show(result: Result) -> int:
    """The table of methods, the details of the verdict, and at the end its first sentence and where everything lies."""
    from rich.console import Console

    # Rich draws the tables at the terminal's width; the plain lines below can be copied and parsed.
    console = Console()
    for table in result.renderables(width=console.width):
        console.print(table)
    if result.verdict:
        details = result.verdict.removeprefix(result.headline).strip()
        print(f"\n{details}\n\n{result.headline}\n" if details else f"\n{result.headline}\n")
    print(f"results: {result.folder}")
    if (result.folder / "report.html").is_file():
        print(f"report:  {result.folder / 'report.html'}")
    return 0
