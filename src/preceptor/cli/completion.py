"""``preceptor completion``: a few lines for the shell, which asks the program itself what can come next."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence

from preceptor.cli.arguments import Command
from preceptor.config import schema
from preceptor.errors import ConfigError, PreceptorError
from preceptor.systems import find_system, known_systems
from preceptor.systems.configuration import presets

DESCRIPTION = """\
Prints a script that makes the shell complete preceptor's commands, options, systems, presets, arms and keys.

  bash    preceptor completion bash > ~/.local/share/bash-completion/completions/preceptor
  zsh     preceptor completion zsh > DIR/_preceptor       where DIR is in $fpath
  fish    preceptor completion fish > ~/.config/fish/completions/preceptor.fish
"""
SCRIPTS = {
    "bash": """\
_preceptor() {
    local IFS=$'\\n'
    COMPREPLY=($(preceptor completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -o nosort -F _preceptor preceptor
""",
    "zsh": """\
#compdef preceptor
_preceptor() {
    local -a found
    found=("${(@f)$(preceptor completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then compadd -Q -- $found; else _files; fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _preceptor "$@"; else compdef _preceptor preceptor; fi
""",
    "fish": """\
function __preceptor_words
    set -l words (commandline -opc) (commandline -ct)
    preceptor completion --words $words[2..-1] 2>/dev/null
end
complete -c preceptor -a '(__preceptor_words)'
""",
}
"""What is printed, by shell. Where nothing is known to come next, each falls back to the names of files."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", nargs="?", help=f"one of: {', '.join(SCRIPTS)}")
    # What the scripts call: every word so far, the last one perhaps begun.
    parser.add_argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _completion(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if options.words is not None:
        for word in candidates(options.words):
            print(word)
        return 0
    if options.shell not in SCRIPTS:
        raise ConfigError(f"a shell is needed, one of {', '.join(SCRIPTS)}; got {options.shell or 'none'}")
    print(SCRIPTS[options.shell], end="")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What can stand in the place of the last of ``words``, which may be begun; none where files are to be named."""
    from preceptor.cli.entry import COMMANDS, parser_for  # which imports this module

    *before, begun = words or [""]
    if not before:
        return _fitting([*COMMANDS, "--help", "--version"], begun)
    command = before[0]
    if command not in COMMANDS:
        return []
    found: list[str] = []
    with contextlib.suppress(PreceptorError):  # half a line is no mistake; there is then nothing to offer
        parser = parser_for(command)
        actions = (
            next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[command]._actions
        )
        flags = {flag: action for action in actions for flag in action.option_strings if flag.startswith("--")}
        system = next(
            (word for word in before[1:] if word in known_systems()), "pretrain" if command == "pretrain" else ""
        )
        found = _values(before, begun, system, flags)
        if not found and begun.startswith("-"):
            found = sorted(flags)
        elif not found and len(before) == 1 and command in ("run", "compare", "doctor", "list"):
            found = list(known_systems())
        elif not found and len(before) == 1 and command == "completion":
            found = list(SCRIPTS)
    return _fitting(found, begun)


def _values(before: Sequence[str], begun: str, system: str, flags: Mapping[str, argparse.Action]) -> list[str]:
    """Values of the option that the last words are about, where they are known."""
    option = next((word for word in reversed(before) if word.startswith("--")), "")
    several = option in flags and flags[option].nargs in ("+", "*")
    if not option or (option != before[-1] and not several):
        return []
    if option == "--preset" and system:
        return list(presets(find_system(system)))
    if option == "--set" and system:
        return [f"{key}=" for key in schema(find_system(system).Config)]
    if option == "--arms" and system:
        arms = list(find_system(system).choices.get("arms", {}))
        given = begun.rpartition(",")[0]
        return [f"{given},{arm}" if given else arm for arm in arms]
    if option == "--tracker":
        from preceptor.run.trackers import TRACKERS

        return list(TRACKERS)
    return ["auto", "cpu", "cuda"] if option == "--device" else []


def _fitting(found: Sequence[str], begun: str) -> list[str]:
    return [word for word in found if word.startswith(begun)]


COMPLETION = Command(
    "print the completion script of a shell", _add_arguments, _completion, description=DESCRIPTION, epilog=""
)
