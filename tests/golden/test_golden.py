"""Every system's smoke run, number by number, against the files beside this one.

They were made on one thread by ``preceptor run SYSTEM --preset smoke --threads 1``. On the machine that made them every
number must be the same to the last bit; elsewhere sums are taken in another order, and 1e-5 is allowed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent
MEASURED = ("seconds", "evaluation_seconds", "tokens_per_second", "peak_memory_mib")
"""What depends on the machine's speed and memory."""

TOLERANCE = 1e-5
"""Elsewhere: absolute, or relative where a number is above 1. float32 rounding grows to 1e-6 over these short runs."""
ILL_CONDITIONED = ("acceptance_z", "gradient_norm", "action_norm", "surgeon_")
"""Beginnings of names of metrics in which rounding grows: a quotient of tiny differences, the gradient where a ratio
stands at the clip's edge, a soft actor-critic's own numbers. Another instruction set moved them by up to 3e-3."""
ILL_CONDITIONED_TOLERANCE = 1e-2


def _machine() -> str:
    """A digest of the processor's model and features; empty where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.is_file():
        return ""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    lines = [line for line in first if line.partition("\t")[0].strip(" :") in wanted]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the last bits of a run."""
    environment = manifest["environment"]
    names = ("torch", "cpu", "threads", "float32_matmul_precision", "kernels")
    return {"machine": _machine(), **{name: environment[name] for name in names}}


def _differences(golden: Any, now: Any, *, exact: bool, place: str = "") -> Iterator[str]:
    """Places at which ``now`` is not ``golden``; keys that only ``now`` has are new, and no difference."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key, value in golden.items():
            if key in MEASURED:
                continue
            if key not in now:
                yield f"{place}.{key}: gone"
            else:
                yield from _differences(value, now[key], exact=exact, place=f"{place}.{key}")
    elif isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        for index, (value, other) in enumerate(zip(golden, now, strict=True)):
            yield from _differences(value, other, exact=exact, place=f"{place}[{index}]")
    elif isinstance(golden, float) and isinstance(now, float) and not exact:
        grows = place.rpartition(".")[2].startswith(ILL_CONDITIONED)
        tolerance = ILL_CONDITIONED_TOLERANCE if grows else TOLERANCE
        if abs(golden - now) > tolerance * max(1.0, abs(golden), abs(now)):
            yield f"{place}: {golden!r}, now {now!r}"
    elif golden != now or type(golden) is not type(now):
        yield f"{place}: {golden!r}, now {now!r}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("system", ["reading", "bandit", "curriculum", "surgery"])
def test_smoke_run_is_golden(system: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "preceptor", "run", system, "--preset", "smoke", "--threads", "1", "--no-report"]
    run = subprocess.run([*words, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    exact = identity(manifest) == json.loads((GOLDEN / "machine.json").read_text())
    golden, metrics = _rows(GOLDEN / system / "metrics.jsonl"), _rows(tmp_path / "run" / "metrics.jsonl")
    differing = list(_differences(golden, metrics, exact=exact, place="metrics"))
    golden_result = json.loads((GOLDEN / system / "result.json").read_text())
    del golden_result["config"]  # what was asked for, not what came of it
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    differing += _differences(golden_result, result, exact=exact, place="result")
    assert not differing, "\n".join(differing[:20])
    rewards = [row["reward"] for row in golden if row.get("reward") is not None]
    assert len(set(rewards)) > 1, "a run whose rewards do not vary would pin nothing down"


def test_a_changed_number_is_seen() -> None:
    """The comparison itself: one bit on the same machine, 1e-5 elsewhere, whatever the nesting."""
    golden = {"a": [{"b": 0.5, "seconds": 1.0}], "n": 3, "t": "x"}
    assert list(_differences(golden, {"a": [{"b": 0.5, "seconds": 9.0}], "n": 3, "t": "x", "new": 1}, exact=True)) == []
    near, far = 0.5 + 1e-7, 0.5 + 3e-5
    assert list(_differences(golden, {**golden, "a": [{"b": near}]}, exact=True)) == [f".a[0].b: 0.5, now {near}"]
    assert list(_differences(golden, {**golden, "a": [{"b": near}]}, exact=False)) == []
    assert list(_differences(golden, {**golden, "a": [{"b": far}]}, exact=False)) == [f".a[0].b: 0.5, now {far}"]
    for changed in ({**golden, "n": 4}, {**golden, "t": "y"}, {**golden, "a": []}, {"a": golden["a"], "n": 3}):
        assert len(list(_differences(golden, changed, exact=False))) == 1
