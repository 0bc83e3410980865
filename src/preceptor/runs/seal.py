"""The seal of a finished run: size, rows and SHA-256 of each of its files, so that a later change is noticed.

It guards against accidents (a disk that forgets, an editor that saved, a copy cut short), not against forgery: whoever
changes a file on purpose can seal the run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preceptor.errors import StorageError
from preceptor.runs.files import TEMPORARY, file_digest, replace_file, storage_errors
from preceptor.runs.lock import LOCK_NAME

SEAL_NAME = "seal.json"

_LEFT_OUT = {SEAL_NAME, LOCK_NAME, "report.html"}
"""Files that change after the end: the page is made from the others, as often as wanted."""

_MODEL_FILES = ("config.json", "adapter_config.json")
"""By these a folder inside a run is known to hold a model; checkpoints have hashes of their own."""


def seal(folder: Path) -> None:
    """Writes ``seal.json`` for the files of the run in ``folder`` as they are now."""
    with storage_errors(f"seal {folder}"):
        files = {path.relative_to(folder).as_posix(): _entry(path) for path in _sealed_files(folder)}
    content = {"sha256": _digest(files), "files": files}
    replace_file(folder / SEAL_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def seal_faults(folder: Path, *, models: bool = True) -> list[str]:
    """What differs from the seal, a line for each file; empty where all is as it was or nothing is sealed.

    Args:
        folder: of a run.
        models: look at the model folders too, which may be large.
    """
    path = folder / SEAL_NAME
    if not path.is_file():
        return []
    with storage_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        files: dict[str, dict[str, Any]] = content["files"]
        if content["sha256"] != _digest(files):
            raise ValueError("sha256 differs")
    except (ValueError, KeyError, TypeError) as error:
        return [f"{SEAL_NAME} is damaged ({error})"]
    faults = []
    for name, entry in files.items():
        if "/" in name and not models:
            continue
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
            continue
        with storage_errors(f"read {folder / name}"):
            found = _entry(folder / name)
        if found != entry:
            told = next((key for key in ("size", "rows") if found.get(key) != entry.get(key)), "sha256")
            figures = "" if told == "sha256" else f" ({told} {entry.get(told)} → {found.get(told)})"
            faults.append(f"{name} has changed{figures}")
    return faults


def require_unchanged(folder: Path, *, models: bool = False) -> None:
    """Raises ``StorageError`` naming what has changed in a finished run since it ended."""
    if faults := seal_faults(folder, models=models):
        further = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise StorageError(
            f"{folder} is not as it was when the run ended: {faults[0]}{further}; restore it from a copy, or remove "
            f"{SEAL_NAME} to use it all the same"
        )


def _digest(files: dict[str, dict[str, Any]]) -> str:
    """SHA-256 of the entries, whatever the white space between them."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sealed_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(TEMPORARY) or path.name in _LEFT_OUT:
            continue
        if path.is_file():
            yield path
        elif any((path / name).is_file() for name in _MODEL_FILES):
            yield from (file for file in sorted(path.rglob("*")) if file.is_file())


def _entry(path: Path) -> dict[str, Any]:
    digest = file_digest(path)
    rows: dict[str, Any] = {}
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            rows = {"rows": sum(1 for _ in file)}
    return {"size": digest.size, **rows, "sha256": digest.sha256}
