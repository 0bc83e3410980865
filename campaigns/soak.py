"""Kills at random moments, crashes at every operation of a save, full disks, flipped bits, races for a folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from campaigns.forked import begin
from campaigns.tally import Class
from preceptor.errors import LockedError, PreceptorError, StorageError
from preceptor.result import write_page
from preceptor.runs.checkpoint import CheckpointStore
from preceptor.runs.folder import create_run
from preceptor.runs.record import read_config, read_manifest, seal_faults

SYSTEMS = ("reading", "bandit", "curriculum", "surgery")
CLOCK = {"seconds", "tokens_per_second", "peak_memory_mib", "evaluation_seconds"}
OPERATIONS = ("open", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir")


# ---- kills ----------------------------------------------------------------------------------------------------------


def start(system: str, folder: Path) -> list[str]:
    """A smoke run that saves after every step."""
    words = ["run", system, "--preset", "smoke", "--threads", "1", "--no-report", "--set", "save_every=1"]
    return [*words, "--out", str(folder)]


def go_on(system: str, folder: Path) -> list[str]:
    """The words that resume a run, or begin it where it was killed before it had begun."""
    return ["resume", str(folder), "--no-report"] if (folder / "manifest.json").is_file() else start(system, folder)


def to_the_end(words: list[str], folder: Path) -> str | None:
    """Runs ``preceptor WORDS`` and waits for it; gives its last words if it fails."""
    errors = folder / "errors.txt"
    child = begin(words, errors)
    child.join(timeout=900)
    return None if child.exitcode == 0 else f"exit {child.exitcode}: {errors.read_text()[-400:]}"


def whole_run(system: str, folder: Path) -> tuple[Path, float]:
    """The run that nobody kills, and how long it took; made once for a campaign."""
    path, clock = folder / f"whole-{system}", folder / f"whole-{system}.seconds"
    if not clock.is_file():
        shutil.rmtree(path, ignore_errors=True)
        began = time.monotonic()
        if fault := to_the_end(start(system, path), folder):
            raise RuntimeError(fault)
        clock.write_text(str(time.monotonic() - began))
    return path, float(clock.read_text())


def content(folder: Path) -> dict[str, Any]:
    """What must be the same bit for bit: rows without the clock, the result, and the last checkpoint's tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in CLOCK}
        return [plain(item) for item in value] if isinstance(value, list) else value

    logs = {
        name: [plain(json.loads(line)) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "decisions.jsonl")
        if (folder / name).is_file()
    }
    last = max((folder / "checkpoints").iterdir())
    tensors = {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}
    return {**logs, "result": plain(json.loads((folder / "result.json").read_text())), "tensors": tensors}


def kill(system: str, rng: random.Random, folder: Path) -> str | None:
    """Up to three kills at random moments of the process's life, each followed by a resume."""
    whole, seconds = whole_run(system, folder)
    run = folder / f"killed-{system}"
    shutil.rmtree(run, ignore_errors=True)
    for _ in range(rng.randint(1, 3)):
        child = begin(go_on(system, run), folder / "errors.txt")
        child.join(timeout=rng.uniform(0.0, seconds))
        child.kill()
        child.join()
    if not (run / "result.json").is_file() and (fault := to_the_end(go_on(system, run), folder)):
        return fault
    differing = [name for name, value in content(whole).items() if content(run).get(name) != value]
    return f"differs in {', '.join(differing)}" if differing else None


# ---- saves ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def operations(before: Callable[[int, str], None]) -> Iterator[None]:
    """Calls ``before(index, name)`` before each operation on the disk in the block."""
    index = -1

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            nonlocal index
            index += 1
            before(index, name)
            return real(*given, **named)

        return operation

    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, wrapped(name, getattr(os, name))))
        yield


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"weights": {f"w{k}": torch.randn(50, generator=generator) for k in range(3)}, "step": step}


def store_with_two(folder: Path) -> CheckpointStore:
    shutil.rmtree(folder, ignore_errors=True)
    store = CheckpointStore(folder, keep_last=2)
    for step in (1, 2):
        store.save(step, state_at(step))
    return store


def is_whole(folder: Path) -> str | None:
    """The newest sound checkpoint is the one before the save that failed, or the one that it made."""
    found = CheckpointStore(folder, keep_last=2).latest()
    if found is None or found.step not in (2, 3):
        return f"the newest sound checkpoint is {found and found.step}"
    expected = state_at(found.step)["weights"]
    if any(not torch.equal(tensor, expected[name]) for name, tensor in found.state["weights"].items()):
        return f"the weights of step {found.step} are not those that were saved"
    return None


