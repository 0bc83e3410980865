"""Everything that learning changes: weights, optimiser, old model, running statistics; all of it is in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.objectives.statistics import RunningMoments
from preceptor.run.checkpoint import Checkpoint, copy_tensors, load_optimizer, optimizer_tensors
from preceptor.run.folder import Run
from preceptor.run.guard import NonFiniteGuard
from preceptor.systems.reading.collapse import CollapseWatch
from preceptor.systems.reading.config import UpdateOptions
from preceptor.systems.reading.credit import PairBaseline
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.update import trainable


class Learner:
    """The state of learning.

    Args:
        policy: whose weights move; nothing else's do.
        untrained: the language model before training, the old model of the KL terms unless a snapshot is configured.
        update: of the configuration.

    Attributes:
        parameters: every parameter that moves, by name.
        optimiser: over ``parameters``.
        old_lm: what the KL terms compare with, or None where both are off.
        moments: of all rewards so far.
        queue: indices of the articles still to come in this round, the next one last.
        num_episodes, num_scored_values, num_rewards_excluded: counts of the run so far.
    """

    def __init__(self, policy: Policy, untrained: LanguageModel, update: UpdateOptions) -> None:
        self.parameters = dict(trainable(policy))
        self.optimiser = build_optimiser(policy, update)
        self._policy_lm = policy.lm
        self._snapshot_every = update.snapshot_every if update.kl_reference == "snapshot" else 0
        self.old_lm: LanguageModel | None = None
        if update.value_kl_coefficient or update.query_kl_coefficient:
            self.old_lm = policy.lm.frozen_copy() if self._snapshot_every else untrained
        self.moments = RunningMoments()
        self.pair_baseline = PairBaseline()
        self.guard = NonFiniteGuard()
        self.collapse = CollapseWatch()
        self.queue: list[int] = []
        self.num_episodes = 0
        self.num_scored_values = 0
        self.num_rewards_excluded = 0

    def next_article(self, names: tuple[str, ...], generator: torch.Generator) -> str:
        """Every article once in random order, then again."""
        if len(names) == 1:
            return names[0]
        if not self.queue:
            self.queue = torch.randperm(len(names), generator=generator).tolist()
        return names[self.queue.pop()]

    def refresh_old_model(self, step: int) -> None:
        """Make the snapshot the policy as it is now, if it is due after update ``step``."""
        if self.old_lm is not None and self._snapshot_every and step % self._snapshot_every == 0:
            self.old_lm.model.load_state_dict(self._policy_lm.model.state_dict())

    def save(self, run: Run, step: int) -> None:
        """Write a checkpoint of ``run`` at ``step``."""
        optimiser_state, optimiser_settings = optimizer_tensors(self.optimiser)
        tensors = {
            "policy": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimiser": optimiser_state,
            **self._snapshot(),
        }
        state = {
            "optimiser": optimiser_settings,
            "moments": self.moments.state_dict(),
            "pair_baseline": self.pair_baseline.state_dict(),
            "guard": self.guard.state_dict(),
            "collapse": self.collapse.state_dict(),
            "queue": self.queue,
            "counts": [self.num_episodes, self.num_scored_values, self.num_rewards_excluded],
        }
        run.save(step, tensors, state)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore :meth:`save`; strict in every part.

        Raises:
            CheckpointError: it is a checkpoint of another model.
        """
        state: Mapping[str, Any] = checkpoint.state
        copy_tensors(checkpoint.tensors["policy"], self.parameters)
        load_optimizer(self.optimiser, checkpoint.tensors["optimiser"], state["optimiser"])
        for name, tensors in self._snapshot().items():
            copy_tensors(checkpoint.tensors[name], tensors)
        self.moments.load_state_dict(state["moments"])
        self.pair_baseline.load_state_dict(state["pair_baseline"])
        self.guard.load_state_dict(state["guard"])
        self.collapse.load_state_dict(state["collapse"])
        self.queue = list(state["queue"])
        self.num_episodes, self.num_scored_values, self.num_rewards_excluded = state["counts"]

    def _snapshot(self) -> dict[str, dict[str, Tensor]]:
        if self.old_lm is None or not self._snapshot_every:
            return {}
        return {"snapshot": dict(self.old_lm.model.named_parameters())}


def build_optimiser(policy: Policy, update: UpdateOptions) -> torch.optim.Optimizer:
    """Adam over the language model's trainable parameters and the projection, each with its own learning rate."""
    groups: list[dict[str, Any]] = [
        {"params": list(policy.lm.trainable_parameters().values()), "lr": update.learning_rate}
    ]
    if policy.projection is not None:
        groups.append({"params": list(policy.projection.parameters()), "lr": update.projection_learning_rate})
    if update.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=update.weight_decay)
    return torch.optim.Adam(groups)
