"""Recorded decisions: the rows of ``decisions.jsonl``, and the same numbers computed again without the policy.

Four kinds of rows: ``mixture`` (the difficulty of each dataset and the weights that the rule made of it), ``prompts``
(what the continuations of each dataset could teach, and the weights that prompts are drawn by), ``rollout`` (a
continuation, token by token, with every term of its reward) and ``sample`` (the continuation of a test prompt).

The weights of every mixture are recomputed from the recorded difficulties and advantages, and the terms of every reward
from the recorded tokens. ``log_likelihood`` is that of the rolling frozen model, which is known only until its first
refresh, so later rollouts are left out for that term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.objectives.mixture import Mixture, make_mixture
from preceptor.objectives.mixture_rules import Difficulty
from preceptor.objectives.task_mixture import TaskMixture, make_task_mixture
from preceptor.objectives.task_rules import Groups
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.random import derived_seed
from preceptor.systems.base import Replayed
from preceptor.systems.curriculum.baselines import Method, plan_methods
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.environment import Corpus, read_corpora
from preceptor.systems.curriculum.policy import Prompt, Rollouts, build_policy
from preceptor.systems.curriculum.rewards import Rewards, reward_terms, score_rollouts

MEASURES = ("mean", "variance", "mean_error", "variance_error")


def mixture_row(
    difficulty: Difficulty, mixture: Mixture, tokens: Tensor, *, step: int, method: str, names: Sequence[str]
) -> dict[str, Any]:
    """A measurement of difficulty, the tokens of each dataset trained on since the last one, and the new weights."""
    return {
        "step": step,
        "arm": method,
        "kind": "mixture",
        "datasets": list(names),
        "difficulty": {measure: getattr(difficulty, measure).tolist() for measure in MEASURES},
        "alignment": None if difficulty.alignment is None else difficulty.alignment.tolist(),
        "tokens": tokens.tolist(),
        "weights": mixture.weights.tolist(),
        "fell_back": mixture.fell_back,
    }


def prompt_row(groups: Groups, mixture: TaskMixture, *, step: int, method: str, names: Sequence[str]) -> dict[str, Any]:
    """The mean absolute advantage of each continuation, and the weights that the next prompts are drawn by."""
    return {
        "step": step,
        "arm": method,
        "kind": "prompts",
        "datasets": list(names),
        "sources": groups.sources.tolist(),
        "advantage": groups.advantage.tolist(),
        "weights": mixture.weights.tolist(),
    }


def groups_of_prompts(sources: Sequence[int], advantage: Sequence[float]) -> Groups:
    """Groups of one continuation each, for rules that follow advantages alone."""
    return Groups(
        torch.tensor(sources, dtype=torch.long),
        torch.zeros(len(sources), dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
        size=1,
    )


def difficulty_of(row: dict[str, Any]) -> Difficulty:
    """The measurement in a mixture row."""
    measured = dict(row["difficulty"])
    if row.get("alignment") is not None:  # a dataset that was not measured is written as null
        measured["alignment"] = [math.nan if value is None else value for value in row["alignment"]]
    return Difficulty(**{name: torch.tensor(values, dtype=torch.float64) for name, values in measured.items()})


def rollout_rows(
    rollouts: Rollouts, rewards: Rewards, *, lm: LanguageModel, step: int, method: str
) -> Iterator[dict[str, Any]]:
    """One row per continuation; ``token_ids`` are all sampled tokens, those after an end token included."""
    for row, prompt in enumerate(rollouts.prompts):
        yield {
            "step": step,
            "arm": method,
            "kind": "rollout",
            "dataset": prompt.dataset,
            "prompt_token_ids": list(prompt.tokens),
            "token_ids": rollouts.tokens[row].tolist(),
            "num_counted": int(rollouts.mask[row].sum()),
            "reference_token_ids": list(prompt.reference),
            "prompt": lm.decode(prompt.tokens),
            "text": lm.decode(rollouts.continuation(row)),
            "terms": {name: float(values[row]) for name, values in rewards.terms.items()},
            "reward": float(rewards.total[row]),
        }


def rollouts_of(rows: Sequence[dict[str, Any]]) -> Rollouts:
    """The continuations in rollout rows; log-probabilities and entropy, which are not recorded, are zero."""
    tokens = torch.tensor([row["token_ids"] for row in rows])
    num_counted = torch.tensor([row["num_counted"] for row in rows])[:, None]
    not_recorded = torch.zeros(tokens.shape)
    return Rollouts(
        prompts=tuple(
            Prompt(row["dataset"], tuple(row["prompt_token_ids"]), tuple(row["reference_token_ids"])) for row in rows
        ),
        tokens=tokens,
        # [batch, token]: the first `num_counted` tokens count.
        mask=torch.arange(tokens.shape[1]) < num_counted,
        log_probs=not_recorded,
        entropy=not_recorded,
    )


def sample_rows(prompts: Sequence[str], texts: Sequence[str], *, step: int, method: str) -> Iterator[dict[str, Any]]:
    """One row per test prompt."""
    for prompt, text in zip(prompts, texts, strict=True):
        yield {"step": step, "arm": method, "kind": "sample", "prompt": prompt, "text": text}


# ---- computed again -------------------------------------------------------------------------------------------------


def verify_datasets(config: CurriculumConfig, folder: Path) -> Iterator[Replayed]:
    """Each recorded weight and reward beside the same number computed again, on the CPU.

    Raises:
        DataError: a decision is of a method that the configuration does not have.
    """
    lm = build_policy(config.model, device=torch.device("cpu"), seed=derived_seed(config.seed, "weights"))
    plan = plan_methods(config)
    begins = accumulate((method.num_steps for method in plan), initial=0)
    methods = {method.name: (begin, method) for begin, method in zip(begins, plan, strict=False)}
    corpora = [corpus for corpus in read_corpora(config.data, lm) if corpus.learned_from]
    rows = read_jsonl(folder / "decisions.jsonl")
    # Methods are trained one after the other, so their rows are next to each other.
    for name, method_rows in groupby(rows, key=lambda row: row["arm"]):
        if name not in methods:
            raise DataError(f"{folder / 'decisions.jsonl'} has the method {name}, which is not in the configuration")
        steps_before, method = methods[name]
        yield from _verify_method(list(method_rows), method, config, lm, corpora, steps_before=steps_before)


def _verify_method(
    rows: list[dict[str, Any]],
    method: Method,
    config: CurriculumConfig,
    lm: LanguageModel,
    corpora: Sequence[Corpus],
    *,
    steps_before: int,
) -> Iterator[Replayed]:
    # A rule's weights depend on all earlier measurements, so one mixture goes through the rows in order.
    mixture = make_mixture(
        method.rule,
        num_datasets=len(corpora),
        sizes=[corpus.train.num_tokens for corpus in corpora],
        weights=method.weights or None,
        exploration=config.mixture.exploration,
        targets=[corpus.target for corpus in corpora],
        target_share=config.mixture.target_share,
        **method.settings,
    )
    rule = "uniform" if config.ppo.prompt_rule == "mixture" else config.ppo.prompt_rule  # without rows of its own
    prompt_mixture = make_task_mixture(rule, num_levels=[1] * len(corpora))
    terms = reward_terms(config.ppo.rewards, lm, likelihood=lm) if method.policy_gradient else []
    for (step, kind), group in groupby(rows, key=lambda row: (row["step"], row["kind"])):
        if kind == "mixture":
            for row in group:
                mixture.update(difficulty_of(row), tokens=torch.tensor(row["tokens"], dtype=torch.float64))
                # The weights after each measurement, one number a dataset.
                for dataset, recorded, weight in zip(row["datasets"], row["weights"], mixture.weights, strict=True):
                    yield Replayed(f"{method.name}, step {step}, weight of {dataset}", recorded, float(weight))
        elif kind == "prompts":
            for row in group:
                prompt_mixture.update(groups_of_prompts(row["sources"], row["advantage"]), progress=0.0)
                for dataset, recorded, weight in zip(
                    row["datasets"], row["weights"], prompt_mixture.weights, strict=True
                ):
                    yield Replayed(f"{method.name}, step {step}, prompts of {dataset}", recorded, float(weight))
        elif kind == "rollout":
            rollout_group = list(group)
            # Steps count from 1: the refresh comes at the beginning of step K + 1 of the method.
            refreshed = step - steps_before > config.difficulty.refresh_every
            known_terms = [term for term in terms if not (refreshed and term.name == "log_likelihood")]
            rewards = score_rollouts(rollouts_of(rollout_group), known_terms)
            for name, values in rewards.terms.items():
                for index, row in enumerate(rollout_group):
                    where = f"{method.name}, step {step}, continuation {index}, {name}"
                    yield Replayed(where, _number(row["terms"][name]), float(values[index]))
            # Without the likelihood term the sum is not the reward that was earned.
            if len(known_terms) == len(terms):
                for index, row in enumerate(rollout_group):
                    where = f"{method.name}, step {step}, continuation {index}, reward"
                    yield Replayed(where, _number(row["reward"]), float(rewards.total[index]))


def _number(recorded: float | None) -> float:
    """A recorded number; one that was not finite was written as null."""
    return math.nan if recorded is None else recorded
