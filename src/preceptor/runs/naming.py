"""How run folders are called."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from preceptor.errors import ConfigError
from preceptor.runs.files import storage_errors


def check_run_name(name: str) -> str:
    """``name`` if it may name a run folder, else ``ConfigError``: 1 to 64 of ``A-Z a-z 0-9 . _ -``, no leading dot."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(f"run name {name!r} is not allowed; use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot")
    return name


def default_run_path(root: Path, system: str, today: date) -> Path:
    """``root/<system>-<date>-<n>``, an empty folder made here with the next free n; two processes never share it."""
    stem = check_run_name(f"{system}-{today.isoformat()}-1").removesuffix("1")
    with storage_errors(f"create a run folder in {root}"):
        root.mkdir(parents=True, exist_ok=True)
        taken = [match[1] for path in root.iterdir() if (match := re.fullmatch(re.escape(stem) + r"(\d+)", path.name))]
        number = max(map(int, taken), default=0) + 1
        while True:
            path = root / f"{stem}{number}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return path
