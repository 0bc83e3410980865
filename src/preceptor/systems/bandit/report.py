"""What the page shows of a bandit run: what each word pays, and how its probability moved under every prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.report.decisions import decisions_section
from preceptor.report.drawing import number
from preceptor.report.run_folder import RunFolder, is_finite, read_rows
from preceptor.report.sections import GENERAL_LINES, Lines, Matrix, Section, Table

NUM_PARTS = 8
MAXIMUM_PROMPTS = 40
"""Of one bandit."""
MAXIMUM_MATRICES = 12

Pulls = list[tuple[str, list[float]]]
"""(prompt, probability of each word)."""


LINES = (
    Lines("Reward", "reward per pull", {"reward": "reward"}, split_by="bandit"),
    *(lines for lines in GENERAL_LINES if lines.title != "Reward"),
)


def sections(run: RunFolder) -> list[Section]:
    """What each word pays, the probabilities under each prompt, the curves and the decisions."""
    found = []
    config = (run.result or {}).get("config") or run.manifest.get("config") or {}
    if payments := _payments(config):
        found.append(Section("What each word pays", [payments]))
    if run.decisions is not None and (matrices := prompt_matrices(run.decisions)):
        found.append(Section("Prompt by prompt", matrices))
    return [*found, Section("Training", LINES), *decisions_section(run)]


def _payments(config: Mapping[str, Any]) -> Table | None:
    """The bandits of a configuration: each word with the mean of its reward and how it is drawn."""
    rows = []
    for bandit in config.get("bandits") or []:
        words, kind = bandit.get("words") or [], str(bandit.get("kind", ""))
        base = float(bandit.get("base_reward", 1.0))
        pays = (bandit.get("success") if kind == "bernoulli" else bandit.get("mean")) or []
        for word, value in zip(words, pays, strict=False):
            drawn = (
                f"{number(base)} with probability {number(value)}, else 0"
                if kind == "bernoulli"
                else f"normal, standard deviation {number(base * float(bandit.get('deviation', 0.0)))}"
            )
            rows.append([" / ".join(map(str, words)), str(word), number(base * float(value)), drawn])
    return Table("", ["bandit", "word", "expected reward", "drawn"], rows) if rows else None


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
            values = [[_mean(part, prompt, index) for part in _parts_of(pulls)] for prompt in prompts]
            tables.append(
                Matrix(
                    f"Probability of '{word}' under each prompt, {bandit}",
                    f"mean over each of {NUM_PARTS} equal parts of the pulls, in their order",
                    rows=prompts,
                    columns=[f"part {k + 1}" for k in range(NUM_PARTS)],
                    values=values,
                    low=0.0,
                    high=1.0,
                )
            )
    return tables[:MAXIMUM_MATRICES]


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


def _parts_of(pulls: Pulls) -> list[Pulls]:
    ends = [round(k * len(pulls) / NUM_PARTS) for k in range(NUM_PARTS + 1)]
    return [pulls[begin:end] for begin, end in pairwise(ends)]


def _mean(pulls: Pulls, prompt: str, index: int) -> float:
    """Of a word under a prompt; not a number where the prompt was not drawn."""
    found = [probabilities[index] for drawn, probabilities in pulls if drawn == prompt]
    return sum(found) / len(found) if found else math.nan
