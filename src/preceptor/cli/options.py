"""Options that several commands share, with their help and what the shell can complete."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor.config import schema
from preceptor.errors import PreceptorError, short_repr
from preceptor.runs.trackers import TRACKERS
from preceptor.systems import find_system
from preceptor.systems.base import presets

VARIABLE = "_PRECEPTOR_COMPLETE"
"""Environment variable by which a shell's completion asks the program what can come next."""
EXIT_CODES = """\
\b
exit codes:
  0    done
  1    a bug of Preceptor; the traceback says where
  2    bad input: an argument, a configuration, an article, a model, a package
       that is not installed
  3    numbers stayed NaN or infinite
  4    the run folder is in use by another process
  5    something could not be written or read: full disk, permissions, damage
  6    a remote service failed, refused the key, or its budget is spent
  7    a check failed: a replay that differs from the record, or a fault that
       doctor found
  8    of a run on many processes, one was killed; the others ended too
  130  stopped by Ctrl-C (143: by SIGTERM); what was saved is kept, and
       `preceptor resume RUN` goes on
"""
CONFIGURATION = """\
A configuration has four layers, and a later one wins key by key: the defaults, the preset, the file given with
--config, and on the command line first the options that stand for a key, then --set in the order written.
`--print-config > mine.yaml` writes every key with its help; edit it and pass it with --config.
"""
_CONFIGURATION, _EXECUTION = "Configuration", "Execution"


def system_of(context: typer.Context) -> Any:
    """The system that a half-typed command is about, if it is known already."""
    # Half a word is no error while it is being typed.
    try:
        return find_system(str(context.info_name))
    except PreceptorError:
        return None


def _presets(ctx: typer.Context, incomplete: str) -> list[str]:
    system = system_of(ctx)
    return [name for name in presets(system) if name.startswith(incomplete)] if system else []


def _keys(ctx: typer.Context, incomplete: str) -> list[str]:
    system = system_of(ctx)
    return [f"{key}=" for key in schema(system.Config) if key.startswith(incomplete)] if system else []


def arms_completed(ctx: typer.Context, incomplete: str) -> list[str]:
    """The arms that can continue a list of them."""
    # A list is completed in its last entry; what stands before the comma is repeated, for the shell replaces the word.
    before, comma, begun = incomplete.rpartition(",")
    arms = getattr(system_of(ctx), "choices", {}).get("arms", {})
    return [f"{before}{comma}{arm}" for arm in arms if arm.startswith(begun)]


def num_threads(text: str) -> int:
    """``text`` as a number of threads."""
    if not (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= 1024):
        raise typer.BadParameter(f"must be a whole number from 1 to 1024, got {short_repr(text)}")
    return int(text)


def num_bytes(text: str) -> int:
    """A size such as ``8GiB``, ``500MiB`` or ``24GB`` in bytes.

    >>> num_bytes("2GiB"), num_bytes("0.5 GB")
    (2147483648, 500000000)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT])(i?)B", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"must be a size such as 8GiB or 500MiB, got {short_repr(text)}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1))


def _set_log_level(level: str) -> str:
    if level not in (names := ("debug", "info", "warning", "error")):
        raise typer.BadParameter(f"must be one of {', '.join(names)}, got {short_repr(level)}")
    # force, because an imported library may have configured logging already.
    logging.basicConfig(level=level.upper(), format="preceptor: %(message)s", force=True)
    return level


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)]
Preset = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A named configuration; see preceptor list.",
        autocompletion=_presets,
        rich_help_panel=_CONFIGURATION,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with the keys that differ.",
        show_default=False,
        rich_help_panel=_CONFIGURATION,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One key, such as a.b=1e-5; repeat it for more.",
        autocompletion=_keys,
        show_default=False,
        rich_help_panel=_CONFIGURATION,
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print the whole configuration and stop.", rich_help_panel=_CONFIGURATION),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Run folder to make.  [default: runs/SYSTEM-DATE-N]",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="D", help="auto, cpu, cuda or cuda:1.", rich_help_panel=_EXECUTION)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        parser=num_threads,
        help="CPU threads; another number gives other last bits.  [default: by cores]",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="T",
        help=f"Also log to {', '.join(TRACKERS)}.",
        autocompletion=lambda incomplete: [name for name in TRACKERS if name.startswith(incomplete)],
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Name of the run in trackers.  [default: the folder's]",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="TAG",
        help="Tag of the run in trackers; repeat it for more.",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
Project = Annotated[
    str, typer.Option("--project", metavar="NAME", help="Project in trackers.", rich_help_panel=_EXECUTION)
]
Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        metavar="NAME",
        help="Group of the run in trackers; the seeds of a comparison form one.",
        show_default=False,
        rich_help_panel=_EXECUTION,
    ),
]
NoReport = Annotated[
    bool, typer.Option("--no-report", help="Do not write report.html at the end.", rich_help_panel=_EXECUTION)
]
LogLevel = Annotated[
    str,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        callback=_set_log_level,
        help="debug, info, warning or error.",
        rich_help_panel=_EXECUTION,
    ),
]
