"""``preceptor run | resume | report | pretrain``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from preceptor.api import go_on, services, start
from preceptor.cli.arguments import (
    COMMON_FLAGS,
    CONFIGURATION,
    EXIT_CODES,
    Command,
    add_configuration,
    add_device,
    add_system_flags,
    num_threads,
)
from preceptor.cli.systems import configuration
from preceptor.config import dump_yaml
from preceptor.result import Result, write_page
from preceptor.run.trackers import TRACKERS
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import System


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``run``."""
    parser.add_argument("system", metavar="SYSTEM", help=f"one of: {', '.join(known_systems())}")
    add_configuration(parser)
    add_system_flags(parser)
    _add_execution(parser)


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument("--seed", metavar="N", help=COMMON_FLAGS["seed"])
    _add_execution(parser)


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument("--out", metavar="DIR", type=Path, help="run folder to make (default: runs/SYSTEM-DATE-N)")
    add_device(group)
    text = f"{', '.join(TRACKERS)}; besides metrics.jsonl"
    group.add_argument("--tracker", metavar="T", nargs="+", action="extend", default=[], help=text)
    group.add_argument("--no-report", action="store_true", help="do not write report.html at the end")


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")
    parser.add_argument("--device", metavar="D", help="another device than before; needs --allow-inexact")
    parser.add_argument(
        "--threads", metavar="N", type=num_threads, help="another number of threads; needs --allow-inexact"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="go on past the planned end: update.steps=60"
    )
    parser.add_argument("--allow-inexact", action="store_true", help="resume though last bits (or more) will differ")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html at the end")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _begin(find_system(options.system), options, environ)


def _pretrain(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _begin(find_system("pretrain"), options, environ)


def _begin(system: System, options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    config = configuration(system, options)
    if options.print_config:
        print(dump_yaml(config), end="")
        return 0
    result = start(
        system,
        config,
        services(environ),
        out=options.out,
        device=options.device,
        threads=options.threads,
        trackers=options.tracker,
        report=not options.no_report,
    )
    return _show(result)


def _resume(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    result = go_on(
        options.folder,
        services(environ),
        overrides=options.set,
        device=options.device,
        threads=options.threads,
        allow_inexact=options.allow_inexact,
        report=not options.no_report,
    )
    return _show(result)


def _show(result: Result) -> int:
    """The table of methods, the verdict below it, and where everything lies."""
    from rich.console import Console

    console = Console()
    for table in result.renderables():
        console.print(table)
    if result.verdict:
        print(f"\n{result.verdict}\n")
    print(f"results: {result.folder}")
    if (result.folder / "report.html").is_file():
        print(f"report:  {result.folder / 'report.html'}")
    return 0


def _report(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _write_page(options.folder)


def _write_page(folder: Path) -> int:
    print(f"report:  {write_page(folder)}")
    return 0


RUN = Command(
    "train a system and measure what the training was worth", add_run, _run, epilog=f"{CONFIGURATION}\n{EXIT_CODES}"
)
RESUME = Command("go on with a run that was stopped, from its last checkpoint", _add_resume, _resume)
REPORT = Command("write report.html, one self-contained page about a run", _add_report, _report)
PRETRAIN = Command(
    "train a small language model from text files",
    _add_pretrain,
    _pretrain,
    epilog=CONFIGURATION.replace("run SYSTEM", "pretrain"),
)
