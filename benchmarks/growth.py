"""How the cost of an episode grows with its pairs: seconds for 10 to 200, and a fit a·n + b·n²."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import episode
from benchmarks.measurement import OURS, Comparison, measured_precision
from benchmarks.models import starter
from preceptor.report.page import build_report
from preceptor.report.svg import write_figures

PAIRS = (10, 20, 40, 60, 100, 200)
QUERY_TOKENS, VALUE_TOKENS = 4, 8
"""Short, so that an episode of 200 pairs fits two minutes: it has about 2,500 tokens."""


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """One comparison whose ways are the numbers of pairs, two episodes each."""
    lm = starter(context_length=8_192)
    pairs = (2, 4) if quick else PAIRS
    cases = {
        number: episode.prepare(lm, episode.Sizes(2, number, QUERY_TOKENS, VALUE_TOKENS), seed=0, copies=2)
        for number in pairs
    }
    yield Comparison(
        benchmark="growth",
        case=f"2 episodes, {QUERY_TOKENS} query and {VALUE_TOKENS} value tokens",
        ways={
            f"{OURS}, {number} pairs": measured_precision(lambda case=case: episode.ours(case))
            for number, case in cases.items()
        },
        units={f"{OURS}, {number} pairs": number for number in cases},
        details={"parameters": lm.model.num_parameters()},
    )


def fit(pairs: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """``a`` and ``b`` of seconds = a·pairs + b·pairs², by least squares of the relative error.

    >>> fit([10, 20, 40], [12.0, 28.0, 72.0])
    (1.0, 0.02)
    """
    n, y = np.asarray(pairs, dtype=float), np.asarray(seconds, dtype=float)
    (a, b), *_ = np.linalg.lstsq(np.stack([n, n**2], axis=1) / y[:, None], np.ones_like(y), rcond=None)
    return round(float(a), 6), round(float(b), 6)


def attention_dominates_from(a: float, b: float) -> float:
    """Pairs at which the quadratic part is as large as the linear one."""
    return float(torch.inf) if b <= 0 else a / b


def draw(pairs: Sequence[int], seconds: Sequence[float], path: Path) -> None:
    """The points and the fit as an SVG at ``path``, drawn as a run's page draws: the same bytes every time."""
    a, b = fit(pairs, seconds)
    measured = dict(zip(pairs, seconds, strict=True))
    x = sorted({0, *pairs, *range(0, max(pairs), max(1, max(pairs) // 40))})
    lines = {
        "measured": [measured.get(n) for n in x],  # a line leaves out what is null
        "fit a·n + b·n²": [a * n + b * n**2 for n in x],
        "its linear part a·n": [a * n for n in x],
    }
    chart = {"kind": "series", "title": "growth", "unit": "seconds, two episodes", "x_label": "pairs read"}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "result.json").write_text(json.dumps({"charts": [{**chart, "x": x, "lines": lines}]}))
        build_report(run)
        (drawing,) = write_figures(run, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawing.read_bytes())
