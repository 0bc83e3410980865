"""What the hardware alone would take: its bandwidth and its arithmetic, measured where the benchmark runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.measurement import matmul_precision
from preceptor.lm.model import LanguageModel
from preceptor.runs.device import exact_matmul_precision


def forward_operations(lm: LanguageModel, rows: int, length: int) -> float:
    """2 operations a weight and token, and those of causal attention, for rows that are encoded once."""
    config = lm.model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return rows * length * float(2 * lm.model.num_parameters() + 2 * config.num_hidden_layers * width * length)


def update_operations(lm: LanguageModel, rows: int, length: int) -> float:
    """Forward and backward, which is twice the forward (model-FLOPs utilisation)."""
    return 3 * forward_operations(lm, rows, length)


def arithmetic_seconds(operations: float, ways: Iterable[str], device: torch.device) -> dict[str, float]:
    """What ``operations`` take by :func:`arithmetic`, for each way in its own precision."""
    size = 1_024 if device.type == "cpu" else 8_192
    exact, rounded = (arithmetic(device, size, dtype) for dtype in (torch.float32, torch.bfloat16))
    return {way: operations / (rounded if "bfloat16" in way else exact) for way in ways}


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of ``size``² bfloat16 numbers reads and writes."""
    source = torch.zeros(size, size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def bandwidth_seconds(num_bytes: float, ways: Iterable[str]) -> dict[str, float]:
    """What reading and writing ``num_bytes`` take on this processor by :func:`bandwidth` of 8 MiB."""
    return dict.fromkeys(ways, num_bytes / bandwidth(torch.device("cpu"), 2_048))


def arithmetic(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Operations a second of a product of two matrices of ``size`` rows and columns, by the measured kernel."""
    matrix = torch.randn(size, size, device=device).to(dtype)
    with matmul_precision(exact_matmul_precision(device)):
        return 2 * size**3 / _seconds(lambda: matrix @ matrix, device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The best of many repetitions: a limit that a busy spell has lowered would be passed."""
    run = synchronised(run, device)
    run()
    found = []
    for _ in range(40):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def synchronised(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """``run`` until the device has done it."""

    def call() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
