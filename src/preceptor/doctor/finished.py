"""Whether the folder of a run is whole and can still be trusted: hashes, logs, lock, environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from preceptor.doctor.check import Check, judged
from preceptor.errors import PreceptorError
from preceptor.runs import environment as env
from preceptor.runs.checkpoint import CheckpointStore
from preceptor.runs.device import choose_device
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.record import SEAL_NAME, read_config, read_manifest, seal_faults
from preceptor.runs.watching import is_at_work

FLOORS = {"torch": (2, 11), "transformers": (5, 5)}
"""Below these, loading a file can run code that is in it (CVE-2025-32434, CVE-2026-24747, CVE-2026-5241)."""


def check_run(folder: Path) -> Iterator[Check]:
    """Every check of the run in ``folder``; nothing in it is changed or locked."""
    try:
        manifest = read_manifest(folder)
    except PreceptorError as error:
        yield Check("fail", "manifest", str(error))
        # Nothing can be said of a folder without a readable manifest, so this is the only check that ends the list.
        return
    yield Check("ok", "manifest", f"{manifest['system']}, seed {manifest['seed']}, begun {manifest.get('started')}")
    try:
        edited = env.changes(env.flattened(manifest["config"]), env.flattened(read_config(folder)))
        remedy = "put config.yaml back to what the manifest says, or resume with --allow-inexact"
        yield judged(not edited, "configuration", ", ".join(edited) or "as it was when the run began", remedy)
    except PreceptorError as error:
        yield Check("fail", "configuration", str(error))
    # Early, since a run at work changes under the checks that follow.
    yield _lock(folder)
    # Decisions have many rows a step, metrics one.
    for name in ("metrics.jsonl", "decisions.jsonl"):
        yield _log(folder / name, once=name == "metrics.jsonl")
    yield from _checkpoints(folder)
    yield _result(folder)
    if (folder / "result.json").is_file():
        yield _seal(folder)
    yield from _environment(manifest)


def _lock(folder: Path) -> Check:
    if is_at_work(folder):
        return Check("warn", "lock", "a process is at work on it", "wait for it before judging the rest")
    return Check("ok", "lock", "free")


def _log(path: Path, *, once: bool) -> Check:
    """Rows that parse, in the order of their steps; a metrics log has one a step."""
    if not path.is_file():
        return Check("warn", path.name, "there is none", "the run has not done its first step")
    count, last = 0, -1
    try:
        # Equal steps in metrics.jsonl can mean that a resume did not cut the rows after its checkpoint.
        for row in read_jsonl(path):
            if row["step"] < last or (once and row["step"] == last):
                figure = f"step {row['step']} after step {last}, in row {count + 1}"
                return Check("fail", path.name, figure, "restore the file from a copy, or resume, which rewrites it")
            count, last = count + 1, row["step"]
    except PreceptorError as error:
        return Check("fail", path.name, str(error))
    return Check("ok", path.name, f"{count:,} rows, the last of step {last}")


def _checkpoints(folder: Path) -> Iterator[Check]:
    # Every file against the hash that was recorded when it was written.
    faults = CheckpointStore(folder / "checkpoints").faults()
    if not faults:
        yield Check("warn", "checkpoints", "there is none", "a resume starts at the first step")
    for step, fault in sorted(faults.items()):
        remedy = "an older checkpoint is used in its place; restore it from a copy if there is one"
        yield judged(fault is None, f"checkpoint of step {step}", fault or "every byte is as it was written", remedy)


def _result(folder: Path) -> Check:
    path = folder / "result.json"
    if not path.is_file():
        return Check("warn", "result", "the run has not ended", f"go on with: preceptor resume {folder}")
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        return Check("fail", "result", f"{path.name} is damaged ({error})", "restore it, or resume to write it again")
    records = result.get("records") if isinstance(result, dict) else None
    return Check("ok", "result", f"{len(records)} records" if isinstance(records, list) else "no records of arms")


def _seal(folder: Path) -> Check:
    """Every file as it was when the run ended."""
    if not (folder / SEAL_NAME).is_file():
        return Check(
            "warn", "seal", "there is none", "changes since its end cannot be told; runs are sealed from now on"
        )
    faults = seal_faults(folder)
    further = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    figure = f"{faults[0]}{further}" if faults else "every file is as it was when the run ended"
    return judged(not faults, "seal", figure, "restore it from a copy")


def _environment(manifest: dict[str, object]) -> Iterator[Check]:
    recorded = manifest["environment"]
    assert isinstance(recorded, dict)
    try:
        here = env.environment(choose_device(str(manifest["device"])), recorded["threads"])
        # A setting of the run, not of this machine.
        here["float32_matmul_precision"] = recorded.get("float32_matmul_precision")
        # Only what changes numbers: library versions, device, threads.
        differing = env.changes(recorded, here, env.EXACT)
        remedy = "a resume here is not bit-exact; go back to these versions, or pass --allow-inexact"
        figure = ", ".join(differing) or "as when the run began"
        yield Check("warn" if differing else "ok", "environment", figure, remedy)
    except PreceptorError as error:
        yield Check("warn", "environment", str(error), "resume on a machine like the first")
    for package, floor in FLOORS.items():
        version = str(recorded.get(package))
        # Release numbers alone: "2.11.0+cpu" is 2.11.
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        least = ".".join(map(str, floor))
        yield judged(numbers >= floor, package, f"{version} (at least {least})", f"install {package}>={least}")
