"""Worlds in which the best schedule of a mixture is known: losses are formulas in the tokens that took effect.

A dataset has an amount of skill; its loss falls with it. Training on a mixture adds to the skills at a speed that the
world defines: a prerequisite gates what comes after it, duplicates share one skill, one dataset helps another, what is
not practised fades. ``best`` is the macro loss of the targets under the best schedule of eight pieces that gradient
descent finds (of parity, where no gradient leads there, under the best even mixture of some of the datasets); no
mixture can do better than that by more than the pieces' coarseness. ``least`` says what share of the gap from uniform
to it a rule must close.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.config import to_dict
from preceptor.evaluation.summary import compare, summarise
from preceptor.objectives import Mixture, document_difficulty, make_mixture
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.base import Replayed
from preceptor.systems.curriculum.config import CurriculumConfig

if TYPE_CHECKING:
    from preceptor.runs.folder import Run

UPDATES = 120
"""Of the weights; every published rule has left its warm-up by a half of them."""
STEPS = 4
"""Of the differential equation within an update."""

Vector = Float[Tensor, " datasets"]


@dataclass(frozen=True)
class World:
    """``loss(skill)`` and ``speed(weights, skill)``, both one number a dataset.

    Attributes:
        loss: nats per token.
        speed: of the skills, per token of the mixture.
        targets: which datasets count.
        budget: tokens in all.
        best: macro loss under the best schedule.
        least: rule → share of the gap from uniform to the best that it must close.
        judged: the macro loss where the target is no dataset of the mixture.
        noise: of a measured alignment, in nats an update, beside a tenth of the largest.
    """

    loss: Callable[[Vector], Vector]
    speed: Callable[[Vector, Vector], Vector]
    targets: tuple[bool, ...]
    budget: float
    best: float
    least: Mapping[str, float]
    judged: Callable[[Vector], Tensor] | None = None
    noise: float = 0.0

    def macro(self, skill: Vector) -> Tensor:
        """Mean loss of the targets, nats per token."""
        if self.judged is not None:
            return self.judged(skill)
        return self.loss(skill)[torch.tensor(self.targets)].mean()

    def advance(self, skill: Vector, weights: Vector, tokens: float) -> Vector:
        """The skills after so many ``tokens`` of the mixture with these ``weights``."""
        for _ in range(STEPS):
            skill = (skill + self.speed(weights, skill) * tokens / STEPS).clamp(min=0)
        return skill

    def follow(self, weights: Callable[[int, Vector], Vector]) -> Tensor:
        """The macro loss after the whole budget under ``weights(update, skill)``."""
        skill = torch.zeros(len(self.targets), dtype=torch.float64)
        for update in range(UPDATES):
            skill = self.advance(skill, weights(update, skill), self.budget / UPDATES)
        return self.macro(skill)

    def alignment(self, skill: Vector, random: np.random.Generator) -> Vector:
        """What a token of each dataset lowers the macro loss by, with noise."""
        values = []
        for index in range(len(self.targets)):
            only = torch.zeros(len(self.targets), dtype=torch.float64)
            only[index] = 1.0
            ahead = skill + self.speed(only, skill) * 0.6 * self.budget / UPDATES
            values.append(self.macro(skill) - self.macro(ahead.clamp(min=0)))
        exact = torch.stack(values)
        deviation = 0.1 * exact.abs().max() + self.noise
        return exact + deviation * torch.from_numpy(random.standard_normal(len(exact)))

    def under(self, mixture: Mixture, *, seed: int = 0, seen: list[list[float]] | None = None) -> float:
        """The macro loss under a mixture that measures 100 documents (the same each time) at each update.

        Args:
            mixture: moves the weights.
            seed: of the documents and of what measuring adds to them.
            seen: the weights of every update are appended to it.
        """
        random = np.random.default_rng(seed)
        documents = 0.05 * random.standard_normal((len(self.targets), 100))
        previous: list[list[Tensor]] = []

        def weights(update: int, skill: Vector) -> Vector:
            jitter = 0.02 * random.standard_normal(documents.shape)
            losses = list(self.loss(skill)[:, None] + torch.from_numpy(documents + jitter))
            measured = document_difficulty(losses, previous=previous[-1] if previous else losses)
            previous.append(losses)
            now = mixture.update(replace(measured, alignment=self.alignment(skill, random)))
            if seen is not None:
                seen.append(now.tolist())
            return now

        return float(self.follow(weights))

    def uniform(self) -> float:
        """The macro loss under even weights."""
        even = torch.full((len(self.targets),), 1 / len(self.targets), dtype=torch.float64)
        return float(self.follow(lambda update, skill: even))

    def share(self, loss: float) -> float:
        """Share of the gap from uniform to the best schedule that a macro ``loss`` closes."""
        uniform = self.uniform()
        return (uniform - loss) / (uniform - self.best)


# ---- the worlds -----------------------------------------------------------------------------------------------------

FLOOR = torch.tensor([1.0, 1.3, 0.8, 1.5], dtype=torch.float64)
SCALE = torch.tensor([3.0, 1.5, 6.0, 2.0], dtype=torch.float64)
EXPONENT = torch.tensor([0.3, 0.15, 0.45, 0.25], dtype=torch.float64)
HELP = torch.tensor([0.1, 0.8, 0.3, 0.0, 0.0], dtype=torch.float64)
"""How much of a token's effect on each dataset the far target feels."""


