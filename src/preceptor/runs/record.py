"""What a run's folder says about itself: its name, ``config.yaml``, ``manifest.json``, and its seal at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from preceptor.errors import ConfigError, StorageError
from preceptor.runs.files import LOCK_NAME, TEMPORARY, FolderLock, file_digest, replace_file, storage_errors
from preceptor.runs.metrics import JsonlLog, json_fault

RECORD = ("manifest.json", "config.yaml", "notices.log", LOCK_NAME)
"""What a run's folder holds before it has begun; removed in this order, since without a manifest there is no run."""

_SCHEMA = 1
_FIELDS = ("seed", "streams", "save_every", "keep_last", "trackers", "device", "code", "config", "environment")


def write_record(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``config.yaml`` and then ``manifest.json``, whose presence means that the run has begun."""
    config = yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True)
    # This order: with the manifest there, config.yaml is there too.
    replace_file(path / "config.yaml", config)
    text = json.dumps({**manifest, "schema": _SCHEMA}, indent=2, ensure_ascii=False)
    replace_file(path / "manifest.json", text + "\n")


def require_free(path: Path) -> None:
    """Raises ``ConfigError`` unless ``path`` is absent, empty, or holds only what a killed ``create_run`` left."""
    with storage_errors(f"look into {path}"):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; give a folder for the run")
        names = set(os.listdir(path)) if path.is_dir() else set()
    if "manifest.json" in names:
        raise ConfigError(f"{path} already holds a run; go on with: preceptor resume {path}, or choose another folder")
    # What a `create_run` that was killed may have left; anything else is somebody's file.
    unfinished = {LOCK_NAME, "config.yaml", f"{TEMPORARY}config.yaml", f"{TEMPORARY}manifest.json"}
    if names and not (LOCK_NAME in names and names <= unfinished):
        raise ConfigError(f"{path} is not empty and not a run (it has {sorted(names)[0]!r}); choose another folder")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with tuples as lists, so that YAML and JSON give back what was put in."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    copy: dict[str, Any] = plain(config)
    # Before the run begins and not when it ends: what cannot be written down cannot be resumed.
    if fault := json_fault(copy, "config"):
        raise ConfigError(
            f"the configuration cannot be written down: {fault}; use finite numbers, text, lists, mappings"
        )
    return copy


def discard_unbegun(path: Path) -> None:
    """Removes the run in ``path`` if it did nothing before it failed: a folder that holds its own record alone.

    Whatever a system has written, be it one row, makes it a run that has begun; then nothing is changed.
    """
    with contextlib.ExitStack() as on_exit, storage_errors(f"remove {path}"):
        on_exit.callback(FolderLock(path).release)
        if set(os.listdir(path)) <= set(RECORD):
            for name in RECORD:
                (path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # no longer empty: another process has begun a run here
                path.rmdir()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run in ``path``; ``StorageError`` when damaged, ``ConfigError`` when of another version."""
    with storage_errors(f"read {path / 'manifest.json'}"):
        text = (path / "manifest.json").read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(text)
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path / 'manifest.json'} is damaged ({error}); restore it from a copy") from error
    if schema != _SCHEMA:
        raise ConfigError(f"{path} was written by another version (schema {schema}, this one reads {_SCHEMA})")
    if missing := [name for name in _FIELDS if name not in manifest]:
        raise StorageError(f"{path / 'manifest.json'} is damaged (no {', '.join(missing)}); restore it from a copy")
    return manifest


def read_config(path: Path) -> dict[str, Any]:
    """``config.yaml`` as it is now, perhaps edited; ``ConfigError`` when it is not a mapping in YAML."""
    with storage_errors(f"read {path / 'config.yaml'}"):
        text = (path / "config.yaml").read_bytes()
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path / 'config.yaml'} is not readable YAML: {reason}; restore it from a copy") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.yaml'} must hold a mapping, got {type(config).__name__}")
    return config


def extend_record(path: Path, manifest: dict[str, Any], config: dict[str, Any], *, changed: list[str]) -> None:
    """Writes the ``config`` to go on with into the record, with what ``changed``; moves the old end's result aside."""
    last_step = JsonlLog(path / "metrics.jsonl", one_row_per_step=True).last_step
    manifest["config"] = config
    manifest.setdefault("extensions", []).append({"step": last_step, "changed": changed})
    with storage_errors(f"extend {path}"):
        if (path / "result.json").is_file():
            os.replace(path / "result.json", path / f"result-step-{last_step:06d}.json")
    write_record(path, manifest)


# ---- names of run folders -------------------------------------------------------------------------------------------


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


# ---- the seal of a finished run -------------------------------------------------------------------------------------

SEAL_NAME = "seal.json"

_LEFT_OUT = {SEAL_NAME, LOCK_NAME, "report.html"}
"""Files that change after the end: the page is made from the others, as often as wanted."""

_MODEL_FILES = ("config.json", "adapter_config.json", "teacher.json", "surgeon.json")
"""By these a folder inside a run is known to hold what was learned; checkpoints have hashes of their own."""


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
