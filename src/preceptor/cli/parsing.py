"""How words on the command line are read and explained: typer's commands, with what Preceptor's need besides.

An option that takes several values takes them one after another (``--seeds 1 5 7``) as well as one by one. Help is
plain text with a heading for each group of options, and fits 80 columns. A word that is wrong raises
:class:`~preceptor.errors.ConfigError` with one line that names the nearest right one.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from preceptor.config import schema
from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import System

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
ONE_EACH = {"--set", "--tag"}
"""Options that are repeated for another value; what follows their value is a word of its own."""
SWITCHES = {"-h", "--help", "--print-config", "--no-report", "--no-forecast", "--print"}
"""Options without a value that can stand before a system's name."""


class Command(TyperCommand):
    """A command whose help groups its options, and some of whose options take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Options that may be given several times take several words after one flag, which typer does not.
        several = {flag for option in self.params if getattr(option, "multiple", False) for flag in option.opts}
        return super().parse_args(ctx, _one_by_one(args, several - ONE_EACH))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or own, []).append(record)
        for title in sorted(groups, key="Options".__eq__):  # those of no group come last
            with formatter.section(title):
                formatter.write_dl(groups[title], col_max=26)


class PassingCommand(Command):
    """A command that keeps the words after ``--`` for other commands, in ``context.meta["passed"]``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Split off before typer reads the line: it would drop the "--".
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["passed"] = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


def _one_by_one(words: Sequence[str], several: set[str]) -> list[str]:
    """``words`` with ``--seeds 1 2`` written as ``--seeds 1 --seeds 2`` for the options in ``several``."""
    found: list[str] = []
    option, num_values = "", 0
    for word in words:
        # A lone "-" is a value (standard input), not an option.
        if word.startswith("-") and len(word) > 1:
            option, num_values = word, 0
        else:
            if option in several and num_values:
                found.append(option)
            num_values += 1
        found.append(word)
    return found


class Group(TyperGroup):
    """A group of commands that names the nearest when there is none of that name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # While a shell completes, an unknown word is one that is not finished.
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            hint = did_you_mean(args[0][:100], known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"unknown command {short_repr(args[0])}{hint}")
        return super().resolve_command(ctx, args)


class SystemGroup(Group):
    """A command whose first word is a system; each system's command is made when it is asked for."""

    metavar = "SYSTEM"

    def made_for(self, word: str) -> Any:
        """The command that the first word stands for; raises ConfigError where it stands for none."""
        raise NotImplementedError

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        try:
            return self.made_for(cmd_name)
        except ConfigError:
            if ctx.resilient_parsing:  # a shell asks about a line that is being typed
                return None
            raise

    def list_commands(self, ctx: Any) -> list[str]:
        return list(known_systems())

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [self.metavar, "[OPTIONS]"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise ConfigError(f"missing {self.metavar}; see {ctx.command_path} --help")
        return super().parse_args(ctx, _first_word_first(args))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Systems"):
            formatter.write_dl([(name, find_system(name).summary) for name in known_systems()])


def _first_word_first(words: list[str]) -> list[str]:
    """``words`` with the first that is neither an option nor its value in front; options may stand before it."""
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        # A word after an option is its value, unless the option is a switch or carries its value after "=".
        is_value = before.startswith("-") and "=" not in before and before not in SWITCHES
        if not word.startswith("-") and not is_value:
            return [word, *words[:index], *words[index + 1 :]]
    return words


def system_command(
    system: System, function: Callable[..., int], flags: Mapping[str, str], *, several: bool = False, **settings: Any
) -> Any:
    """The command that calls ``function(system, **options)``, with an option of its own for each of ``flags``.

    ``function``'s keyword-only parameters are options too; the flags reach it as its ``**flags``, None where they were
    not given. ``flags`` says which key each stands for, whose help it shows. ``several`` lets every flag have several
    values.
    """
    hints = get_type_hints(function, include_extras=True)
    keys = schema(system.Config)
    parameters = []
    # Help in the option is the key's own description, so that the two cannot differ.
    for flag, key in flags.items():
        text = (keys[key].description or "").rstrip(".").replace("\n", " ")
        is_list = several or get_origin(keys[key].annotation) in (tuple, list)
        option = typer.Option(
            f"--{flag.replace('_', '-')}",
            metavar="N" if flag == "seed" else flag.upper().removeprefix("TRAIN_").removeprefix("EVAL_"),
            help=f"A run for each: {text[:1].lower()}{text[1:]}." if several else f"{text}.",
            show_default=False,
            rich_help_panel=f"Options of {system.name}",
        )
        kind = list[str] | None if is_list else str | None
        parameters.append(_parameter(flag, Annotated[kind, option], None))
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parameters.append(_parameter(name, hints[name], parameter.default))

    # typer reads the signature, and calls the function itself.
    call: Any = functools.partial(function, system)
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return made(call, name=system.name, short_help=f"{system.summary[:1].upper()}{system.summary[1:]}.", **settings)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def made(function: Callable[..., int], *, name: str, cls: type[Command] = Command, **settings: Any) -> Any:
    """The typer command of ``function``."""
    # An app for one command: typer makes commands from functions through an app only.
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(name, cls=cls, context_settings=SETTINGS, **settings)(function)
    return get_command(app)


def explained(error: typer.TyperException) -> str:
    """One line about words that typer could not read."""
    context = getattr(error, "ctx", None)
    help_of = f"; see {context.command_path} --help" if context is not None else ""
    option = getattr(error, "option_name", None)
    # typer's own message suggests nothing; name the nearest option.
    if option is not None and "No such option" in error.message:
        flags = [flag for each in context.command.get_params(context) for flag in each.opts] if context else []
        return f"unknown option {short_repr(option)}{did_you_mean(option[:100], flags) or help_of}"
    text = " ".join(error.format_message().split()).rstrip(".")
    if extra := re.match(r"Got unexpected extra argument\S* \((.*)\)", text):
        return f"unexpected argument {short_repr(extra[1])}{help_of}"
    return f"{text[:1].lower()}{text[1:]}{help_of}"
