"""What a run's exact numbers depend on besides its configuration, and how two such records differ."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from preceptor.lm.cpu.kernels import kernel_library
from preceptor.runs.device import exact_matmul_precision, set_threads
from preceptor.runs.world import ALONE, World
from preceptor.version import __version__

EXACT = (
    *("preceptor", "torch", "transformers", "machine", "cpu", "device", "threads"),
    *("float32_matmul_precision", "kernels", "processes"),
)
"""The fields that change the last bits of a result; the others of ``environment`` are for the reader."""


def environment(device: torch.device, num_threads: int, *, num_processes: int = 1) -> dict[str, Any]:
    """Versions, machine, device and numerical settings of this process, and how many processes share the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "preceptor": __version__,
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": f"{device} ({name})" if name else str(device),
        "threads": num_threads,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "processes": num_processes,
        "kernels": "pytorch" if kernel_library() is None else "compiled",
    }


def prepare(
    device: str, threads: int | None, float32_matmul_precision: str | None, world: World = ALONE
) -> dict[str, Any]:
    """Sets the process-wide numerics and returns the environment with them."""
    num_threads = set_threads(threads)
    torch.set_float32_matmul_precision(float32_matmul_precision or exact_matmul_precision(torch.device(device)))
    return environment(torch.device(device), num_threads, num_processes=world.size)


def code_version() -> dict[str, Any]:
    """``commit`` of the checkout that this package runs from and whether it is ``dirty``; ``None`` when installed."""
    package = Path(__file__).parents[1] / "__init__.py"

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git here: the commit is unknown, which is what the manifest then says
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository; only a tracked file makes the commit ours.
    if git("ls-files", "--error-unmatch", package.name) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], fields: Iterable[str] | None = None) -> list[str]:
    """``["threads 1 → 2", ...]`` for the ``fields`` (default: all) whose values differ.

    >>> changes({"threads": 1, "torch": "2.13"}, {"threads": 2, "torch": "2.13"})
    ['threads 1 → 2']
    """
    names = fields if fields is not None else dict.fromkeys([*old, *new])
    pairs = [(name, old.get(name, "absent"), new.get(name, "absent")) for name in names]
    return [f"{name} {before} → {after}" for name, before, after in pairs if before != after]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``config`` with nested mappings as dotted keys.

    >>> flattened({"seed": 1, "policy": {"rank": 8}})
    {'seed': 1, 'policy.rank': 8}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
