"""What learning changes: weights, optimizer, reference model and running statistics; a checkpoint holds all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.objectives.statistics import RunningMoments
from preceptor.runs.checkpoint import copy_tensors
from preceptor.runs.guard import MicroBatch, NonFiniteGuard
from preceptor.runs.sharding import SharedState
from preceptor.systems.reading.config import UpdateOptions
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.rewards import PairBaseline, ReturnBaseline

COUNTS = ("num_episodes", "num_scored_values", "num_rewards_excluded")


class State:
    """The state of a reading run.

    Args:
        policy: its parameters are updated, and nothing else's.
        initial_lm: the language model before training, the reference model unless a snapshot is configured.
        update: of the configuration.

    Attributes:
        parameters: every trainable parameter, by name.
        optimizer: over ``parameters``.
        reference_model: of the KL terms, or None where both are off.
        moments: of all rewards so far, for the filter.
        pair_baseline: running mean of each pair's log-probability.
        return_baseline: running mean of what each step is credited with.
        guard: counts updates that were skipped because a number was not finite.
        micro_batch: trajectories per forward and backward pass.
        collapse: counts updates in a row that show a sign of collapse.
        queue: indices of the articles still to come in this round, the next one last.
        num_episodes, num_scored_values, num_rewards_excluded: counts of the run so far.
    """

    def __init__(self, policy: Policy, initial_lm: LanguageModel, update: UpdateOptions) -> None:
        # The order of `parameters` and of the optimizer's groups is the same in every run of one configuration.
        self.parameters = policy.parameters()
        self.optimizer = build_optimizer(policy, update)
        modules = {"model": policy.lm.model, "projection": policy.projection}
        self._learning = SharedState(
            {name: module for name, module in modules.items() if module is not None}, self.parameters, self.optimizer
        )
        self._policy_lm = policy.lm
        self._snapshot_every = update.snapshot_every if update.kl_reference == "snapshot" else 0
        self.reference_model: LanguageModel | None = None
        if update.value_kl_coefficient or update.query_kl_coefficient:
            # A snapshot is refreshed and so needs weights of its own; the initial model is frozen already.
            self.reference_model = policy.lm.frozen_copy() if self._snapshot_every else initial_lm
        self.moments = RunningMoments()
        self.pair_baseline = PairBaseline()
        self.return_baseline = ReturnBaseline()
        self.guard = NonFiniteGuard()
        self.micro_batch = MicroBatch(update.micro_batch_size, by_trial=not self._learning.is_shared)
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

    def refresh_reference_model(self, step: int) -> None:
        """Copy the policy's present weights into the snapshot, if that is due after update ``step``."""
        if self.reference_model is not None and self._snapshot_every and step % self._snapshot_every == 0:
            self.reference_model.model.load_state_dict(self._policy_lm.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything above, as nested mappings of tensors and plain values."""
        return {
            "policy": self._learning.weights(),
            "snapshot": self._snapshot(),
            "engine": self._policy_lm.engine_state(),
            "optimizer": self._learning.optimizer_state(),
            "moments": self.moments.state_dict(),
            "pair_baseline": self.pair_baseline.state_dict(),
            "return_baseline": self.return_baseline.state_dict(),
            "guard": self.guard.state_dict(),
            "micro_batch": self.micro_batch.state_dict(),
            "collapse": self.collapse.state_dict(),
            "queue": list(self.queue),
            "counts": {name: getattr(self, name) for name in COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, in place.

        Raises:
            CheckpointError: it is the state of another model or optimizer.
        """
        # Copied in place: the optimizer and the decoder hold these very tensors.
        self._learning.load_weights(state["policy"])
        copy_tensors(state["snapshot"], self._snapshot())
        self._policy_lm.load_engine_state(state["engine"])
        self._learning.load_optimizer(state["optimizer"])
        self.moments.load_state_dict(state["moments"])
        self.pair_baseline.load_state_dict(state["pair_baseline"])
        self.return_baseline.load_state_dict(state["return_baseline"])
        self.guard.load_state_dict(state["guard"])
        self.micro_batch.load_state_dict(state.get("micro_batch", {"found": 0}))  # runs before trials have none
        self.collapse.load_state_dict(state["collapse"])
        self.queue = list(state["queue"])
        for name in COUNTS:
            setattr(self, name, state["counts"][name])

    def _snapshot(self) -> dict[str, Tensor]:
        """The snapshot's weights; empty where the reference model is the initial one, which never changes."""
        if self.reference_model is None or not self._snapshot_every:
            return {}
        return dict(self.reference_model.model.named_parameters())


def build_optimizer(policy: Policy, update: UpdateOptions) -> torch.optim.Optimizer:
    """Adam over the language model's trainable parameters and the projection, each with its own learning rate."""
    groups: list[dict[str, Any]] = [
        {"params": list(policy.lm.trainable_parameters().values()), "lr": update.learning_rate}
    ]
    # The projection starts at the identity and may move faster than the language model.
    if policy.projection is not None:
        groups.append({"params": list(policy.projection.parameters()), "lr": update.projection_learning_rate})
    if update.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=update.weight_decay)
    return torch.optim.Adam(groups)


# ---- signs of collapse -----------------------------------------------------------------------------------------------

FLOOR = 0.01
"""An entropy below this share of its maximum counts as collapsed."""

PATIENCE = 5
"""Updates in a row before a warning is printed."""

SIGNS = {
    "query_entropy": "the queries have collapsed: their entropy is under 1 % of its maximum; raise "
    "update.query_kl_coefficient or update.query_entropy_coefficient, or lower update.learning_rate",
    "selection_entropy": "the selection has collapsed: its entropy is under 1 % of ln(remaining), so nothing is "
    "explored; lower update.projection_learning_rate or raise selection.temperature",
    "gradient": "no gradient reaches the policy: its norm is exactly 0; look at passed_fraction and at how much the "
    "rewards differ",
    "filter": "no trajectory passes the filter; lower update.filter_standard_deviations or use another reward_filter",
}


class CollapseWatch:
    """Counts how many updates in a row show each sign of collapse; the counts are state."""

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(SIGNS, 0)

    def warnings(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """Warnings after update ``step`` with metrics ``row``: one when a sign has persisted, one when it has gone."""
        present = {
            "query_entropy": row["query_entropy"] < FLOOR * row["query_entropy_maximum"],
            "selection_entropy": row["selection_entropy"] < FLOOR,  # already a share of its maximum
            "gradient": row["gradient_norm"] == 0.0,  # NaN, of a skipped step, is no sign
            "filter": row["passed_fraction"] == 0.0,
        }
        texts = []
        for sign, text in SIGNS.items():
            count = self._in_a_row[sign]
            if present[sign] and count + 1 == PATIENCE:
                texts.append(f"step {step}: {text}")
            elif not present[sign] and count >= PATIENCE:
                texts.append(f"step {step}: recovered ({sign})")
            self._in_a_row[sign] = count + 1 if present[sign] else 0
        return texts

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return dict(self._in_a_row)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self._in_a_row = {sign: int(state[sign]) for sign in SIGNS}
