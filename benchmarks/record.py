"""``history.jsonl``: one line a measurement, each of a commit that anyone can check out again."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preceptor
from preceptor.errors import ConfigError
from preceptor.runs.files import storage_errors
from preceptor.runs.metrics import row_json

ROOT = Path(__file__).resolve().parents[1]
HISTORY = "benchmarks/history.jsonl"
"""Within a checkout. Its new lines do not make the checkout dirty, or a second measurement could never be recorded."""


@dataclass(frozen=True)
class Revision:
    """The code that is measured.

    Attributes:
        commit: of the checkout.
        changes: ``git status`` lines of files that differ from it, untracked ones too: Python would import them.
    """

    commit: str
    changes: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        return bool(self.changes)

    def require_clean(self) -> None:
        """Refuse a measurement that no commit stands for.

        Raises:
            ConfigError: there are changes; the message names the first.
        """
        if self.changes:
            raise ConfigError(
                f"the checkout has {len(self.changes)} uncommitted changes, the first is '{self.changes[0].strip()}'; "
                "a recorded measurement needs a commit: commit them, or pass --allow-dirty to measure without recording"
            )


def revision(root: Path) -> Revision:
    """The commit and the changes of the checkout at ``root``.

    Raises:
        ConfigError: ``root`` is not a git checkout with a commit.
    """
    changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", ".", f":(exclude){HISTORY}")
    return Revision(commit=_git(root, "rev-parse", "HEAD").strip(), changes=tuple(changes.splitlines()))


def require_own_package(root: Path) -> None:
    """Refuse to measure a Preceptor that is not the checkout's own: the commit would be of other code.

    Raises:
        ConfigError: ``preceptor`` is imported from outside ``root``.
    """
    package = Path(preceptor.__file__).resolve().parent
    if not package.is_relative_to(root.resolve()):
        raise ConfigError(
            f"preceptor is imported from {package}, not from this checkout; install it with: pip install -e ."
        )


def append(row: Mapping[str, Any], measured: Revision, *, root: Path) -> Path:
    """Add ``row`` and its commit to the history of the checkout at ``root``; returns the file.

    Args:
        row: the measurement, in JSON's types.
        measured: the revision when the measurement began.
        root: of the checkout.

    Raises:
        ConfigError: the revision is dirty, or the checkout changed under the measurement.
        StorageError: the file cannot be written.
    """
    measured.require_clean()
    if revision(root) != measured:
        raise ConfigError("the checkout changed during the measurement; leave it alone meanwhile and measure again")
    path = root / HISTORY
    with storage_errors(f"write {path}"), path.open("a", encoding="utf-8") as file:
        file.write(row_json({**row, "commit": measured.commit, "dirty": measured.dirty}) + "\n")
    return path


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"{root} is not a git checkout with a commit; a benchmark measures a commit, so run it in a clone"
        ) from error
    return done.stdout
