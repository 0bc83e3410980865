"""From ``argv`` to an exit code: finds the command, runs it, and turns errors into one line and a number."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.cli import compare, completion, doctor, listing, replay, run, watch
from preceptor.cli.arguments import EXIT_CODES, Command, Parser
from preceptor.errors import ConfigError, Interrupted, PreceptorError, StorageError, did_you_mean, short_repr
from preceptor.version import __version__

COMMANDS: dict[str, Command] = {
    "run": run.RUN,
    "resume": run.RESUME,
    "compare": compare.COMPARE,
    "watch": watch.WATCH,
    "replay": replay.REPLAY,
    "report": run.REPORT,
    "pretrain": run.PRETRAIN,
    "list": listing.LIST,
    "doctor": doctor.DOCTOR,
    "completion": completion.COMPLETION,
}
DESCRIPTION = """\
Reinforcement learning that steers a language model's own training.

examples:
  preceptor list                                 what can be run, with its presets
  preceptor run reading --preset smoke           the whole loop in under a minute, offline
  preceptor run reading --article "Alan Turing"  learn the order in which to read this article
  preceptor run reading --config mine.yaml --set update.learning_rate=1e-5 --seed 3
  preceptor resume runs/reading-2026-01-31-1     go on after Ctrl-C, a crash or a full disk
  preceptor compare reading --seeds 0-9 --out runs/ten   what may be claimed over ten seeds
  preceptor COMMAND --help                       the options of one command
"""

_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own arguments) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    try:
        exit_code = _execute(sys.argv[1:] if argv is None else argv, os.environ)
        sys.stdout.flush()  # here, where a full disk or a closed pipe still has an exit code
        return exit_code
    except Interrupted as stop:
        return _complain([str(stop)], stop.exit_code, label="")
    except ConfigError as error:
        return _complain(error.faults, error.exit_code)
    except PreceptorError as error:
        return _complain([str(error)], error.exit_code)
    except KeyboardInterrupt:
        return _complain(["stopped by Ctrl-C"], 130, label="")
    except BrokenPipeError:
        _drop_unwritable_output()  # its reader (`| head`) has left
        return 141
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            return _bug()
        what = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        where = f": {error.filename}" if error.filename else ""
        _drop_unwritable_output()
        return _complain([f"{what}{where}; what was saved is safe"], StorageError.exit_code)
    except Exception:  # noqa: BLE001 - shown whole, with a request to report it
        return _bug()


def _complain(messages: Sequence[str], exit_code: int, *, label: str = "error: ") -> int:
    for message in messages:
        line = "".join(character if character.isprintable() else " " for character in message)
        print(f"preceptor: {label}{line if len(line) <= 1000 else line[:997] + '...'}", file=sys.stderr)
    return exit_code


def _drop_unwritable_output() -> None:
    """Forgets what cannot be printed; Python would try again at exit, and complain with an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bug() -> int:
    traceback.print_exc()
    print("preceptor: this is a bug of Preceptor; please report it with the lines above", file=sys.stderr)
    return 1


def _execute(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    for argument in argv:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(f"argument {short_repr(argument)} is not valid UTF-8 text")
    if argv and argv[0] not in (allowed := [*COMMANDS, "-h", "--help", "--version"]):
        what = "option" if argv[0].startswith("-") else "command"
        hint = did_you_mean(argv[0][:100], allowed) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown {what} {short_repr(argv[0])}{hint}")
    parser = parser_for(argv[0] if argv else None)
    passed: list[str] = []
    if argv and COMMANDS.get(argv[0], run.RUN).passes_on and "--" in argv:
        argv, passed = argv[: argv.index("--")], list(argv[argv.index("--") + 1 :])
    try:
        options, unknown = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version have printed what they have to say
        return int(done.code or 0)
    if unknown:
        raise ConfigError(_stranger(unknown, f"{parser.prog} {options.command}", vars(options)))
    options.passed = passed
    return COMMANDS[options.command].execute(options, environ)


def parser_for(name: str | None) -> argparse.ArgumentParser:
    """The parser that knows every command by name, and the arguments of ``name`` alone: systems are imported for it."""
    style: Any = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="preceptor", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for each, command in COMMANDS.items():
        description = command.description or command.summary[0].upper() + command.summary[1:] + "."
        of_command = commands.add_parser(
            each,
            help=command.summary,
            description=description,
            epilog=command.epilog,
            formatter_class=style,
            allow_abbrev=False,
        )
        if each == name:
            command.add_arguments(of_command)
    return parser


def _stranger(unknown: Sequence[str], command: str, options: Mapping[str, Any]) -> str:
    """What to say of arguments that nobody asked for."""
    option = next((argument for argument in unknown if argument.startswith("-")), None)
    if option is None:
        return f"unexpected argument {short_repr(unknown[0])}; see {command} --help"
    name = option.partition("=")[0]
    flags = [f"--{known.replace('_', '-')}" for known in options if known not in ("command", "system", "folder")]
    return f"unknown option {short_repr(name)}{did_you_mean(name[:100], flags) or f'; see {command} --help'}"
