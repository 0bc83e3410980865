"""What the model was worth: its words before and after, what crossed, and the same draws under bandit algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from preceptor.systems.bandit import references
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.crossing import crossing_records, own_context_records
from preceptor.systems.bandit.laboratory import Laboratory
from preceptor.systems.bandit.learner import Learner

if TYPE_CHECKING:
    from preceptor.run.folder import Run

Records = list[dict[str, Any]]

MARGIN = 0.1
"""A pre-trained model whose probability of a named word is further than this from an equal share is not balanced."""


def validation_notice(laboratory: Laboratory, learner: Learner) -> str:
    """Whether the model before the first reward answers with the named words, each as likely as the others."""
    assert learner.pretrained is not None
    records = own_context_records(
        learner.pretrained, laboratory.vocabulary, laboratory.bandits, laboratory.prompts, arm="pretrained", seed=0
    )
    parts, balanced = [], True
    for record in records:
        bandit = next(bandit for bandit in laboratory.bandits if bandit.name == record["item"])
        share = 1 / len(bandit.words)
        balanced &= abs(record["best_word"] - share) <= MARGIN and record["named_mass"] >= 0.5
        where = "held-out" if record["split"] == "held_out" else "training"
        parts.append(
            f"{record['item']} ({where} templates): P({bandit.words[bandit.best]}) {record['best_word']:.2f}, "
            f"mass on the named words {record['named_mass']:.2f}"
        )
    advice = "" if balanced else "; not balanced: more `pretraining.steps` would help"
    return f"before the first reward: {'; '.join(parts)}{advice}"


def measure(
    config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner
) -> tuple[Records, list[dict[str, Any]]]:
    """Records of every arm, and the charts that are not in ``metrics.jsonl``."""
    assert learner.pretrained is not None
    seed, records = config.seed, []
    for arm, lm in (("learned", laboratory.lm), ("pretrained", learner.pretrained)):
        records += own_context_records(
            lm, laboratory.vocabulary, laboratory.bandits, laboratory.prompts, arm=arm, seed=seed
        )
        records += crossing_records(
            lm,
            laboratory.vocabulary,
            laboratory.bandits,
            templates=config.prompts.templates,
            held_out=config.prompts.held_out,
            arm=arm,
            seed=seed,
        )
    charts = [_crossing_chart(records)]
    for bandit in laboratory.bandits:
        num_pulls = learner.num_pulls[bandit.name]
        if not num_pulls:
            continue
        own = next(r for r in records if (r["arm"], r["item"], r["split"]) == ("learned", bandit.name, "train"))
        own |= {
            "reward": learner.reward_sum[bandit.name] / num_pulls,
            "regret": learner.regret[bandit.name][-1],
            "optimal_share": learner.num_best[bandit.name] / num_pulls,
            "model_calls": len(learner.regret[bandit.name]),
        }
        table, expected = laboratory.tables[bandit.name][:num_pulls], bandit.expected
        at = torch.linspace(0, num_pulls, len(learner.regret[bandit.name]) + 1)[1:].round().long()
        curves = {"learned": learner.regret[bandit.name]}
        for arm, pulls in references.play_all(
            table[None] / bandit.base_reward,
            expected[None],
            kind=bandit.kind,
            deviation=bandit.deviation,
            generator=run.streams["references"],
        ).items():
            regret = (expected.max() - expected[pulls[0]]).cumsum(0)
            curves[arm] = regret[at - 1].tolist()
            records.append(
                {
                    "arm": arm,
                    "item": bandit.name,
                    "split": "train",
                    "seed": seed,
                    "reward": float(table.gather(1, pulls[0][:, None]).mean()),
                    "regret": float(regret[-1]),
                    "optimal_share": float((expected[pulls[0]] == expected.max()).double().mean()),
                    "model_calls": 0,
                }
            )
        charts.append(
            {
                "kind": "series",
                "title": f"Regret while learning: {bandit.name}",
                "unit": "expected reward forgone",
                "x_label": "pull",
                "x": at.tolist(),
                "lines": curves,
            }
        )
    return records, charts + _metric_charts(laboratory)


def _crossing_chart(records: Records) -> dict[str, Any]:
    """Probability of a pair's first word: pairs and orders by model and templates."""
    columns = [
        ("learned", "train", "learned, seen templates"),
        ("learned", "held_out", "learned, held-out templates"),
        ("pretrained", "train", "pretrained, seen templates"),
    ]
    pairs = list(dict.fromkeys(record["item"] for record in records if "first_word" in record))
    cells = {(r["arm"], r["split"], r["item"]): r for r in records}
    columns = [column for column in columns if any(column[:2] == key[:2] for key in cells)]
    rows, values = [], []
    for pair in pairs:
        first, second = pair.split(" / ")
        for key, named in (("first_word_named_first", (first, second)), ("first_word_named_second", (second, first))):
            rows.append(f"{first}, of '{named[0]} or {named[1]}'")
            values.append([cells[arm, split, pair][key] for arm, split, _ in columns])
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


def _metric_charts(laboratory: Laboratory) -> list[dict[str, Any]]:
    names = [bandit.name for bandit in laboratory.bandits]
    best = {bandit.name: float(bandit.expected.max()) for bandit in laboratory.bandits}
    even = {bandit.name: float(bandit.expected.mean()) for bandit in laboratory.bandits}
    return [
        {
            "kind": "lines",
            "title": "Mean reward so far",
            "unit": "reward/pull",
            "columns": {"mean_reward.all": "all", **{f"mean_reward.{name}": name for name in names}},
            "constants": {
                "optimum (all)": sum(best.values()) / len(best),
                "uniform (all)": sum(even.values()) / len(even),
            },
        },
        {
            "kind": "lines",
            "title": "Probability of the best word in its own context",
            "unit": "probability",
            "columns": {f"best_word_of.{name}": name for name in names},
        },
    ]
