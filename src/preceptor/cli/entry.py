"""From ``argv`` to an exit code: finds the command, runs it, and turns errors into one line and a number."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command, get_group

from preceptor.api import started_together
from preceptor.cli.options import EXIT_CODES, VARIABLE
from preceptor.cli.parsing import SETTINGS, Group, explained, made
from preceptor.errors import (
    ConfigError,
    Interrupted,
    PreceptorError,
    StorageError,
    ToldElsewhere,
    ToldHere,
    short_repr,
)
from preceptor.systems import known_systems
from preceptor.version import __version__

HELP = """\
Use RL to steer how a language model trains, and measure how much it helps.

\b
  preceptor list                        what can be run, with its presets
  preceptor run reading --preset smoke  the whole loop in a minute, offline
  preceptor run reading --article "Alan Turing" --set update.steps=60
  preceptor resume runs/mine            go on after Ctrl-C or a crash
  preceptor compare reading --seeds 0-9 --out runs/ten
  preceptor COMMAND --help              the options of one command
"""

_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EMFILE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own arguments) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    try:
        # Not `command.main`: it would take an Interrupted for Ctrl-C and forget its message and exit code.
        words = sys.argv[1:] if argv is None else argv
        if started_together(os.environ):
            _require_shared_command(words)
        with _context(words) as context:
            exit_code = int(context.command.invoke(context) or 0)
        sys.stdout.flush()  # here, where a full disk or a closed pipe still has an exit code
        return exit_code
    except typer.Exit as done:  # --help and --version have printed what they have to say
        return done.exit_code
    except SystemExit as done:  # so has --install-completion
        return int(done.code or 0)
    except ToldElsewhere as told:
        return told.exit_code
    except ToldHere as told:
        return _complain(told.faults, told.exit_code)
    # Processes that were started together meet these alike, and the first one tells them.
    except typer.TyperException as error:
        return _complain_once([explained(error)], ConfigError.exit_code)
    except Interrupted as stop:
        return _complain_once([str(stop)], stop.exit_code, label="")
    except ConfigError as error:
        return _complain_once(error.faults, error.exit_code)
    except PreceptorError as error:
        return _complain_once([str(error)], error.exit_code)
    except KeyboardInterrupt:
        return _complain(["stopped by Ctrl-C"], 130, label="")
    except BrokenPipeError:
        _drop_unwritable_output()  # its reader (`| head`) has left
        return 141
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a word of the command line that can be no path
            return _complain(
                [f"{short_repr(error.filename)} is longer than a file's name can be"], ConfigError.exit_code
            )
        if error.errno not in _STORAGE_ERRORS:
            return _bug()
        what = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        where = f": {error.filename}" if error.filename else ""
        # Nothing more can be printed where output itself failed, so it is dropped before the complaint goes to stderr.
        _drop_unwritable_output()
        return _complain([f"{what}{where}; what was saved is safe"], StorageError.exit_code)
    except Exception:  # noqa: BLE001 - shown whole, with a request to report it
        return _bug()


def _complain_once(messages: Sequence[str], exit_code: int, *, label: str = "error: ") -> int:
    if started_together(os.environ) and os.environ.get("RANK", "0") != "0":
        return exit_code
    return _complain(messages, exit_code, label=label)


def _complain(messages: Sequence[str], exit_code: int, *, label: str = "error: ") -> int:
    for message in messages:
        # A path or an article's title may hold control characters, which a terminal would obey.
        line = "".join(character if character.isprintable() else " " for character in message)
        print(f"preceptor: {label}{line if len(line) <= 1000 else line[:997] + '...'}", file=sys.stderr)
    return exit_code


def _drop_unwritable_output() -> None:
    """Forgets what cannot be printed; Python would try again at exit, and complain with an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        # The descriptor is replaced, not Python's object: the interpreter flushes the former at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bug() -> int:
    traceback.print_exc()
    print("preceptor: this is a bug of Preceptor; please report it with the lines above", file=sys.stderr)
    return 1


def _require_shared_command(argv: Sequence[str]) -> None:
    """Refuses what a launcher cannot start in several processes: they would do it several times."""
    command = next((word for word in argv if not word.startswith("-")), "")
    if command in COMMANDS and command not in SHARED_COMMANDS:
        raise ConfigError(
            f"preceptor {command} works in one process, {os.environ['WORLD_SIZE']} were started; start it without a "
            "launcher"
        )


def _context(argv: Sequence[str]) -> Any:
    """The command line as typer reads it: the command, to be invoked, and its parameters."""
    for argument in argv:
        # Surrogates are how Python passes bytes that are not UTF-8; they could not be printed or saved later.
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(f"argument {short_repr(argument)} is not valid UTF-8 text")
    command = get_command(_app())
    if VARIABLE in os.environ:
        command.main(args=[], prog_name="preceptor")  # a shell asks what can come next; it prints that and exits
    return command.make_context("preceptor", list(argv))


COMMANDS = {
    "run": "run:APP",
    "resume": "run:resume",
    "compare": "compare:APP",
    "tune": "tune:APP",
    "watch": "watch:watch",
    "replay": "replay:replay",
    "study": "study:study",
    "report": "run:report",
    "export": "run:export",
    "repair": "repair:repair",
    "pretrain": "run:pretrain",
    "list": "listing:list_choices",
    "doctor": "doctor:APP",
    "completion": "completion:completion",
}
"""In the order in which help shows them; a module is imported for its own command alone."""

SHARED_COMMANDS = {"run", "resume", "pretrain"}
"""What torchrun or accelerate may start in several processes, which then work on one run."""


class Root(Group):
    """``preceptor COMMAND``."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which help shows them."""
        return [name for name in COMMANDS if name != "pretrain" or name in known_systems()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, if there is one of this name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        target = getattr(importlib.import_module(f"preceptor.cli.{module}"), attribute)
        if isinstance(target, typer.Typer):
            group = get_group(target)
            group.name = cmd_name
            return group
        if cmd_name == "pretrain":  # a system with a command of its own besides `preceptor run pretrain`
            return target()
        return made(target, name=cmd_name, epilog=EXIT_CODES)


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=Root,
        help=HELP,
        epilog=EXIT_CODES,
        context_settings=SETTINGS,
        subcommand_metavar="COMMAND",
        rich_markup_mode=None,
    )
    app.callback()(_root)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
