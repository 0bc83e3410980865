"""``config.yaml`` and ``manifest.json``: what is written when a run begins, and how it is read back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from preceptor.errors import ConfigError, StorageError
from preceptor.runs.files import TEMPORARY, replace_file, storage_errors
from preceptor.runs.lock import LOCK_NAME, FolderLock
from preceptor.runs.strict_json import json_fault

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
