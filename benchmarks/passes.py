"""The same 32 rows in one backward pass and in passes of 16 and of 8: what a pass that holds less costs, and saves.

It is why ``python -m benchmarks scale`` has passes of one size: processes that share a batch each hold a part of it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.limits import arithmetic_seconds, update_operations
from benchmarks.measurement import OURS, Bar, Comparison, matmul_precision
from benchmarks.models import starter
from preceptor.lm.model import LanguageModel
from preceptor.runs.device import exact_matmul_precision


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Rows of 570 tokens, as long as the episodes of ``python -m benchmarks scale``."""
    yield compare(starter(), rows=4, time=16) if quick else compare(starter(), rows=32, time=570)


def compare(lm: LanguageModel, *, rows: int, time: int) -> Comparison:
    """Forward and backward of ``rows``, all at once, half of them at a time, and a quarter."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, lm.vocab_size, (rows, time), generator=generator)
    at_once = f"{rows} rows at once"
    ways = {at_once: passes(lm, tokens, rows)}
    ways |= {f"{OURS}, {part} rows a pass": passes(lm, tokens, part) for part in (rows // 2, rows // 4)}
    return Comparison(
        benchmark="passes",
        case=f"starter: {rows} x {time} tokens, forward and backward",
        ways=ways,
        bars=tuple(Bar(at_once, at_least=1.0, way=way) for way in ways if way != at_once),
        units=dict.fromkeys(ways, rows),
        ideal_seconds=arithmetic_seconds(update_operations(lm, rows, time), ways, lm.device),
    )


def passes(lm: LanguageModel, tokens: torch.Tensor, part: int) -> Callable[[], dict[str, float]]:
    """A call that adds up the gradients of ``part`` rows at a time; its seconds, and those of them in the kernel."""
    setting = exact_matmul_precision(lm.device)

    def run() -> dict[str, float]:
        begin = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
        with matmul_precision(setting):
            for rows in tokens.split(part):
                keep = torch.ones_like(rows, dtype=torch.bool)
                keep[:, -1] = False
                log_probs = lm.chosen_log_probs(rows, keep=keep, chosen=rows[:, 1:].flatten())
                (-log_probs.sum() / tokens[:, 1:].numel()).backward()
        lm.model.zero_grad()
        end = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "wall": time.perf_counter() - begin[0],
            "cpu": time.process_time() - begin[1],
            "in the kernel": end.ru_stime - begin[2].ru_stime,
        }

    return run
