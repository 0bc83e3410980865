"""The command line: ``preceptor run | resume | report | pretrain | list``.

The one place that reads the environment, turns errors into exit codes, and prints them. It is the same for every
system: what is particular to one (its configuration, its own options, its presets) is looked up by the system's name,
when it is asked for, so that ``preceptor --help`` imports neither torch nor a system.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.resources
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from preceptor import __version__
from preceptor.config import Setting, dump_yaml, from_dict, load_config, schema, to_dict
from preceptor.errors import ConfigError, Interrupted, PreceptorError, StorageError, nearest
from preceptor.plain_yaml import shown, write_flow
from preceptor.systems import SYSTEMS, SystemInfo

PRETRAINING = SystemInfo("preceptor.pretraining", "PretrainConfig", "train a small language model from text files")
COMMON_FLAGS = {"model": "the language model: 'starter', a local folder or a hub name", "seed": "seed of the run"}

DESCRIPTION = """\
Reinforcement learning that steers a language model's own training.

examples:
  preceptor list                                 what can be run, with its presets
  preceptor run reading --preset smoke           the whole loop in under a minute, offline
  preceptor run reading --article "Alan Turing"  learn the order in which to read this article
  preceptor run reading --config mine.yaml --set update.learning_rate=1e-5 --seed 3
  preceptor resume runs/reading-2026-01-31-1     go on after Ctrl-C, a crash or a full disk
  preceptor COMMAND --help                       the options of one command
"""
EXIT_CODES = """\
exit codes:
  0    done
  1    a bug of Preceptor; the traceback says where
  2    bad input: an argument, a configuration, an article, a model, a package that is not installed
  3    numbers stayed NaN or infinite
  4    the run folder is in use by another process
  5    something could not be written or read: full disk, permissions, damaged files
  6    a remote service failed, refused the key, or its budget is spent
  130  stopped by Ctrl-C (143: by SIGTERM); what was saved is kept, `preceptor resume DIR` goes on
"""
CONFIGURATION = """\
A configuration has four layers, and a later one wins key by key: the defaults in the code, the preset, the file given
with --config, and on the command line first the options that name a key, then --set in the order written.

  preceptor run SYSTEM --print-config > mine.yaml    every key with its help; edit, then pass it with --config
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own arguments) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    try:
        exit_code = _run_command(sys.argv[1:] if argv is None else argv, os.environ)
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


_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE),
}


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


# ---- arguments ----


