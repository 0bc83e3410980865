"""Where and how a run computes: device, dtype, threads, and the memory it took. Reads no environment variable."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from preceptor.errors import ConfigError, did_you_mean
from preceptor.runs.world import World

_STATUS = Path("/proc/self/status")

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name`` (``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``), checked to be there.

    ``auto`` is the first GPU of CUDA, else the CPU. Raises ``ConfigError`` for a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    present = ["auto", "cpu", *(f"cuda:{index}" for index in range(num_gpus)), *(["mps"] if has_mps else [])]
    full_name = "cuda:0" if str(name) == "cuda" else str(name)
    if full_name not in present:
        raise ConfigError(
            f"device {name} is not available{did_you_mean(full_name, present)}; here: {', '.join(present)}"
        )
    return torch.device(full_name)


def choose_world_device(name: str | torch.device, world: World) -> torch.device:
    """:func:`choose_device` in a run on many processes: the first process's device, which stands for everyone's.

    Raises ``ConfigError`` for one certain GPU, and where this process has no GPU of its own.
    """
    device = choose_device(name)
    if world.size == 1 or device.type == "cpu":
        return device
    if str(name) not in ("auto", "cuda", "cuda:0"):
        raise ConfigError(
            f"with {world.size} processes each takes a GPU of its own; give --device cuda or cpu, got {name}"
        )
    return device_of("cuda:0", world)


def device_of(name: str, world: World) -> torch.device:
    """The device of this process where the first one has ``name``: the CPU, or the GPU of its local rank.

    Raises ``ConfigError`` where the machine has no such GPU.
    """
    device = torch.device(name)
    if world.size == 1 or device.type != "cuda":
        return device
    num_gpus = torch.cuda.device_count()
    if world.local_rank >= num_gpus:
        raise ConfigError(
            f"process {world.local_rank} of this machine has no GPU of its own, there are {num_gpus}; start at most "
            f"{num_gpus} processes here, or give --device cpu"
        )
    return torch.device("cuda", world.local_rank)


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point dtype called ``name``; raises ``ConfigError`` for another.

    >>> parse_dtype("bf16")
    torch.bfloat16
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not known{did_you_mean(name, _DTYPES)}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def set_threads(num_threads: int | None = None) -> int:
    """Sets how many threads torch computes with and returns it; the count changes last bits, so a run records it.

    ``None`` is 1 where this process may use at most two cores, and torch's own choice (one per physical core) on
    larger machines. Two threads on two cores are up to twice as fast on an idle machine, but ten times *slower* than
    one as soon as anything else runs, because each small operation then waits for the thread that was preempted.
    """
    if num_threads is None:
        num_threads = 1 if _num_cores() <= 2 else torch.get_num_threads()
    if num_threads < 1:
        raise ConfigError(f"the number of threads must be at least 1, got {num_threads}")
    torch.set_num_threads(num_threads)
    return num_threads


def exact_matmul_precision(device: torch.device) -> str:
    """The setting of ``torch.set_float32_matmul_precision`` that may take the faster kernel without losing accuracy.

    ``medium`` allows kernels of less than float32 accuracy. On some processors it merely routes float32 products to a
    faster library of the same accuracy; on others, and on GPUs, it means bfloat16 or TF32. So the error is measured
    here, on this device: ``medium`` where it is no more than twice that of ``highest``, else ``highest``. The setting
    itself is left as it was.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    errors = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        product = (left.to(device) @ right.to(device)).cpu()
        errors[precision] = float((product - exact).abs().max())
    torch.set_float32_matmul_precision(before)
    return "medium" if errors["medium"] <= 2 * errors["highest"] else "highest"


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far, in MiB: tensors on a GPU, else the resident set of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.is_file():  # Linux, whose `ru_maxrss` begins with what the process that started this one held
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB elsewhere


def _num_cores() -> int:
    """Cores that this process may run on, which a container or ``taskset`` can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