def _laws(skill: Vector) -> Vector:
    return FLOOR + SCALE * (1 + skill) ** -EXPONENT


def _letters(skill: Vector) -> Vector:
    """Noise to a model from scratch: steep while it learns which letters there are, then nothing."""
    return 4.75 + 3.65 * torch.exp(-skill / 25)


def _laws_and_letters(skill: Vector) -> Vector:
    return torch.cat([_laws(skill[:4]), _letters(skill[4:])])


def _exponential(skill: Vector) -> Vector:
    return 1 + 3 * torch.exp(-skill / 300)


def _chained(weights: Vector, skill: Vector) -> Vector:
    """Each dataset can be learned as far as the one before it is mastered."""
    mastered = torch.sigmoid((1 - torch.exp(-skill / 300) - 0.75) / 0.05)
    return weights * torch.cat([torch.ones(1, dtype=torch.float64), mastered[:-1].cumprod(0)])


def _copies(weights: Vector, skill: Vector) -> Vector:
    return torch.cat([weights[:4].sum().expand(4), weights[4:]])


def _copy_laws(skill: Vector) -> Vector:
    """Four copies of the first law, then the other three."""
    places = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    return FLOOR[places] + SCALE[places] * (1 + skill) ** -EXPONENT[places]


def _plateau(skill: Vector) -> Vector:
    """ln 2 until nearly all of it is learned at once, as a parity of many bits is."""
    return math.log(2) * torch.sigmoid((500 - skill) / 20)


def _plain(weights: Vector, skill: Vector) -> Vector:
    return weights


def _fading(weights: Vector, skill: Vector) -> Vector:
    return weights - skill / 2000


def _far(skill: Vector) -> Tensor:
    return 1 + 3 * (1 + (skill * HELP).sum()) ** -0.3


def _must(*least: float) -> dict[str, float]:
    return dict(zip(("learning_progress", "second_order", "progress_on_targets", "alignment"), least, strict=True))


WORLDS = {
    # learning_progress and alignment keep half of the weight on the targets, which costs most where they come in order.
    "chain": World(_exponential, _chained, (True,) * 4, 2400.0, best=1.5683, least=_must(0.4, 0.4, 0.5, 0.4)),
    "noise": World(
        _laws_and_letters, _plain, (True,) * 4 + (False,) * 4, 4000.0, best=1.5325, least=_must(0.5, 0.5, 0.9, 0.9)
    ),
    "copies": World(
        _copy_laws, _copies, (False,) * 3 + (True,) * 4, 4000.0, best=1.5322, least=_must(0.65, 0.75, 0.9, 0.85)
    ),
    # Progress says nothing about a target that no dataset holds.
    "far": World(
        _laws_and_letters, _plain, (False,) * 5, 4000.0, best=1.2668, least=_must(-0.05, -0.05, 0.0, 0.65), judged=_far
    ),
    "forgetting": World(
        _laws_and_letters, _fading, (True,) * 4 + (False,) * 2, 8000.0, best=1.6108, least=_must(0.8, 0.8, 0.8, 0.9)
    ),
    # Where nothing moves until all of it does, losses and gradients say nothing: the world in which these rules fail.
    "parity": World(
        _plateau, _plain, (True,) * 4, 1600.0, best=0.2559, least=_must(-0.05, -0.05, -0.05, -0.05), noise=0.01
    ),
}
"""By name."""


# ---- a run of them --------------------------------------------------------------------------------------------------

METRIC = "share"
UNITS = {METRIC: "share of the gap", "loss": "nats/token"}
_SPLIT = "held_out"