class _Parser(argparse.ArgumentParser):
    """argparse with errors that are raised, one line each, instead of usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _run_command(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    for argument in argv:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(f"argument {shown(argument)} is not valid UTF-8 text")
    parser, commands = _parser(argv)
    if argv and argv[0] not in (allowed := [*commands, "-h", "--help", "--version"]):
        what = "option" if argv[0].startswith("-") else "command"
        hint = nearest(argv[0][:100], allowed) or f"; there are {', '.join(commands)}"
        raise ConfigError(f"unknown {what} {shown(argv[0])}{hint}")
    try:
        options, unknown = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version have printed what they have to say
        return int(done.code or 0)
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in vars(options) if name not in ("command", "system", "folder")]
        strange = next((argument for argument in unknown if argument.startswith("-")), None)
        if strange is None:
            raise ConfigError(f"unexpected argument {shown(unknown[0])}; see {parser.prog} {options.command} --help")
        name = strange.partition("=")[0]
        hint = nearest(name[:100], flags) or f"; see {parser.prog} {options.command} --help"
        raise ConfigError(f"unknown option {shown(name)}{hint}")
    if options.command == "run":
        return _run(_system(options.system), options.system, options, environ)
    if options.command == "pretrain":
        return _run(PRETRAINING, "pretrain", options, environ)
    if options.command == "resume":
        return _resume(options, environ)
    return _report(options.folder) if options.command == "report" else _list()


def _parser(argv: Sequence[str]) -> tuple[_Parser, list[str]]:
    """The parser, and the names of its commands. Systems are imported only where ``argv`` is about ``run``."""
    style: Any = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="preceptor", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=style, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        description = summary[0].upper() + summary[1:] + "."
        return commands.add_parser(
            name, help=summary, description=description, epilog=epilog, formatter_class=style, allow_abbrev=False
        )

    run = command("run", "train a system and measure what the training was worth", CONFIGURATION + "\n" + EXIT_CODES)
    run.add_argument("system", metavar="SYSTEM", help=f"one of: {', '.join(SYSTEMS)}")
    _add_configuration(run)
    if "run" in argv[:1]:
        _add_system_flags(run)
    _add_execution(run)

    resume = command("resume", "go on with a run that was stopped, from its last checkpoint", EXIT_CODES)
    resume.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")
    resume.add_argument("--device", metavar="D", help="another device than before; needs --allow-inexact")
    resume.add_argument(
        "--threads", metavar="N", type=_num_threads, help="another number of threads; needs --allow-inexact"
    )
    resume.add_argument("--allow-inexact", action="store_true", help="resume though last bits (or more) will differ")
    resume.add_argument("--no-report", action="store_true", help="do not write report.html at the end")

    report = command("report", "write report.html, one self-contained page about a run", EXIT_CODES)
    report.add_argument("folder", metavar="DIR", type=Path, help="folder of the run")

    pretrain = command("pretrain", PRETRAINING.description, CONFIGURATION.replace("run SYSTEM", "pretrain"))
    _add_configuration(pretrain)
    pretrain.add_argument("--seed", metavar="N", help=COMMON_FLAGS["seed"])
    _add_execution(pretrain)

    command("list", "name the systems and their presets, a line each", "")
    return parser, list(commands.choices)


def _num_threads(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1024, got {shown(text)}")
    return int(text)


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument("--preset", metavar="NAME", default="default", help="a named configuration; see preceptor list")
    group.add_argument("--config", metavar="FILE", type=Path, help="YAML file; only the keys that differ need be there")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one key, such as a.b=1e-5; repeat"
    )
    group.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")


def _add_system_flags(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every key that a system names in ``FLAGS``; its help is the key's own."""
    group = parser.add_argument_group("keys with an option of their own")
    added: set[str] = set()
    for name, system in SYSTEMS.items():
        keys = schema(_config_class(system))
        for flag, key in _flags(system).items():
            if flag not in added:
                added.add(flag)
                text = COMMON_FLAGS.get(flag) or f"{name}: {keys[key].help}"
                several: dict[str, Any] = {"nargs": "+", "action": "extend"} if _is_list(keys[key]) else {}
                metavar = "N" if flag == "seed" else flag.upper().removeprefix("TRAIN_").removeprefix("EVAL_")
                option = f"--{flag.replace('_', '-')}"
                group.add_argument(option, dest=flag, metavar=metavar, help=text.replace("%", "%%"), **several)


def _is_list(setting: Setting) -> bool:
    return any(get_origin(kind) in (tuple, list) for kind in (setting.type, *get_args(setting.type)))


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument("--out", metavar="DIR", type=Path, help="run folder to make (default: runs/SYSTEM-DATE-N)")
    group.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    text = "CPU threads; another number gives other last bits (default: by cores)"
    group.add_argument("--threads", metavar="N", type=_num_threads, help=text)
    group.add_argument(
        "--tracker",
        metavar="T",
        nargs="+",
        action="extend",
        default=[],
        help="tensorboard, wandb; besides metrics.jsonl",
    )
    group.add_argument("--no-report", action="store_true", help="do not write report.html at the end")


# ---- commands ----


