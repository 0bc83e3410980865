"""Rows of ``decisions.jsonl``: what the teacher measured and chose, what the policy wrote, what it earned.

Three kinds: ``mixture`` (difficulty of each dataset and the weights that the rule made of it), ``rollout`` (a
continuation, token by token, with every term of its reward) and ``sample`` (what was written after a test prompt).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.objectives.mixture import Mixture
from preceptor.objectives.mixture_rules import Difficulty
from preceptor.systems.curriculum.rewards import Rewards
from preceptor.systems.curriculum.rollout import Prompt, Rollouts

MEASURES = ("mean", "variance", "mean_error", "variance_error")


def mixture_row(
    difficulty: Difficulty, mixture: Mixture, tokens: Tensor, *, step: int, arm: str, names: Sequence[str]
) -> dict[str, Any]:
    """What was measured, how many tokens of each dataset had been trained on since, and the weights that followed."""
    return {
        "step": step,
        "arm": arm,
        "kind": "mixture",
        "datasets": list(names),
        "difficulty": {measure: getattr(difficulty, measure).tolist() for measure in MEASURES},
        "tokens": tokens.tolist(),
        "weights": mixture.weights.tolist(),
        "fell_back": mixture.fell_back,
    }


def difficulty_of(row: dict[str, Any]) -> Difficulty:
    """The measurement that a mixture row holds."""
    return Difficulty(
        **{measure: torch.tensor(row["difficulty"][measure], dtype=torch.float64) for measure in MEASURES}
    )


def rollout_rows(
    rollouts: Rollouts, rewards: Rewards, *, lm: LanguageModel, step: int, arm: str
) -> Iterator[dict[str, Any]]:
    """One row a continuation; the token ids are all that were drawn, those behind an end token included."""
    for row, prompt in enumerate(rollouts.prompts):
        yield {
            "step": step,
            "arm": arm,
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
    """The continuations that rollout rows hold, without their log-probabilities, which were not recorded."""
    tokens = torch.tensor([row["token_ids"] for row in rows])
    counted = torch.tensor([row["num_counted"] for row in rows])[:, None]
    nothing = torch.zeros(tokens.shape)
    return Rollouts(
        prompts=tuple(
            Prompt(row["dataset"], tuple(row["prompt_token_ids"]), tuple(row["reference_token_ids"])) for row in rows
        ),
        tokens=tokens,
        mask=torch.arange(tokens.shape[1]) < counted,
        log_probs=nothing,
        entropy=nothing,
    )


def sample_rows(prompts: Sequence[str], texts: Sequence[str], *, step: int, arm: str) -> Iterator[dict[str, Any]]:
    """One row a test prompt."""
    for prompt, text in zip(prompts, texts, strict=True):
        yield {"step": step, "arm": arm, "kind": "sample", "prompt": prompt, "text": text}
