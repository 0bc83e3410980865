"""What the model learned (mode: prompt): its words before and after, what transfers, and baselines on the same draws.

*Transfer* puts words of different bandits into one prompt. Three explanations of the choice are tested. *Value* prefers
the word of the higher expected reward, whatever each bandit pays in. *Winner* prefers the word that is the best of its
own bandit, and is indifferent between two winners or two losers. *Prompt* has no preference between words: the choice
changes with the order in which they are named, or with the template. Several explanations can fit a pair, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit import baselines
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.policy import Vocabulary, decide
from preceptor.systems.bandit.prompts import Prompt, crossed_pairs, prompts_for
from preceptor.systems.bandit.setup import Setup
from preceptor.systems.bandit.state import State

Records = list[dict[str, Any]]
Charts = list[dict[str, Any]]

PREFERS = 0.6
"""A word is preferred when its mean probability exceeds this; between this and its complement is indifference."""

MARGIN = 0.1
"""The initial model is balanced when the probability of each best word is within this of an equal share."""

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
"""Unit of each metric in the bandit's records."""

BATCH_SIZE = 64


def balance_notice(setup: Setup, state: State) -> str:
    """Whether the model before the first reward answers with the named words, each as likely as the others."""
    assert state.initial_model is not None
    records = own_context_records(
        state.initial_model, setup.vocabulary, setup.bandits, setup.prompts, method="pretrained", seed=0
    )
    parts, is_balanced = [], True
    for record in records:
        bandit = next(bandit for bandit in setup.bandits if bandit.name == record["item"])
        share = 1 / len(bandit.words)
        is_balanced &= abs(record["best_word"] - share) <= MARGIN and record["named_mass"] >= 0.5
        split = "held-out" if record["split"] == "held_out" else "training"
        parts.append(
            f"{record['item']} ({split} templates): P({bandit.words[bandit.best]}) {record['best_word']:.2f}, "
            f"mass on the named words {record['named_mass']:.2f}"
        )
    # A model that prefers a word before the first reward would be credited with learning it.
    advice = "" if is_balanced else "; not balanced: more `pretraining.steps` would help"
    return f"before the first reward: {'; '.join(parts)}{advice}"


def evaluate(setup: Setup, state: State) -> tuple[Records, Charts]:
    """Records of every method, and the charts that are not in ``metrics.jsonl``."""
    assert state.initial_model is not None
    config, run = setup.config, setup.run
    records: Records = []
    for method, lm in (("learned", setup.lm), ("pretrained", state.initial_model)):
        # Between methods, so that Ctrl-C need not wait for all of them.
        run.stop_if_requested()
        records += own_context_records(
            lm, setup.vocabulary, setup.bandits, setup.prompts, method=method, seed=config.seed
        )
        records += transfer_records(
            lm,
            setup.vocabulary,
            setup.bandits,
            templates=config.prompts.templates,
            held_out=config.prompts.held_out,
            method=method,
            seed=config.seed,
        )
    charts = [_transfer_chart(records)]
    for bandit in setup.bandits:
        if state.num_pulls[bandit.name]:
            run.stop_if_requested()
            baseline_records, chart = _while_learning(setup, state, bandit, records)
            records += baseline_records
            charts.append(chart)
    return records, charts + _metric_charts(setup)


