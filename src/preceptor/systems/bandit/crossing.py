"""What crosses between contexts: words of different bandits in one prompt, and three explanations of what is chosen.

*Value* prefers the word of the higher expected reward, whatever the bandits pay in. *Winner* prefers the word that is
the best of its own bandit; between two winners, or two losers, it is indifferent. *Prompt* has no preference between
words: what is chosen turns with the order in which they are named, or with the template. More than one explanation can
fit a pair, and none has to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.policy import Vocabulary, decide
from preceptor.systems.bandit.prompts import Prompt, crossed_pairs, prompts_for

PREFERS = 0.6
"""A word is preferred when its mean probability exceeds this; between this and its complement is indifference."""

UNITS = {
    "best_word": "probability",
    "first_word": "probability",
    "first_word_named_first": "probability",
    "first_word_named_second": "probability",
    "named_first": "probability",
    "template_spread": "s.d. of the probability",
    "named_mass": "probability",
    "value": "share of pairs",
    "winner": "share of pairs",
    "prompt": "share of pairs",
    "reward": "reward/pull",
    "regret": "reward",
    "optimal_share": "share of pulls",
    "model_calls": "forward passes",
}
"""Unit of every metric of the bandit's records."""

BATCH = 64


@torch.no_grad()
def probabilities(
    lm: LanguageModel, vocabulary: Vocabulary, prompts: Sequence[Prompt]
) -> list[tuple[list[float], float]]:
    """Of every prompt: the probability of each option in the order of its words, and the mass on them all."""
    found: list[tuple[list[float], float]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        decision = decide(lm, [vocabulary.context(lm, prompt) for prompt in batch])
        for row, mass, prompt in zip(decision.log_probs.double().exp(), decision.mass, batch, strict=True):
            found.append((row[: len(prompt.words)].tolist(), float(mass)))
    return found


def own_context_records(
    lm: LanguageModel,
    vocabulary: Vocabulary,
    bandits: Sequence[Bandit],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    arm: str,
    seed: int,
) -> list[dict[str, Any]]:
    """A record for every bandit and split: the probability of its best word in its own prompts."""
    records = []
    for bandit in bandits:
        for split, held_out in (("train", False), ("held_out", True)):
            of_split = [prompt for prompt in prompts[bandit.name] if prompt.held_out == held_out]
            if not of_split:
                continue
            rows = probabilities(lm, vocabulary, of_split)
            named_first = [row[prompt.order[0]] for (row, _), prompt in zip(rows, of_split, strict=True)]
            records.append(
                {
                    "arm": arm,
                    "item": bandit.name,
                    "split": split,
                    "seed": seed,
                    "best_word": _mean([row[bandit.best] for row, _ in rows]),
                    "named_first": _mean(named_first),
                    "named_mass": _mean([mass for _, mass in rows]),
                }
            )
    return records


def crossing_records(
    lm: LanguageModel,
    vocabulary: Vocabulary,
    bandits: Sequence[Bandit],
    *,
    templates: Sequence[str],
    held_out: Sequence[str],
    arm: str,
    seed: int,
) -> list[dict[str, Any]]:
    """A record for every pair of words of different bandits and split: what is chosen, and which explanation fits."""
    records = []
    for (a, first), (b, second) in crossed_pairs(bandits):
        words = (bandits[a].words[first], bandits[b].words[second])
        values = (float(bandits[a].expected[first]), float(bandits[b].expected[second]))
        wins = (first == bandits[a].best, second == bandits[b].best)
        for split, of_split in (("train", templates), ("held_out", held_out)):
            if not of_split:
                continue
            prompts = prompts_for(words, of_split, held_out=split == "held_out")
            rows = probabilities(lm, vocabulary, prompts)
            cells = torch.tensor([row[0] for row, _ in rows], dtype=torch.float64).view(len(of_split), 2)
            records.append(
                {
                    "arm": arm,
                    "item": " / ".join(words),
                    "split": split,
                    "seed": seed,
                    "first_word": float(cells.mean()),
                    "first_word_named_first": float(cells[:, 0].mean()),
                    "first_word_named_second": float(cells[:, 1].mean()),
                    "named_first": float((cells[:, 0].mean() + 1 - cells[:, 1].mean()) / 2),
                    "template_spread": float(cells.mean(1).std(correction=0)),
                    "named_mass": _mean([mass for _, mass in rows]),
                    **explanations(cells, values=values, wins=wins),
                }
            )
    return records


def explanations(cells: torch.Tensor, *, values: tuple[float, float], wins: tuple[bool, bool]) -> dict[str, float]:
    """Which explanations fit a pair of words: 1 or 0 each.

    Args:
        cells: probability of the first word, [templates, orders].
        values: expected reward of either word.
        wins: whether either word is the best of its own bandit.

    >>> explanations(torch.tensor([[0.9, 0.8]]), values=(1.0, 2.0), wins=(True, False))
    {'value': 0.0, 'winner': 1.0, 'prompt': 0.0}
    >>> explanations(torch.tensor([[0.9, 0.1]]), values=(1.0, 2.0), wins=(True, True))
    {'value': 0.0, 'winner': 1.0, 'prompt': 1.0}
    """
    first = float(cells.mean())
    by_value, by_winner = (
        1 - PREFERS <= first <= PREFERS if one == other else (first if one > other else 1 - first) > PREFERS
        for one, other in (values, wins)
    )
    by_prompt = float(cells.max()) > PREFERS and float(cells.min()) < 1 - PREFERS
    return {"value": float(by_value), "winner": float(by_winner), "prompt": float(by_prompt)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
