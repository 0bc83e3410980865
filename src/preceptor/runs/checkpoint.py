"""Checkpoints that are whole or absent, verified before use, and never a pickle.

One checkpoint holds one nested ``state_dict``: a folder ``step-000123`` with a safetensors file for each of its keys
that has tensors, ``state.json`` for all that is no tensor, and ``manifest.json``, which lists size and SHA-256 of the
others and carries its own. The order of a save is: temporary folder, files, fsync of each, manifest, fsync of the
folder, rename, fsync of the parent, and only then pruning. A kill between any two of these leaves the previous
checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preceptor.errors import CheckpointError, ConfigError, StorageError
from preceptor.runs.files import TEMPORARY, Digest, file_digest, storage_errors, sync_folder, write_file
from preceptor.runs.tensors import join_state, num_bytes, read_tensors, split_state, write_tensors

SCHEMA = 2
EARLIER_SCHEMAS = (1,)
"""Whose bytes can still be verified, but whose parts are laid out otherwise: such a run cannot go on."""
_REPLACED = ".replaced-"
_SPARE_BYTES = 1 << 20  # headers, the manifest, and what the file system adds


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the nested ``state`` that was saved after ``step``, its tensors on the CPU."""

    step: int
    path: Path
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints under ``root``, of which the newest ``keep_last`` are kept, by step.

    What ``latest`` found damaged does not count and goes at the next save; what rots unseen while a process runs does
    count, but the checkpoint just saved is always kept. ``notices`` says what ``latest`` passed over. One process at a
    time may save: the run folder's lock sees to it.
    """

    def __init__(self, root: Path, *, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ConfigError(f"keep_last must be at least 1, got {keep_last}")
        self.root = root
        self.keep_last = keep_last
        self.notices: list[str] = []
        self._damaged: set[int] = set()

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Saves ``state`` as the checkpoint of ``step`` and returns its folder.

        ``state`` is any nesting of mappings, lists, tuples, tensors and plain values, as ``state_dict`` gives it; its
        own keys name files. A checkpoint of the same step is replaced. Raises ``StorageError`` when the disk is full or
        refuses, and ``CheckpointError`` when something cannot be saved exactly; the checkpoints that were there are
        untouched.
        """
        if step < 0:
            raise CheckpointError(f"a step cannot be negative, got {step}")
        # Keys become file names, so nothing in them may leave the folder.
        if faulty := [key for key in state if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(key))]:
            raise CheckpointError(f"a state cannot have a part named {faulty[0]!r}; allowed are letters, digits, . _ -")
        # Everything is split and measured before the first byte is written: most failures happen here.
        parts = {key: split_state(part, key) for key, part in state.items()}
        rest = {key: plain for key, (_, plain) in parts.items()}
        text = json.dumps(rest).encode()
        num_needed = sum(num_bytes(tensors) for tensors, _ in parts.values()) + len(text) + _SPARE_BYTES

        final, temporary = self.root / _name(step), self.root / f"{TEMPORARY}{_name(step)}"
        with storage_errors(f"save checkpoint {_name(step)} in {self.root}", safe=self._safe()):
            self.root.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            # Asked in advance, since a full disk in the middle of a save is slow to find and slow to clear.
            self._require_space(num_needed, step)
            try:
                os.mkdir(temporary)
                files: dict[str, Digest] = {}
                for key, (tensors, _) in parts.items():
                    if tensors:
                        files[f"{key}.safetensors"] = write_tensors(temporary / f"{key}.safetensors", tensors)
                files["state.json"] = write_file(temporary / "state.json", [text])
                # The manifest comes after the files it lists, and lists their hashes.
                write_file(temporary / "manifest.json", [_manifest_text(step, files)])
                # Names are in the folder, not in the files: without this fsync a power cut may lose them.
                sync_folder(temporary)
                if final.exists():
                    os.rename(final, self.root / f"{_REPLACED}{_name(step)}")  # `_paths` finds it if we die here
                # The one moment at which the new checkpoint appears; a rename is atomic.
                os.rename(temporary, final)
                sync_folder(self.root)
            finally:
                # Gives the space back, whatever failed; on success the folder has its final name by now.
                shutil.rmtree(temporary, ignore_errors=True)
        self._damaged.discard(step)
        with storage_errors(f"remove old checkpoints in {self.root}", safe=f"checkpoint {_name(step)} is saved"):
            self._clear_leftovers()
            # Only now: until here the old checkpoints are the only ones that are sure.
            self._prune(step)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written, or ``None`` when there is none at all.

        Damaged ones are passed over and told in ``notices``. Raises ``CheckpointError`` when there are checkpoints but
        none is sound. Nothing on the disk is changed.
        """
        faults: dict[int, str] = {}
        self.notices = []
        paths = self._paths()
        # Newest first; verification reads every byte, so it stops at the first sound one.
        for step in sorted(paths, reverse=True):
            fault = _fault(paths[step], step)
            if fault:
                faults[step] = fault
                continue
            if _schema(paths[step]) in EARLIER_SCHEMAS:
                raise CheckpointError(
                    f"{paths[step]} was saved by an earlier version of Preceptor, which lays state out otherwise; "
                    "resume the run with that version, or start a new one"
                )
            self._damaged = set(faults)
            for damaged, reason in faults.items():
                self.notices.append(f"checkpoint {_name(damaged)} is damaged ({reason}); using {_name(step)}")
            return _read(paths[step], step)
        if faults:
            reasons = ", ".join(f"{_name(step)}: {reason}" for step, reason in list(faults.items())[:3])
            raise CheckpointError(
                f"no usable checkpoint in {self.root} ({len(faults)} found, {len(faults)} damaged: {reasons}); "
                "nothing was changed"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, which another process of the run has verified.

        Raises ``CheckpointError`` where this process does not see it: all of them must share the run folder.
        """
        paths = self._paths()
        if step not in paths:
            raise CheckpointError(
                f"{self.root / _name(step)} is not here, though the run's first process has it; "
                "put the run folder on a disk that all machines share"
            )
        return _read(paths[step], step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first, not verified."""
        return sorted(self._paths())

    def faults(self) -> dict[int, str | None]:
        """What is wrong with the checkpoint of each step, every byte of it read; ``None`` where it is sound."""
        return {step: _fault(path, step) for step, path in sorted(self._paths().items())}

    def _paths(self) -> dict[int, Path]:
        """Step → folder. A replaced folder counts only while its successor is missing: a kill between two renames."""
        paths: dict[int, Path] = {}
        with storage_errors(f"list the checkpoints in {self.root}"):
            names = os.listdir(self.root) if self.root.is_dir() else []
        # Replaced ones first, so that a checkpoint under its own name takes their place in the dictionary.
        for prefix in (_REPLACED, ""):
            for name in names:
                if match := re.fullmatch(rf"{re.escape(prefix)}step-(\d{{6,}})", name):
                    paths[int(match[1])] = self.root / name
        return paths

    def _safe(self) -> str:
        sound = [step for step in self.steps() if step not in self._damaged]
        return f"checkpoint {_name(sound[-1])} is intact" if sound else "there is no earlier checkpoint"

    def _require_space(self, num_needed: int, step: int) -> None:
        num_free = shutil.disk_usage(self.root).free
        if num_free < num_needed:
            raise StorageError(
                f"disk full: checkpoint {_name(step)} in {self.root} needs {num_needed / 2**20:,.1f} MiB, "
                f"{num_free / 2**20:,.1f} MiB are free; free some space and resume; {self._safe()}"
            )

    def _clear_leftovers(self) -> None:
        """Removes what a killed save or removal left, and puts a replaced checkpoint back if nothing took its place."""
        for path in sorted(self.root.iterdir()):
            if path.name.startswith(TEMPORARY):
                shutil.rmtree(path)
            elif path.name.startswith(_REPLACED):
                final = self.root / path.name.removeprefix(_REPLACED)
                if final.exists():
                    self._remove(path)
                else:
                    os.rename(path, final)

    def _prune(self, saved: int) -> None:
        """Keeps the newest ``keep_last`` checkpoints and the one just ``saved``; by step, never by time."""
        paths = self._paths()
        # A damaged one must not take the place of a sound one.
        candidates = [step for step in sorted(paths, reverse=True) if step not in self._damaged]
        kept = {saved, *candidates[: self.keep_last]}
        for step in sorted(set(paths) - kept):
            self._remove(paths[step])
            self._damaged.discard(step)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill halfway leaves rubbish, not a checkpoint that looks damaged.
        rubbish = path.with_name(f"{TEMPORARY}{path.name}")
        os.rename(path, rubbish)
        shutil.rmtree(rubbish)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _manifest_text(step: int, files: Mapping[str, Digest]) -> bytes:
    """The manifest's exact bytes: compact JSON whose last field is the SHA-256 of the rest."""
    listed = {name: digest._asdict() for name, digest in files.items()}
    return _signed({"schema": SCHEMA, "step": step, "torch": str(torch.__version__), "files": listed})


def _signed(body: dict[str, Any]) -> bytes:
    sha256 = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": sha256}).encode()


def _fault(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint in ``path``, or ``None`` when every byte is as it was written."""
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        # The manifest's own hash covers everything but itself.
        del manifest["sha256"]
        if raw != _signed(manifest):
            return "manifest.json: sha256 differs"
        if manifest["schema"] not in (SCHEMA, *EARLIER_SCHEMAS):
            return f"manifest.json: schema {manifest['schema']}, this version reads {SCHEMA}"
        if manifest["step"] != step:
            return f"manifest.json: it is of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            found = file_digest(path / name)
            if found.size != expected["size"]:
                return f"{name}: {found.size} bytes, {expected['size']} expected"
            if found.sha256 != expected["sha256"]:
                return f"{name}: sha256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json: not readable"
    return None


def _schema(path: Path) -> int:
    return int(json.loads((path / "manifest.json").read_bytes())["schema"])


def _read(path: Path, step: int) -> Checkpoint:
    with storage_errors(f"read checkpoint {path}"):
        # Named after the keys of the state, as `save` wrote them.
        tensors = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
        rest = json.loads((path / "state.json").read_bytes())
    return Checkpoint(step, path, {key: join_state(tensors.get(key, {}), plain) for key, plain in rest.items()})


# ---- what a checkpoint holds ----------------------------------------------------------------------------------------


@runtime_checkable
class Stateful(Protocol):
    """What can be put into a checkpoint and taken back: torch's own protocol of this name."""

    def state_dict(self) -> dict[str, Any]:
        """All that learning has changed, as nested mappings, lists, tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes over what ``state_dict`` gave, perhaps in another process."""
        ...


@torch.no_grad()
def copy_tensors(
    saved: Mapping[str, Tensor], live: Mapping[str, Tensor], *, only: Collection[str] | None = None
) -> None:
    """Writes ``saved`` into ``live`` in place, so that whoever holds these tensors goes on with them.

    ``only`` names those to write; None is all of them. Raises ``CheckpointError`` when the names differ; then nothing
    is changed.
    """
    # Names first: a checkpoint of another model must not change half of this one.
    if saved.keys() != live.keys():
        name = sorted(saved.keys() ^ live.keys())[0]
        raise CheckpointError(
            f"the checkpoint's parameters are not this model's ('{name}'); resume with the same model"
        )
    # In place: the optimizer and its callers hold these very tensors.
    for name in live if only is None else only:
        live[name].copy_(saved[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of any torch optimizer and what it is the state of; ``load_optimizer`` is the inverse."""
    return {"kind": type(optimizer).__name__, "shapes": _shapes(optimizer), "state": optimizer.state_dict()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts ``optimizer`` where ``optimizer_state`` found another one of the same kind over the same parameters.

    Learning rates and all other settings come from the saved state: this is a resume, not a warm start. Raises as
    :func:`check_optimizer`, before anything changes.
    """
    check_optimizer(optimizer, state)
    saved = state["state"]
    optimizer.load_state_dict(saved)
    # torch casts floating-point state to the parameter's dtype; what was kept in another one must stay in it.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in saved["state"].items():
        if not isinstance(index, int):
            continue  # not about a parameter: torch passes it through as it is
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raises ``CheckpointError`` when kind, parameter shapes or settings' names are not those of ``optimizer``."""
    kind = type(optimizer).__name__
    if state["kind"] != kind:
        raise CheckpointError(f"the checkpoint's optimizer is {state['kind']}, this run's is {kind}")
    # Shapes and not names: torch's optimizers know parameters by their place.
    if state["shapes"] != _shapes(optimizer):
        raise CheckpointError(f"the checkpoint's {kind} has other parameters: {_first_difference(state, optimizer)}")
    for index, (old, new) in enumerate(zip(state["state"]["param_groups"], optimizer.param_groups, strict=True)):
        if differing := set(old) ^ set(new):
            raise CheckpointError(f"settings of {kind} group {index} differ: {', '.join(sorted(differing))}")


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _first_difference(state: Any, optimizer: torch.optim.Optimizer) -> str:
    saved, own = ([shape for group in groups for shape in group] for groups in (state["shapes"], _shapes(optimizer)))
    for index, (old, new) in enumerate(zip(saved, own, strict=False)):
        if old != new:
            return f"parameter {index} is {old}, here {new}"
    return f"{len(saved)} in {len(state['shapes'])} groups, here {len(own)} in {len(optimizer.param_groups)}"
