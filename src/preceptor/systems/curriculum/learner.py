"""Everything that learning changes within an arm: models, optimiser, mixture, counts; all of it is in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.data.corpora.mixture import MixtureSampler
from preceptor.errors import CheckpointError
from preceptor.lm.model import LanguageModel
from preceptor.objectives.kl import AdaptiveKLController
from preceptor.objectives.mixture import make_mixture
from preceptor.run.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from preceptor.run.guard import NonFiniteGuard
from preceptor.run.random import derived_seed
from preceptor.systems.curriculum.arms import Arm
from preceptor.systems.curriculum.config import CurriculumConfig, UpdateOptions
from preceptor.systems.curriculum.material import Corpus
from preceptor.systems.curriculum.rewards import reward_terms
from preceptor.systems.curriculum.value_network import ValueNetwork, build_value_network

Curve = list[tuple[int, dict[str, float]]]
"""(step of the arm, loss of each dataset)."""


class Learner:
    """The state of one arm.

    Making one puts the policy back to its first weights, so that every arm starts alike.

    Args:
        arm: which.
        config: of the run.
        lm: the policy, whose weights move.
        initial: the policy's first trainable weights, by name.
        corpora: the datasets.

    Attributes:
        frozen: the rolling copy that measures difficulty; it shares no storage with the policy.
        terms: of the reward, where the arm writes.
        value_network: of gae, else None.
        optimiser: over the policy's weights and the value network's.
        mixture: weights of the datasets and the rule that moves them.
        sampler: draws rows of documents by those weights.
        kl: moves the KL coefficient; None where it is fixed.
        sample: rows of each dataset that difficulty is measured on.
        sample_losses: of those rows at the last measurement.
        tokens_since: trained on since the last measurement, of each dataset.
        curve: validation losses so far.
        rewards: what held-out prompts earned at each validation, by metric.
        mixtures: the weights after each measurement of difficulty.
        counts: costs of the arm.
        best_loss: smallest macro mean of the validation losses.
    """

    def __init__(
        self,
        arm: Arm,
        config: CurriculumConfig,
        lm: LanguageModel,
        *,
        initial: Mapping[str, Tensor],
        corpora: Sequence[Corpus],
    ) -> None:
        self.arm = arm
        self.lm = lm
        copy_tensors(initial, lm.trainable_parameters())
        self.frozen = lm.frozen_copy()
        self.terms = reward_terms(config.ppo.rewards, lm, likelihood=self.frozen) if arm.writes else []
        self.value_network: ValueNetwork | None = None
        if arm.writes and config.ppo.advantage == "gae":
            value = config.value
            seed = derived_seed(config.seed, "value network")
            self.value_network = build_value_network(
                lm, kind=value.kind, width=value.width, num_layers=value.num_layers, seed=seed
            )
        self.optimiser = build_optimiser(
            lm, self.value_network, config.update, value_learning_rate=config.value.learning_rate, learns=arm.learns
        )
        sizes = {corpus.name: len(corpus.train) for corpus in corpora}
        self.mixture = make_mixture(
            arm.rule,
            num_datasets=len(corpora),
            sizes=[corpus.train.num_tokens for corpus in corpora],
            weights=arm.weights or None,
            exploration=config.mixture.exploration,
            **arm.settings,
        )
        self.sampler = MixtureSampler(sizes, seed=derived_seed(config.seed, "documents") % 2**63)
        self.kl: AdaptiveKLController | None = None
        if arm.writes and config.ppo.kl_target and config.ppo.kl_place != "none":
            self.kl = AdaptiveKLController(
                coefficient=config.ppo.kl_coefficient, target=config.ppo.kl_target, horizon=config.ppo.kl_horizon
            )
        self.guard = NonFiniteGuard()
        self.sample: list[list[int]] = []
        self.sample_losses: list[Tensor] = []
        self.tokens_since = torch.zeros(len(corpora), dtype=torch.float64)
        self.curve: Curve = []
        self.rewards: list[dict[str, float]] = []
        self.mixtures: list[list[float]] = []
        self.counts = {"tokens": 0, "rollout_tokens": 0, "model_calls": 0, "rewards_excluded": 0}
        self.best_loss = math.inf

    def refresh_frozen(self) -> None:
        """Make the frozen copy the policy as it is now, in storage of its own."""
        self.frozen.model.load_state_dict(self.lm.model.state_dict())

    def set_learning_rate(self, scale: float) -> None:
        """Multiply every group's own learning rate by ``scale``."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * scale

    def achieved(self) -> dict[str, Any]:
        """What the arm leaves behind, as JSON: its curves and what it cost."""
        return {
            "curve": [[step, losses] for step, losses in self.curve],
            "rewards": self.rewards,
            "mixtures": self.mixtures,
            "counts": self.counts,
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything of a checkpoint that is not JSON."""
        optimiser_state, _ = optimizer_tensors(self.optimiser)
        return {
            **self._live(),
            "optimiser": optimiser_state,
            "sample_losses": {str(index): losses for index, losses in enumerate(self.sample_losses)},
        }

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON."""
        return {
            "arm": self.arm.name,
            "optimiser": optimizer_tensors(self.optimiser)[1],
            "mixture": self.mixture.state_dict(),
            "sampler": self.sampler.state_dict(),
            "kl": None if self.kl is None else self.kl.state_dict(),
            "guard": self.guard.state_dict(),
            "sample": self.sample,
            "tokens_since": self.tokens_since.tolist(),
            "achieved": self.achieved(),
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint of this arm was saved; strict in every part.

        Raises:
            CheckpointError: it is of another arm or another model.
        """
        state = checkpoint.state["learner"]
        if state["arm"] != self.arm.name:
            raise CheckpointError(f"the checkpoint is of the arm {state['arm']}, not {self.arm.name}")
        for name, live in self._live().items():
            copy_tensors(checkpoint.tensors.get(name, {}), live)
        load_optimizer(self.optimiser, checkpoint.tensors["optimiser"], state["optimiser"])
        self.mixture.load_state_dict(state["mixture"])
        self.sampler.load_state_dict(state["sampler"])
        if self.kl is not None:
            self.kl.load_state_dict(state["kl"])
        self.guard.load_state_dict(state["guard"])
        self.sample = [list(indices) for indices in state["sample"]]
        losses = checkpoint.tensors.get("sample_losses", {})
        self.sample_losses = [losses[str(index)].clone() for index in range(len(losses))]
        self.tokens_since = torch.tensor(state["tokens_since"], dtype=torch.float64)
        achieved = state["achieved"]
        self.curve = [(step, dict(losses)) for step, losses in achieved["curve"]]
        self.rewards = [dict(row) for row in achieved["rewards"]]
        self.mixtures = [list(row) for row in achieved["mixtures"]]
        self.counts = dict(achieved["counts"])
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]

    def _live(self) -> dict[str, dict[str, Tensor]]:
        policy = {name: parameter.detach() for name, parameter in self.lm.trainable_parameters().items()}
        # The frozen copy has no trainable parameters; those of the policy are the ones in which it can differ.
        frozen: dict[str, Tensor] = {n: tensor for n, tensor in self.frozen.model.named_parameters() if n in policy}
        live: dict[str, dict[str, Tensor]] = {"policy": policy, "frozen": frozen}
        if self.value_network is not None:
            live["value_network"] = {
                name: parameter.detach()
                for name, parameter in self.value_network.named_parameters()
                if parameter.requires_grad
            }
        return live


def build_optimiser(
    lm: LanguageModel,
    value_network: ValueNetwork | None,
    options: UpdateOptions,
    *,
    value_learning_rate: float,
    learns: bool,
) -> torch.optim.Optimizer:
    """AdamW over the policy and the value network, each with its own learning rate; both are 0 unless it ``learns``."""
    groups: list[dict[str, Any]] = [
        {"params": list(lm.trainable_parameters().values()), "initial_lr": options.learning_rate * learns}
    ]
    if value_network is not None:
        parameters = [parameter for parameter in value_network.parameters() if parameter.requires_grad]
        groups.append({"params": parameters, "initial_lr": value_learning_rate * learns})
    for group in groups:
        group["lr"] = group["initial_lr"]
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def learning_rate_scale(step: int, options: UpdateOptions) -> float:
    """Factor in (0, 1] on the learning rates at ``step`` of an arm (from 1): linear warm-up, then the decay.

    >>> [learning_rate_scale(s, UpdateOptions(steps=4, warm_up_steps=2, decay="linear")) for s in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm_up = options.warm_up_steps
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up - 1) / max(options.steps - warm_up, 1)
    if options.decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if options.decay == "cosine" else 1.0


@torch.no_grad()
def copy_tensors(saved: Mapping[str, Tensor], live: Mapping[str, Tensor | nn.Parameter]) -> None:
    """Write ``saved`` into ``live`` in place; the names must be the same."""
    if saved.keys() != live.keys():
        name = sorted(saved.keys() ^ live.keys())[0]
        raise CheckpointError(
            f"the checkpoint's parameters are not this model's ('{name}'); resume with the same model"
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
