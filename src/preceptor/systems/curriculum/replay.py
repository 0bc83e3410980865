"""Recorded decisions executed again without the policy: the mixtures that followed from what was measured, and rewards.

The weights of every mixture are recomputed from the recorded difficulties by the rule. The terms of every rollout's
reward are recomputed from its recorded tokens; of ``log_likelihood`` this is possible as long as the frozen model is
the untrained one, that is up to its first refresh, and later rollouts are passed over in that term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.objectives.mixture import make_mixture
from preceptor.run.metrics import read_jsonl
from preceptor.run.random import derived_seed
from preceptor.systems.base import Replayed, Services
from preceptor.systems.curriculum.arms import Arm, plan_arms
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.decisions import difficulty_of, rollouts_of
from preceptor.systems.curriculum.material import read_corpora
from preceptor.systems.curriculum.policy_model import build_policy
from preceptor.systems.curriculum.rewards import reward_terms, score


def replay(config: CurriculumConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Every recorded number of the teacher beside the same one computed again.

    Args:
        config: of the run.
        folder: of the run.

    Raises:
        DataError: a decision is of an arm that the configuration does not have.
    """
    lm = build_policy(config.model, device=torch.device("cpu"), seed=derived_seed(config.seed, "weights"))
    arms = {arm.name: (number, arm) for number, arm in enumerate(plan_arms(config))}
    sizes = [float(corpus.train.num_tokens) for corpus in read_corpora(config.data, lm)]
    rows = read_jsonl(folder / "decisions.jsonl")
    for name, of_arm in groupby(rows, key=lambda row: row["arm"]):
        if name not in arms:
            raise DataError(f"{folder / 'decisions.jsonl'} has the arm {name}, which the configuration does not plan")
        number, arm = arms[name]
        yield from _arm(list(of_arm), arm, config, lm, sizes=sizes, first=number * config.update.steps)


def _arm(
    rows: list[dict[str, Any]], arm: Arm, config: CurriculumConfig, lm: LanguageModel, *, sizes: list[float], first: int
) -> Iterator[Replayed]:
    mixture = make_mixture(
        arm.rule,
        num_datasets=len(sizes),
        sizes=sizes,
        weights=arm.weights or None,
        exploration=config.mixture.exploration,
        **arm.settings,
    )
    terms = reward_terms(config.ppo.rewards, lm, likelihood=lm) if arm.writes else []
    for (step, kind), group in groupby(rows, key=lambda row: (row["step"], row["kind"])):
        if kind == "mixture":
            for row in group:
                mixture.update(difficulty_of(row), tokens=torch.tensor(row["tokens"], dtype=torch.float64))
                for dataset, recorded, weight in zip(row["datasets"], row["weights"], mixture.weights, strict=True):
                    yield Replayed(f"{arm.name}, step {step}, weight of {dataset}", recorded, float(weight))
        elif kind == "rollout":
            written = list(group)
            refreshed = step - first > config.difficulty.refresh_every
            known = [term for term in terms if not (refreshed and term.name == "log_likelihood")]
            rewards = score(rollouts_of(written), known)
            for name, values in rewards.terms.items():
                for index, row in enumerate(written):
                    where = f"{arm.name}, step {step}, continuation {index}, {name}"
                    yield Replayed(where, _number(row["terms"][name]), float(values[index]))
            if len(known) == len(terms):
                for index, row in enumerate(written):
                    where = f"{arm.name}, step {step}, continuation {index}, reward"
                    yield Replayed(where, _number(row["reward"]), float(rewards.total[index]))


def _number(recorded: float | None) -> float:
    """A recorded number; what was not finite was written as null."""
    return math.nan if recorded is None else recorded