def _run(system: SystemInfo, name: str, options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    config = _configuration(system, name, options)
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
            streams=_module(system, "train").STREAMS,
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
        system = PRETRAINING if name == "pretrain" else _system(name)
        config = from_dict(_config_class(system), run.config)
        on_failure.pop_all()
    return _train(system, config, run, environ, report=not options.no_report)


def _train(system: SystemInfo, config: Any, run: Any, environ: Mapping[str, str], *, report: bool) -> int:
    surroundings = {"cache_dir": _cache_dir(environ), "openai_api_key": environ.get("OPENAI_API_KEY")}
    with run:
        result = _module(system, "train").train(config, run, **{need: surroundings[need] for need in system.needs})
        run.write_result(result)
    _show(result)
    print(f"results: {run.path}")
    return _report(run.path) if report else 0


def _show(result: Mapping[str, Any]) -> None:
    """The arms as a table and the verdict below it, where a result has them."""
    if "arms" in result:
        from rich.console import Console

        from preceptor.report.table import arms_table

        Console().print(arms_table(result["arms"], title=f"{result['system']}: every arm", metrics=result.get("table")))
    if "verdict" in result:
        print(f"\n{result['verdict']}\n")


def _report(folder: Path) -> int:
    from preceptor.report.page import build_report

    print(f"report:  {build_report(folder)}")
    return 0


def _list() -> int:
    for name, system in {**SYSTEMS, "pretrain": PRETRAINING}.items():
        print(f"{name:<12}{system.description}")
        for preset, summary in _presets(name).items():
            print(f"  {preset:<10}{summary}")
    return 0


# ---- what belongs to a system ----


def _system(name: str) -> SystemInfo:
    if name not in SYSTEMS:
        hint = nearest(name[:100], SYSTEMS) or f"; there are {', '.join(SYSTEMS)}"
        raise ConfigError(f"unknown system {shown(name)}{hint}")
    return SYSTEMS[name]


def _module(system: SystemInfo, name: str) -> Any:
    return importlib.import_module(f"{system.module}.{name}")


def _config_class(system: SystemInfo) -> Any:
    return getattr(_module(system, "config"), system.config)


def _flags(system: SystemInfo) -> Mapping[str, str]:
    flags: Mapping[str, str] = getattr(_module(system, "config"), "FLAGS", {"seed": "seed"})
    return flags


def _configuration(system: SystemInfo, name: str, options: argparse.Namespace) -> Any:
    """The configuration that ``options`` ask for: preset, file, options that stand for keys, ``--set``."""
    given = {flag: value for flag, value in vars(options).items() if value is not None}
    flags = _flags(system)
    for flag in {flag for other in SYSTEMS.values() for flag in _flags(other)} & given.keys() - flags.keys():
        raise ConfigError(f"--{flag.replace('_', '-')} is no option of {name}; its own are {_spelled(flags)}")
    overrides = [
        f"{key}={value if isinstance(value := given[flag], str) else write_flow(value)}"
        for flag, key in flags.items()
        if flag in given
    ]
    overrides += options.set
    presets = _presets(name)
    if options.preset not in presets:
        hint = nearest(options.preset[:100], presets) or f"; there are {', '.join(presets)}"
        raise ConfigError(f"unknown preset {shown(options.preset)} of {name}{hint}")
    cls = _config_class(system)
    with importlib.resources.as_file(_preset_folder(name) / f"{options.preset}.yaml") as preset:
        layer = preset if preset.is_file() else None  # `default` needs no file: it is the defaults of the code
        return load_config(cls, preset=layer, file=options.config, overrides=overrides)


def _spelled(flags: Mapping[str, str]) -> str:
    return ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)


def _preset_folder(name: str) -> Any:
    return importlib.resources.files("preceptor") / "presets" / name


def _presets(name: str) -> dict[str, str]:
    """The presets of a system with the first line of comment of each; ``default`` is always among them."""
    folder = _preset_folder(name)
    found = {"default": "the defaults"}
    for file in sorted(folder.iterdir(), key=lambda file: str(file.name)) if folder.is_dir() else ():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def _cache_dir(environ: Mapping[str, str]) -> Path:
    """Where downloads and bought embeddings are kept: PRECEPTOR_CACHE_DIR, else the XDG cache folder."""
    if own := environ.get("PRECEPTOR_CACHE_DIR"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "preceptor"
