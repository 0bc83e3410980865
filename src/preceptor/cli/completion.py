"""``preceptor completion``: the script with which a shell completes commands, options, presets, arms and keys."""

from __future__ import annotations

from typing import Annotated

import typer

from preceptor.cli.options import VARIABLE
from preceptor.errors import ConfigError, short_repr

SHELLS = ("bash", "zsh", "fish", "powershell")


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help=f"One of {', '.join(SHELLS)}.", show_default=False)],
) -> int:
    """Print the completion script of a shell.

    \b
      bash  preceptor completion bash > ~/.bash_completions/preceptor.sh
      zsh   preceptor completion zsh > DIR/_preceptor      where DIR is in $fpath
      fish  preceptor completion fish > ~/.config/fish/completions/preceptor.fish
    """  # noqa: D301 - the backspace is typer's: it keeps the lines as they are
    if shell not in SHELLS:
        raise ConfigError(f"a shell is needed, one of {', '.join(SHELLS)}; got {short_repr(shell)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name="preceptor", complete_var=VARIABLE, shell=shell))
    return 0
