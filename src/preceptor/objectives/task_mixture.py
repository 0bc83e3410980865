"""Weights of tasks and their levels of difficulty that follow what a policy can learn from rewards now.

After each batch of groups a rule (:mod:`preceptor.objectives.task_rules`) says how much it prefers each source, one
level of one task, and a :class:`TaskMixture` turns that into weights. Everything is float64 on the CPU; the state is
JSON, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from preceptor.errors import CheckpointError, ConfigError, did_you_mean
from preceptor.objectives.learned_rule import LearnedRule, SourcePolicy
from preceptor.objectives.task_rules import (
    HISTORY,
    DynamicSampling,
    FrontierRange,
    Groups,
    MeanAdvantage,
    Oracle,
    Staged,
    State,
    SuccessVariance,
    TaskRule,
    UpperConfidence,
    Vector,
    is_stalled,
)

TASK_RULES: dict[str, Callable[..., TaskRule]] = {
    "uniform": TaskRule,
    "frontier_range": FrontierRange,
    "success_variance": SuccessVariance,
    "mean_advantage": MeanAdvantage,
    "upper_confidence": UpperConfidence,
    "dynamic_sampling": DynamicSampling,
    "easy_to_hard": Staged,
    "hard_to_easy": lambda **settings: Staged(**{"hardest_first": 1.0, **settings}),
    "oracle": Oracle,
    "learned": LearnedRule,
}
"""What :func:`make_task_mixture` makes."""


class TaskMixture:
    """The weights of the sources and the rule that moves them.

    Args:
        rule: what is preferred after a batch.
        num_levels: of each task; sources are listed task by task, from the lowest level up.

    Raises:
        ConfigError: no task, or one without levels.

    >>> mixture = TaskMixture(SuccessVariance(exploration=0.5, neighbours=0.0), num_levels=[2])
    >>> groups = Groups(torch.tensor([0, 1]), torch.tensor([1.0, 0.5]), torch.zeros(2), size=2)
    >>> mixture.update(groups, progress=0.0)  # ½·(3/7, 4/7) + ½·(½, ½)
    tensor([0.4643, 0.5357], dtype=torch.float64)
    """

    def __init__(self, rule: TaskRule, *, num_levels: Sequence[int]) -> None:
        if not num_levels or min(num_levels) < 1:
            raise ConfigError(f"tasks need at least one level each, got {list(num_levels)}")
        self.rule = rule
        self.tasks = [task for task, num in enumerate(num_levels) for _ in range(num)]
        self._history: list[list[float]] = [[] for _ in self.tasks]
        self._state = rule.initial_state(self.tasks)
        self._weights = self._mixed(progress=0.0)

    @property
    def weights(self) -> Vector:
        """The share of each source in the tokens that are drawn next; a copy, which sums to 1."""
        return self._weights.clone()

    @property
    def state(self) -> State:
        """What the rule remembers; not to be changed."""
        return self._state

    def update(self, groups: Groups, *, progress: float) -> Vector:
        """The weights after a batch; ``progress`` is the fraction of the steps taken."""
        for source, success in zip(groups.sources.tolist(), groups.success.tolist(), strict=True):
            self._history[source] = [*self._history[source], success][-HISTORY:]
        self._state = self.rule.observe(self._state, groups, self.tasks)
        self._weights = self._mixed(progress=progress)
        return self.weights

    def tell_success(self, success: Vector) -> None:
        """The true success rates, for a rule that asks for them; they move the weights at the next update."""
        self._state = {**self._state, "success": success.double()}

    def _mixed(self, *, progress: float) -> Vector:
        preferences = self.rule.preferences(self._state, self.tasks, progress=progress).clamp(min=0)
        # A task moves while any of its levels does: a mastered level beside a learnable one is no dead end.
        moves = {task for task, history in zip(self.tasks, self._history, strict=True) if not is_stalled(history)}
        stalled = torch.tensor([task not in moves for task in self.tasks])
        preferences = torch.where(stalled, self.rule.stall * preferences, preferences)
        # Nothing is preferred (all mastered, say): evenly, rather than 0 / 0.
        if not preferences.sum() > 0:
            preferences = torch.ones_like(preferences)
        exploration = self.rule.exploration
        return (1 - exploration) * preferences / preferences.sum() + exploration / len(preferences)

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as JSON numbers and lists; exact."""
        return {
            "weights": self._weights.tolist(),
            "history": self._history,
            "rule": {name: values.tolist() for name, values in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken.

        Raises:
            CheckpointError: the state is of another rule or of other sources; nothing has changed then.
        """
        if state.get("rule", {}).keys() != self._state.keys() or len(state["weights"]) != len(self.tasks):
            raise CheckpointError("the task mixture's state is of another rule or of other tasks; resume with the same")
        # Weights are taken over as they were and not made anew: the stored ones are what the next batch was promised.
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._history = [list(history) for history in state["history"]]
        self._state = {name: torch.tensor(values, dtype=torch.float64) for name, values in state["rule"].items()}


def make_task_mixture(
    name: str, *, num_levels: Sequence[int], policy: SourcePolicy | None = None, **settings: float | int
) -> TaskMixture:
    """The mixture whose rule is called ``name`` in :data:`TASK_RULES`; the rule ``learned`` needs its ``policy``.

    Raises:
        ConfigError: an unknown name or setting, a value out of its range, or a policy missing or too many.

    >>> make_task_mixture("frontier_range", num_levels=[3]).weights
    tensor([1., 0., 0.], dtype=torch.float64)
    """
    if name not in TASK_RULES:
        raise ConfigError(f"unknown task rule '{name}'{did_you_mean(name, TASK_RULES)}; use {', '.join(TASK_RULES)}")
    allowed = [field.name for field in fields(TASK_RULES[name]()) if field.name != "policy"]
    if unknown := sorted(set(settings) - set(allowed)):
        hint = did_you_mean(unknown[0], allowed)
        raise ConfigError(f"the task rule '{name}' has no option '{unknown[0]}'{hint}; it has {', '.join(allowed)}")
    if (name == "learned") != (policy is not None):
        raise ConfigError("the task rule 'learned' needs the policy of a trained teacher, and no other rule takes one")
    given = {} if policy is None else {"policy": policy, "exploration": policy.exploration}
    return TaskMixture(TASK_RULES[name](**{**given, **settings}), num_levels=num_levels)
