"""Log-probabilities of chosen tokens from hidden states: blocks of logits against a full log-softmax."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.limits import arithmetic_seconds
from benchmarks.measurement import OURS, Bar, Comparison, measured_precision, require_equal
from preceptor.lm.log_probs import chosen_log_probs

WIDTH = 768
FULL, FULL_WITHOUT, OURS_WITHOUT = "full log-softmax", "full log-softmax, no gradient", f"{OURS}, no gradient"


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Vocabularies of 4k, 50k and 128k."""
    for vocabulary, rows in ((512, 64),) if quick else ((4_096, 1_024), (50_257, 1_024), (128_256, 512)):
        yield compare(vocabulary, rows, is_large=vocabulary > 10_000)


def compare(vocabulary: int, rows: int, *, is_large: bool) -> Comparison:
    """Time and extra memory with and without gradient; values and gradients are compared first."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator) / WIDTH**0.5
    tokens = torch.randint(vocabulary, (rows,), generator=generator)

    def full(states: Tensor, weight: Tensor) -> Tensor:
        return (states @ weight.T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def chosen(states: Tensor, weight: Tensor) -> Tensor:
        return chosen_log_probs(states, weight, tokens)

    def with_gradient(way: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = states.clone().requires_grad_(), weight.detach().requires_grad_()
        log_probs = way(*leaves)
        return log_probs.detach(), *torch.autograd.grad(-log_probs.mean(), leaves)

    def without(way: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return way(states, weight)

    ways: dict[str, Callable[[], object]] = {
        OURS: measured_precision(lambda: with_gradient(chosen)),
        FULL: lambda: with_gradient(full),
        OURS_WITHOUT: measured_precision(lambda: without(chosen)),
        FULL_WITHOUT: lambda: without(full),
    }
    ours, theirs = ways[OURS](), ways[FULL]()
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    names = ("log-probabilities", "gradient of states", "gradient of weight")
    agreement = {
        name: require_equal(name, float(((a - b).abs().max() / b.abs().max()).item()), at_most=1e-4)
        for name, a, b in zip(names, ours, theirs, strict=True)
    }
    del ours, theirs
    product = 2.0 * rows * vocabulary * WIDTH
    memory = {way: extra_memory_mib(run) for way, run in ways.items()}
    bars = (
        Bar(FULL, at_least=1.0, memory_at_most=0.30 if vocabulary < 100_000 else 0.55),
        Bar(FULL, memory_at_most=0.2, way=OURS_WITHOUT),
    )
    return Comparison(
        benchmark="log-probs",
        case=f"vocabulary {vocabulary:,}, {rows:,} rows, width {WIDTH}",
        ways=ways,
        bars=bars if is_large else (),
        agreement=agreement,
        memory=memory,
        ideal_seconds={
            way: seconds * (1 if way in (OURS_WITHOUT, FULL_WITHOUT) else 3)
            for way, seconds in arithmetic_seconds(product, ways, states.device).items()
        },
    )


def extra_memory_mib(run: Callable[[], object]) -> float:
    """How far the resident set rises while ``run`` runs once more, in MiB; NaN where Linux does not say."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def kib(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there for the taking
    clear.write_text("5")  # the high-water mark starts anew
    before = kib("VmRSS")
    run()
    return (kib("VmHWM") - before) / 1024