def _while_learning(setup: Setup, state: State, bandit: Bandit, records: Records) -> tuple[Records, dict[str, Any]]:
    """Records of the baselines on the draws that the model learned from, and everyone's regret as a chart.

    The model's own totals join its record in ``records``.
    """
    num_pulls, regret_by_step = state.num_pulls[bandit.name], state.regret[bandit.name]
    # The model's record on its training prompts; its totals while learning belong there.
    own = next(r for r in records if (r["arm"], r["item"], r["split"]) == ("learned", bandit.name, "train"))
    own |= {
        "reward": state.reward_sum[bandit.name] / num_pulls,
        "regret": regret_by_step[-1],
        "optimal_share": state.num_best[bandit.name] / num_pulls,
        "model_calls": len(regret_by_step),
    }
    table, expected = setup.tables[bandit.name][:num_pulls], bandit.expected  # [pulls, arms], [arms]
    # The model's regret is known after each of its batches; the baselines' is read at the same pulls.
    at = torch.linspace(0, num_pulls, len(regret_by_step) + 1)[1:].round().long()
    curves = {"learned": regret_by_step}
    baseline_records = []
    pulls_of = baselines.play_all(
        # A batch of one table: baselines play episodes, and a bandit is one long episode.
        table[None] / bandit.base_reward,
        expected[None],
        kind=bandit.kind,
        deviation=bandit.deviation,
        generator=setup.run.streams["references"],
    )
    for method, runs in pulls_of.items():
        pulls = runs[0]  # one run, [pulls]
        regret = (expected.max() - expected[pulls]).cumsum(0)  # [pulls], of expected rewards, so free of their luck
        curves[method] = regret[at - 1].tolist()
        baseline_records.append(
            {
                "arm": method,
                "item": bandit.name,
                "split": "train",
                "seed": setup.config.seed,
                "reward": float(table.gather(1, pulls[:, None]).mean()),
                "regret": float(regret[-1]),
                "optimal_share": float((expected[pulls] == expected.max()).double().mean()),
                "model_calls": 0,
            }
        )
    chart = {
        "kind": "series",
        "title": f"Regret while learning: {bandit.name}",
        "unit": "expected reward forgone",
        "x_label": "pull",
        "x": at.tolist(),
        "lines": curves,
    }
    return baseline_records, chart


def own_context_records(
    lm: LanguageModel,
    vocabulary: Vocabulary,
    bandits: Sequence[Bandit],
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    method: str,
    seed: int,
) -> Records:
    """A record for each bandit and split: the probability of its best word in its own prompts."""
    records = []
    for bandit in bandits:
        for split, held_out in (("train", False), ("held_out", True)):
            in_split = [prompt for prompt in prompts[bandit.name] if prompt.held_out == held_out]
            if not in_split:
                continue
            rows = option_probabilities(lm, vocabulary, in_split)
            records.append(
                {
                    "arm": method,
                    "item": bandit.name,
                    "split": split,
                    "seed": seed,
                    "best_word": _mean([row[bandit.best] for row, _ in rows]),
                    "named_first": _mean(
                        [row[prompt.order[0]] for (row, _), prompt in zip(rows, in_split, strict=True)]
                    ),
                    "named_mass": _mean([p_candidates for _, p_candidates in rows]),
                }
            )
    return records


def transfer_records(
    lm: LanguageModel,
    vocabulary: Vocabulary,
    bandits: Sequence[Bandit],
    *,
    templates: Sequence[str],
    held_out: Sequence[str],
    method: str,
    seed: int,
) -> Records:
    """A record for each pair of words of different bandits and split: what is chosen, and which explanations fit."""
    records = []
    for (a, first), (b, second) in crossed_pairs(bandits):
        words = (bandits[a].words[first], bandits[b].words[second])
        values = (float(bandits[a].expected[first]), float(bandits[b].expected[second]))
        wins = (first == bandits[a].best, second == bandits[b].best)
        for split, split_templates in (("train", templates), ("held_out", held_out)):
            # A run without held-out templates has one split.
            if not split_templates:
                continue
            rows = option_probabilities(lm, vocabulary, prompts_for(words, split_templates, held_out=split != "train"))
            # Probability of the first word, [templates, orders]: named first in column 0, second in column 1.
            p_first = torch.tensor([row[0] for row, _ in rows], dtype=torch.float64).view(len(split_templates), 2)
            records.append(
                {
                    "arm": method,
                    "item": " / ".join(words),
                    "split": split,
                    "seed": seed,
                    "first_word": float(p_first.mean()),
                    "first_word_named_first": float(p_first[:, 0].mean()),
                    "first_word_named_second": float(p_first[:, 1].mean()),
                    "named_first": float((p_first[:, 0].mean() + 1 - p_first[:, 1].mean()) / 2),
                    "template_spread": float(p_first.mean(1).std(correction=0)),
                    "named_mass": _mean([p_candidates for _, p_candidates in rows]),
                    **explanations(p_first, values=values, wins=wins),
                }
            )
    return records


