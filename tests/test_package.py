"""Names of the package: each module is found under its own."""

from __future__ import annotations

import importlib
import pkgutil

import preceptor


def test_the_modules_are_where_their_names_say() -> None:
    """To catch: a package that exports a function under the name of one of its modules hides the module."""
    hidden, seen = [], 0
    for info in pkgutil.walk_packages(preceptor.__path__, "preceptor."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        package, _, name = info.name.rpartition(".")
        seen += 1
        if getattr(importlib.import_module(package), name) is not module:
            hidden.append(info.name)
    assert seen > 150
    assert hidden == []
