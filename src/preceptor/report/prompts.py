"""How the probabilities of the words moved under every prompt of a bandit, drawn from ``decisions.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.report.charts import Matrix, matrices
from preceptor.report.run_folder import is_finite, read_rows

NUM_STRETCHES = 8
MAXIMUM_PROMPTS = 40
"""Of one bandit."""
MAXIMUM_MATRICES = 12

Pulls = list[tuple[str, list[float]]]
"""(prompt, probability of each word)."""


def prompt_matrices(decisions: Path) -> list[Matrix]:
    """A table for each bandit and word: prompts by eighths of the pulls. Nothing where the rows are no such pulls.

    Of two words the first stands for both.

    Raises:
        DataError: a malformed row, naming its line.
    """
    bandits: dict[tuple[str, tuple[str, ...]], Pulls] = {}
    for _, row in read_rows(decisions):
        if is_pull(row):
            key = (str(row.get("bandit", "")), tuple(map(str, row["words"])))
            bandits.setdefault(key, []).append((str(row["prompt"]), row["probabilities"]))
    tables = []
    for (bandit, words), pulls in bandits.items():
        prompts = sorted({prompt for prompt, _ in pulls})[:MAXIMUM_PROMPTS]
        for index, word in enumerate(words[:1] if len(words) == 2 else words):
            values = [[_mean(stretch, prompt, index) for stretch in _stretches(pulls)] for prompt in prompts]
            tables.append(
                {
                    "kind": "matrix",
                    "title": f"Probability of '{word}' under each prompt, {bandit}",
                    "unit": f"mean over each of {NUM_STRETCHES} equal parts of the pulls, in their order",
                    "rows": prompts,
                    "columns": [f"part {k + 1}" for k in range(NUM_STRETCHES)],
                    "values": values,
                    "low": 0.0,
                    "high": 1.0,
                }
            )
    return matrices(tables[:MAXIMUM_MATRICES])


def is_pull(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``decisions.jsonl`` is a pull with the probability of every word."""
    words, probabilities = row.get("words"), row.get("probabilities")
    return (
        isinstance(row.get("prompt"), str)
        and isinstance(words, list)
        and isinstance(probabilities, list)
        and len(words) == len(probabilities) > 0
        and all(is_finite(probability) for probability in probabilities)
    )


def _stretches(pulls: Pulls) -> list[Pulls]:
    ends = [round(k * len(pulls) / NUM_STRETCHES) for k in range(NUM_STRETCHES + 1)]
    return [pulls[begin:end] for begin, end in pairwise(ends)]


def _mean(pulls: Pulls, prompt: str, index: int) -> float:
    """Of a word under a prompt; not a number where the prompt was not drawn."""
    found = [probabilities[index] for drawn, probabilities in pulls if drawn == prompt]
    return sum(found) / len(found) if found else math.nan