@torch.no_grad()
def option_probabilities(
    lm: LanguageModel, vocabulary: Vocabulary, prompts: Sequence[Prompt]
) -> list[tuple[list[float], float]]:
    """For each prompt the probability of each of its words, in their order, and of all of them among all tokens."""
    rows: list[tuple[list[float], float]] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        decision = decide(lm, [vocabulary.context(lm, prompt) for prompt in batch])
        probabilities = decision.log_probs.double().exp()  # [batch, options], 0 beyond a prompt's own words
        for row, p_candidates, prompt in zip(probabilities, decision.p_candidates, batch, strict=True):
            rows.append((row[: len(prompt.words)].tolist(), float(p_candidates)))
    return rows


def explanations(
    p_first: Float[Tensor, "templates orders"], *, values: tuple[float, float], wins: tuple[bool, bool]
) -> dict[str, float]:
    """Which explanations fit a pair of words: 1 or 0 each.

    Args:
        p_first: probability of the first word.
        values: expected reward of each word.
        wins: whether each word is the best of its own bandit.

    >>> explanations(torch.tensor([[0.9, 0.8]]), values=(1.0, 2.0), wins=(True, False))
    {'value': 0.0, 'winner': 1.0, 'prompt': 0.0}
    >>> explanations(torch.tensor([[0.9, 0.1]]), values=(1.0, 2.0), wins=(True, True))
    {'value': 0.0, 'winner': 1.0, 'prompt': 1.0}
    """
    mean = float(p_first.mean())
    # Value and winner predict alike: the word of the larger number is preferred, and equal numbers mean indifference.
    by_value, by_winner = (
        1 - PREFERS <= mean <= PREFERS if one == other else (mean if one > other else 1 - mean) > PREFERS
        for one, other in (values, wins)
    )
    # Some prompt prefers the one word and another prompt the other.
    by_prompt = float(p_first.max()) > PREFERS and float(p_first.min()) < 1 - PREFERS
    return {"value": float(by_value), "winner": float(by_winner), "prompt": float(by_prompt)}


def _transfer_chart(records: Records) -> dict[str, Any]:
    """Probability of a pair's first word: a row for each pair and order, a column for each model and split."""
    columns = [
        ("learned", "train", "learned, seen templates"),
        ("learned", "held_out", "learned, held-out templates"),
        ("pretrained", "train", "pretrained, seen templates"),
    ]
    pairs = list(dict.fromkeys(record["item"] for record in records if "first_word" in record))
    cells = {(r["arm"], r["split"], r["item"]): r for r in records}
    # Without held-out templates, or with one bandit, there is nothing in some column.
    columns = [column for column in columns if any(column[:2] == key[:2] for key in cells)]
    rows, values = [], []
    for pair in pairs:
        first, second = pair.split(" / ")
        for key, named in (("first_word_named_first", (first, second)), ("first_word_named_second", (second, first))):
            rows.append(f"{first}, of '{named[0]} or {named[1]}'")
            values.append([cells[method, split, pair][key] for method, split, _ in columns])
    return {
        "kind": "matrix",
        "title": "Crossed contexts",
        "unit": "probability of the word named at the left",
        "rows": rows,
        "columns": [label for _, _, label in columns],
        "values": values,
        "low": 0.0,
        "high": 1.0,
    }


def _metric_charts(setup: Setup) -> Charts:
    """Charts that the page draws from ``metrics.jsonl``, with constants that a metric is read against."""
    names = [bandit.name for bandit in setup.bandits]
    return [
        {
            "kind": "lines",
            "title": "Mean reward so far",
            "unit": "reward/pull",
            "columns": {"mean_reward.all": "all", **{f"mean_reward.{name}": name for name in names}},
            "constants": {
                "optimum (all)": _mean([float(bandit.expected.max()) for bandit in setup.bandits]),
                "uniform (all)": _mean([float(bandit.expected.mean()) for bandit in setup.bandits]),
            },
        },
        {
            "kind": "lines",
            "title": "Probability of the best word in its own context",
            "unit": "probability",
            "columns": {f"best_word_of.{name}": name for name in names},
        },
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
