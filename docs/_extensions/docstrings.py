"""Docstrings as the site shows them: examples become blocks of code, roles become names.

The sources write an example right below the text and name things by roles, as ``help()`` and pytest read them; in
Markdown the one would be a quotation and the other would keep its colons.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([^`]+)`")


def as_markdown(text: str) -> str:
    """``text`` with its roles as code and each example, up to the next empty line, as a block of code."""
    lines: list[str] = []
    is_example = False
    for line in ROLE.sub(r"`\1`", text).splitlines():
        if line.startswith(">>>") and not is_example:
            lines += [] if not lines or not lines[-1] else [""]
            lines.append("```pycon")
            is_example = True
        elif not line.strip() and is_example:
            lines.append("```")
            is_example = False
        lines.append(line)
    return "\n".join([*lines, "```"] if is_example else lines)


class Docstrings(Extension):
    """Rewrites every docstring once a package is loaded, and leaves ``__all__`` out."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Walk ``pkg``."""
        _rewrite(pkg)


def _rewrite(found: Object) -> None:
    if found.docstring:
        found.docstring.value = as_markdown(found.docstring.value)
    found.members.pop("__all__", None)
    for member in list(found.members.values()):
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]
