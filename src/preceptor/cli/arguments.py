"""What commands are made of, and the options that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_origin

from preceptor.cli.systems import systems
from preceptor.config import schema
from preceptor.errors import ConfigError, short_repr

EXIT_CODES = """\
exit codes:
  0    done
  1    a bug of Preceptor; the traceback says where
  2    bad input: an argument, a configuration, an article, a model, a package that is not installed
  3    numbers stayed NaN or infinite
  4    the run folder is in use by another process
  5    something could not be written or read: full disk, permissions, damaged files
  6    a remote service failed, refused the key, or its budget is spent
  7    a check failed: a replay that parts from the record, or a fault that doctor found
  130  stopped by Ctrl-C (143: by SIGTERM); what was saved is kept, `preceptor resume DIR` goes on
"""
CONFIGURATION = """\
A configuration has four layers, and a later one wins key by key: the defaults in the code, the preset, the file given
with --config, and on the command line first the options that name a key, then --set in the order written.

  preceptor run SYSTEM --print-config > mine.yaml    every key with its help; edit, then pass it with --config
"""
COMMON_FLAGS = {"model": "the language model: 'starter', a local folder or a hub name", "seed": "seed of the run"}


class Parser(argparse.ArgumentParser):
    """argparse with errors that are raised, one line each, instead of usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class Command(NamedTuple):
    """One command: what its help says, its arguments, and what it does."""

    summary: str  # one line, without a capital letter and a full stop
    add_arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace, Mapping[str, str]], int]  # options, environment -> exit code
    description: str = ""  # of the help; the summary where it is empty
    epilog: str = EXIT_CODES
    passes_on: bool = False  # words after `--` come as `options.passed`


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The options from which a configuration is made."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--preset", metavar="NAME", default="default", help="a named configuration; see preceptor list")
    group.add_argument("--config", metavar="FILE", type=Path, help="YAML file; only the keys that differ need be there")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one key, such as a.b=1e-5; repeat"
    )
    group.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")


def add_system_flags(parser: argparse.ArgumentParser) -> None:
    """An option for every key that a system names in ``FLAGS``; its help is the key's own."""
    group = parser.add_argument_group("keys with an option of their own")
    added: set[str] = set()
    for name, system in systems().items():
        keys = schema(system.Config)
        for flag, key in system.flags.items():
            if flag not in added:
                added.add(flag)
                text = COMMON_FLAGS.get(flag) or f"{name}: {keys[key].description}"
                several: dict[str, Any] = {"nargs": "+", "action": "extend"} if _is_list(keys[key].annotation) else {}
                metavar = "N" if flag == "seed" else flag.upper().removeprefix("TRAIN_").removeprefix("EVAL_")
                option = f"--{flag.replace('_', '-')}"
                group.add_argument(option, dest=flag, metavar=metavar, help=text.replace("%", "%%"), **several)


def _is_list(kind: Any) -> bool:
    return any(get_origin(each) in (tuple, list) for each in (kind, *get_args(kind)))


def add_device(parser: Any) -> None:
    """Where to compute, and with how many threads."""
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    text = "CPU threads; another number gives other last bits (default: by cores)"
    parser.add_argument("--threads", metavar="N", type=num_threads, help=text)


def num_threads(text: str) -> int:
    """``text`` as a number of threads."""
    if not (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1024, got {short_repr(text)}")
    return int(text)
