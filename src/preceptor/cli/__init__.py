"""The command line. One module for each command, and the one place that reads the environment.

It is the same for every system: what is particular to one (its configuration, its own options, its presets) is looked
up by the system's name, when it is asked for, so that ``preceptor --help`` imports neither torch nor a system.
"""

from __future__ import annotations

from preceptor.cli.entry import main

__all__ = ["main"]
