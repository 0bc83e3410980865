"""PPO for a teacher: what it saw and chose in each student's lessons, and the update of its policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from preceptor.objectives import (
    clip_fraction,
    explained_variance,
    gae,
    kl_k3,
    ppo_clip_loss,
    value_loss,
    whiten,
)
from preceptor.objectives.learned_rule import LearnedRule, SourcePolicy
from preceptor.runs.checkpoint import load_optimizer, optimizer_state
from preceptor.systems.curriculum.tasks.config import AmortisedOptions

VALUE_COEFFICIENT = 0.5
MAX_GRADIENT_NORM = 0.5
REWARD_SCALE = 10.0
"""Rewards are differences of success rates, a few hundredths; values are learned in a unit ten times smaller."""


@dataclass
class Lesson:
    """What a teacher saw and decided for one student; a decision lasts for some batches.

    Attributes:
        features: of the sources, as the teacher saw them at each decision; each [sources, features].
        drawn: the sources that each decision drew.
        left: share of the student's tokens that was left at each decision.
        measured: (number of the last decision before it, mean success) of each measurement but the first.
    """

    features: list[Tensor] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)


def lesson_rewards(lessons: Sequence[Lesson]) -> list[list[float]]:
    """What each measurement of each lesson of one set is paid: its success less the mean of the others' at that time.

    Divided by the number of measurements, so that a lesson's rewards sum to how much higher its success was on average.
    A lesson that has fewer measurements than another is compared where both have one.

    >>> lesson_rewards([Lesson(measured=[(0, 0.5), (1, 1.0)]), Lesson(measured=[(0, 0.5), (1, 0.5)])])
    [[0.0, 0.25], [0.0, -0.25]]
    """
    rewards = []
    for lesson in lessons:
        own = []
        for number, (_, success) in enumerate(lesson.measured):
            others = [
                other.measured[number][1] for other in lessons if other is not lesson and len(other.measured) > number
            ]
            own.append((success - sum(others) / len(others)) / len(lesson.measured) if others else 0.0)
        rewards.append(own)
    return rewards


class Teacher:
    """A policy over sources and the optimizer that trains it.

    Args:
        options: of the run.
        generator: draws the first weights.
    """

    def __init__(self, options: AmortisedOptions, *, generator: torch.Generator) -> None:
        self._options = options
        self.policy = SourcePolicy(options.hidden_dim, exploration=options.exploration, generator=generator)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=options.learning_rate)

    @property
    def rule(self) -> LearnedRule:
        """The rule that the policy is, as it is now and as it becomes."""
        return LearnedRule(exploration=self._options.exploration, policy=self.policy)

    def learn(self, lessons: Sequence[Lesson], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
        """Some passes of PPO over ``lessons``, each paid with ``rewards`` at its measurements; gives metrics."""
        options = self._options
        paid = pad_sequence(
            [spread(lesson, own) for lesson, own in zip(lessons, rewards, strict=True)], batch_first=True
        )  # [lesson, decision]
        mask = pad_sequence([torch.ones(len(lesson.drawn), dtype=torch.bool) for lesson in lessons], batch_first=True)
        with torch.no_grad():
            old_log_probs, _, old_values = self._scored(lessons)
            values = pad_sequence(old_values, batch_first=True)
            advantages = gae(REWARD_SCALE * paid, values, mask=mask, discount=1.0, gae_lambda=options.gae_lambda)
            returns = advantages + values
            whitened = whiten(advantages, mask)
        # Every draw is an action, and has the advantage of its decision: one row, [1, draws].
        of_decision = [
            (number, decision) for number, lesson in enumerate(lessons) for decision, drawn in enumerate(lesson.drawn)
            for _ in drawn
        ]  # fmt: skip
        rows, columns = (torch.tensor(index) for index in zip(*of_decision, strict=True))
        of_draws = whitened[rows, columns][None]
        counted = torch.ones_like(of_draws, dtype=torch.bool)
        metrics: dict[str, float] = {}
        for _ in range(options.epochs):
            log_probs, entropies, now = self._scored(lessons)
            policy_loss = ppo_clip_loss(
                log_probs, old_log_probs, of_draws, mask=counted,
                clip_epsilon_low=options.clip_epsilon, clip_epsilon_high=options.clip_epsilon,
            )  # fmt: skip
            value = value_loss(pad_sequence(now, batch_first=True), returns, mask=mask)
            loss = policy_loss + VALUE_COEFFICIENT * value - options.entropy_coefficient * entropies.mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRADIENT_NORM)
            self._optimizer.step()
            metrics = {
                "policy_loss": policy_loss.item(),
                "value_loss": value.item(),
                "gradient_norm": float(norm),
                "entropy": entropies.mean().item(),
            }
        with torch.no_grad():
            log_probs, _, _ = self._scored(lessons)
            clipped = clip_fraction(
                log_probs, old_log_probs, of_draws, mask=counted,
                clip_epsilon_low=options.clip_epsilon, clip_epsilon_high=options.clip_epsilon,
            )  # fmt: skip
            return metrics | {
                "kl": kl_k3(log_probs, old_log_probs).mean().item(),
                "clip_fraction": float(clipped),
                "explained_variance": float(explained_variance(values, returns, mask)),
            }

    def _scored(
        self, lessons: Sequence[Lesson]
    ) -> tuple[Float[Tensor, "one draws"], Float[Tensor, " decisions"], list[Float[Tensor, " decisions"]]]:
        """Log-probabilities of what was drawn; of every decision the weights' entropy over its maximum; values."""
        log_probs, entropies, values = [], [], []
        for lesson in lessons:  # sets differ in their number of sources
            scores, value = self.policy(torch.stack(lesson.features), torch.tensor(lesson.left, dtype=torch.float64))
            log_weights = log_mixed(scores, self._options.exploration)  # [decision, source]
            for row, drawn in zip(log_weights, lesson.drawn, strict=True):
                log_probs.append(row[torch.tensor(drawn)])
            entropies.append(-(log_weights.exp() * log_weights).sum(-1) / math.log(max(scores.shape[-1], 2)))
            values.append(value)
        return torch.cat(log_probs)[None], torch.cat(entropies), values

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments."""
        return {"policy": dict(self.policy.state_dict()), "optimizer": optimizer_state(self._optimizer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        load_optimizer(self._optimizer, state["optimizer"])


def spread(lesson: Lesson, rewards: Sequence[float]) -> Float[Tensor, " decisions"]:
    """``rewards`` at the decisions that the measurements followed, 0 at the others."""
    paid = torch.zeros(len(lesson.drawn), dtype=torch.float64)
    for (decision, _), reward in zip(lesson.measured, rewards, strict=False):  # of another lesson as a control
        paid[decision] += reward
    return paid


def log_mixed(scores: Float[Tensor, "*batch sources"], exploration: float) -> Float[Tensor, "*batch sources"]:
    """ln of the weights that scores make: (1 − ε) softmax + ε / sources, as a :class:`TaskMixture` mixes them."""
    log_soft = torch.log_softmax(scores, dim=-1)
    if exploration == 0:
        return log_soft
    even = torch.full_like(log_soft, math.log(exploration / scores.shape[-1]))
    return torch.logaddexp(log_soft + math.log1p(-exploration), even) if exploration < 1 else even