def num_operations(folder: Path) -> int:
    seen: list[int] = []
    store = store_with_two(folder)
    with operations(lambda index, _: seen.append(index)):
        store.save(3, state_at(3))
    return len(seen)


def crash(rng: random.Random, folder: Path) -> str | None:
    """A child that dies right before a random operation of a save."""
    place = folder / "crash"
    chosen = rng.randrange(num_operations(place))
    store = store_with_two(place)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), operations(lambda index, _: index == chosen and os._exit(77)):
            store.save(3, state_at(3))
        os._exit(0)
    os.waitpid(child, 0)
    return is_whole(place)


def refusal(number: int, rng: random.Random, folder: Path) -> str | None:
    """A disk that refuses from a random operation of a save on."""
    place = folder / f"refusal-{number}"
    chosen = rng.randrange(num_operations(place))
    store = store_with_two(place)

    def refuse(index: int, name: str) -> None:
        # A full disk still removes files and takes names away.
        if index >= chosen and name in ("open", "write", "fsync", "mkdir"):
            raise OSError(number, os.strerror(number))

    with contextlib.suppress(StorageError), operations(refuse):
        store.save(3, state_at(3))
    return is_whole(place)


# ---- damage ---------------------------------------------------------------------------------------------------------

HARMLESS = ("run.lock", "report.html", "plan.json")
"""The lock's note is of the last holder and never read; the page is made anew; the plan is read while a run is at
work and sealed after it."""


def flip(rng: random.Random, folder: Path) -> str | None:
    """One bit of one file of a finished run: the seal, a checkpoint's hashes or the record's reading must tell."""
    whole, _ = whole_run("reading", folder)
    run = folder / "flipped"
    if not run.is_dir():
        shutil.copytree(whole, run)
        write_page(run)
    path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size))
    before = path.read_bytes()
    bit = rng.randrange(8 * len(before))
    damaged = bytearray(before)
    damaged[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(damaged)
    try:
        if path.name in HARMLESS[:2] or told(run):
            return None
        same_seal = path.name == "seal.json" and json.loads(before) == json.loads(bytes(damaged))
        return None if same_seal else f"{path.relative_to(run)}, bit {bit}: nothing tells"
    except ValueError:
        return f"{path.relative_to(run)}, bit {bit}: unreadable, and nothing tells"
    finally:
        path.write_bytes(before)


def told(run: Path) -> bool:
    """Whether `doctor` would fail."""
    try:
        read_manifest(run)
        read_config(run)
        faults = CheckpointStore(run / "checkpoints").faults()
    except PreceptorError:
        return True
    return bool(seal_faults(run) or any(fault is not None for fault in faults.values()))


def race(rng: random.Random, folder: Path) -> str | None:
    """Two processes that begin a run in one folder at the same moment: exactly one has it."""
    place = folder / "race"
    shutil.rmtree(place, ignore_errors=True)
    moment = time.monotonic() + 0.02
    delays = [rng.uniform(0, 0.002) for _ in range(2)]
    children = []
    for delay in delays:
        child = os.fork()
        if not child:
            code = 99
            with contextlib.suppress(BaseException):
                time.sleep(max(0.0, moment + delay - time.monotonic()))
                try:
                    create_run(place, system="x", config={}, seed=0, save_every=1, device="cpu", threads=1, quiet=True)
                    code = 0
                    time.sleep(0.2)  # holds the lock while the other tries
                except (LockedError, PreceptorError):
                    code = 1
            os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    return None if codes == [0, 1] else f"the two ended with {codes}"


CLASSES = {
    **{
        f"kills-{system}": Class(200, "bit-identical after resume", functools.partial(kill, system), seconds=3600)
        for system in SYSTEMS
    },
    "crash-points": Class(500, "the old checkpoint or the new, whole", crash),
    "full-disk": Class(250, "nothing saved is lost", functools.partial(refusal, errno.ENOSPC)),
    "write-errors": Class(250, "nothing saved is lost", functools.partial(refusal, errno.EIO)),
    "flips": Class(10_000, "told, or harmless", flip, seconds=900),
    "races": Class(50, "exactly one winner", race),
}
