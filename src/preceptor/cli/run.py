"""``preceptor run | resume | report | pretrain``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

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
from preceptor.cli.systems import PRETRAINING, config_class, configuration, module_of, needs_of, system_named
from preceptor.config import dump_yaml, from_dict, to_dict
from preceptor.errors import Interrupted, PreceptorError
from preceptor.run.trackers import TRACKERS
from preceptor.systems import SYSTEMS, SystemInfo


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``run``."""
    parser.add_argument("system", metavar="SYSTEM", help=f"one of: {', '.join(SYSTEMS)}")
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
    parser.add_argument("--allow-inexact", action="store_true", help="resume though last bits (or more) will differ")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html at the end")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="write the page's charts here too, as SVG files")


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _begin(system_named(options.system), options.system, options, environ)


def _pretrain(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _begin(PRETRAINING, "pretrain", options, environ)


def _begin(system: SystemInfo, name: str, options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    config = configuration(system, name, options)
    if options.print_config:
        print(dump_yaml(config), end="")
        return 0
    from preceptor.run.folder import create_run, default_run_path, discard_unbegun

    path: Path = options.out or default_run_path(Path("runs"), name, date.today())
    try:
        run = create_run(
            path,
            system=name,
            config=to_dict(config),
            seed=config.seed,
            save_every=config.save_every,
            streams=module_of(system, "train").STREAMS,
            device=options.device,
            threads=options.threads,
            trackers=options.tracker,
        )
    except PreceptorError:
        if options.out is None:
            with contextlib.suppress(OSError):  # no longer empty: then it holds something to look at
                path.rmdir()
        raise
    try:
        return _train(system, config, run, environ, report=not options.no_report)
    except Interrupted:
        raise
    except PreceptorError:
        discard_unbegun(path)  # an article or a model that was refused must not block the next try
        raise


def _resume(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from preceptor.run.folder import open_run

    run = open_run(options.folder, allow_inexact=options.allow_inexact, device=options.device, threads=options.threads)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(run.close)
        name = run.manifest["system"]
        system = PRETRAINING if name == "pretrain" else system_named(name)
        config = from_dict(config_class(system), run.config)
        on_failure.pop_all()
    return _train(system, config, run, environ, report=not options.no_report)


def _train(system: SystemInfo, config: Any, run: Any, environ: Mapping[str, str], *, report: bool) -> int:
    with run:
        result = module_of(system, "train").train(config, run, **needs_of(system, environ))
        run.write_result(result)
    _show(result)
    print(f"results: {run.path}")
    return _write_page(run.path) if report else 0


def _show(result: Mapping[str, Any]) -> None:
    """The arms as a table and the verdict below it, where a result has them."""
    if "arms" in result:
        from rich.console import Console

        from preceptor.report.arms import Arms
        from preceptor.report.table import arms_table

        Console().print(arms_table(Arms.of(result), title=f"{result['system']}: every arm"))
    if "verdict" in result:
        print(f"\n{result['verdict']}\n")


def _report(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    _write_page(options.folder)
    if options.figures is not None:
        from preceptor.report.svg import write_figures

        print(f"figures: {len(write_figures(options.folder, options.figures))} in {options.figures}")
    return 0


def _write_page(folder: Path) -> int:
    from preceptor.report.page import build_report

    print(f"report:  {build_report(folder)}")
    return 0


RUN = Command(
    "train a system and measure what the training was worth", add_run, _run, epilog=f"{CONFIGURATION}\n{EXIT_CODES}"
)
RESUME = Command("go on with a run that was stopped, from its last checkpoint", _add_resume, _resume)
REPORT = Command("write report.html, one self-contained page about a run", _add_report, _report)
PRETRAIN = Command(
    PRETRAINING.description, _add_pretrain, _pretrain, epilog=CONFIGURATION.replace("run SYSTEM", "pretrain")
)