class Played:
    """What every rule reached in the worlds so far."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.weights: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Records, and the weights of the pages' charts."""
        return {"records": self.records, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self.records, self.weights = list(state["records"]), list(state["weights"])


def play_worlds(config: CurriculumConfig, run: Run) -> dict[str, Any]:
    """Plays every rule in every world of ``config.planted``, one a step; gives ``result.json``."""
    played = Played()
    # No dataset of the far world is a target, so its targets alone are no mixture.
    plan = [
        (name, rule)
        for name, rule in product(config.planted.worlds, rules_of(config))
        if rule != "targets" or any(WORLDS[name].targets)
    ]
    for n in run.loop(len(plan), played, columns={}):
        name, rule = plan[n - 1]
        seen: list[list[float]] = []
        loss = play(config, name, rule, seen=seen)
        share = WORLDS[name].share(loss)
        played.records.append(
            {"arm": rule, "item": name, "split": _SPLIT, "seed": config.seed, METRIC: share, "loss": loss}
        )
        played.weights.append({"world": name, "arm": rule, "weights": seen})
        run.record([{"step": n, "arm": rule, "kind": "world", "world": name, "loss": loss, METRIC: share}])
        run.log(n, {"arm": rule, "world": name, name: {rule: share}})
    result = planted_result(played.records, config=to_dict(config), seeds=[config.seed])
    return result | {"charts": planted_charts(played.weights)}


def rules_of(config: CurriculumConfig) -> list[str]:
    """The configured rule, and those of the controls."""
    return list(dict.fromkeys((config.mixture.rule, *config.controls.rules)))


def play(config: CurriculumConfig, name: str, rule: str, *, seen: list[list[float]] | None = None) -> float:
    """The macro loss of ``rule`` in the world ``name``."""
    world, options = WORLDS[name], config.mixture
    mixture = make_mixture(
        rule,
        num_datasets=len(world.targets),
        targets=world.targets,
        exploration=options.exploration,
        target_share=options.target_share if rule == options.rule else None,
        weights=None,
        sizes=None,
        **(options.settings if rule == options.rule else {}),
    )
    return world.under(mixture, seed=config.seed, seen=seen)


def planted_result(
    records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """``result.json`` of one run, or of several, from their records.

    ``worlds`` holds ``{WORLD: {RULE: {"mean", "low", "high", "must", "holds"}}}``: the share of the gap, what the rule
    must close, and whether it does (none where nothing is asked of it).
    """
    rules = summarise(records, units=UNITS, split=_SPLIT)
    worlds: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(record["item"] for record in records):
        of_world = summarise([record for record in records if record["item"] == name], units=UNITS, split=_SPLIT)
        worlds[name] = {}
        for rule, metrics in of_world.items():
            share, must = metrics[METRIC], WORLDS[name].least.get(rule)
            ends = {end: share[end] for end in ("mean", "low", "high")}
            worlds[name][rule] = {**ends, "must": must, "holds": None if must is None else share["mean"] >= must}
    comparisons = [
        compare(records, metric=METRIC, arm=rule, baseline="uniform", unit=UNITS[METRIC], split=_SPLIT)
        for rule in rules
        if rule != "uniform" and "uniform" in rules
    ]
    return {
        "system": "curriculum",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": rules,
        "table": [METRIC],
        "baseline": "uniform",
        "lower_is_better": ["loss"],
        "comparisons": comparisons,
        "worlds": worlds,
        "measured": [planted_verdict(worlds)],
        "verdict": planted_verdict(worlds),
        "records": list(records),
    }


def planted_verdict(worlds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Whether every rule closes what it must, and the shares of all of them; only what is measured has noise."""
    asked = [(name, rule, of) for name, rules in worlds.items() for rule, of in rules.items() if of["must"] is not None]
    short = [(name, rule, of) for name, rule, of in asked if not of["holds"]]
    if not asked:
        happened = "No rule was played of which a share of the gap is asked."
    elif short:
        listed = ", ".join(
            f"{rule.replace('_', ' ')} in {name} ({of['mean']:.2f} of {of['must']:.2f})" for name, rule, of in short
        )
        happened = f"{len(short)} of {len(asked)} shares of the gap are too small: {listed}."
    else:
        happened = f"Every rule closes what it must of the gap, in {len(asked)} of {len(asked)} cases."
    parts = [
        f"{name}: " + ", ".join(f"{rule.replace('_', ' ')} {of['mean']:+.2f}" for rule, of in rules.items())
        for name, rules in worlds.items()
    ]
    return f"{happened} Share of the gap from uniform to the best schedule: {'; '.join(parts)}."


def planted_charts(played: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The weights of every rule in every world, over the updates."""
    return [
        {
            "kind": "series",
            "title": f"Weights in {each['world']}: {each['arm'].replace('_', ' ')}",
            "unit": "share of the tokens",
            "x_label": "update",
            "x": list(range(1, len(each["weights"]) + 1)),
            "lines": {
                f"dataset {number + 1}{' (target)' if target else ''}": [weights[number] for weights in each["weights"]]
                for number, target in enumerate(WORLDS[each["world"]].targets)
            },
        }
        for each in played
    ]


def verify_worlds(config: CurriculumConfig, folder: Path) -> Iterator[Replayed]:
    """Every recorded loss beside the same world played again."""
    for row in read_jsonl(folder / "decisions.jsonl"):
        loss = play(config, row["world"], row["arm"])
        yield Replayed(f"{row['arm']} in {row['world']}, loss", row["loss"], loss)
        yield Replayed(f"{row['arm']} in {row['world']}, share", row[METRIC], WORLDS[row["world"]].share(loss))
