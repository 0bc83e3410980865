"""REINFORCE on words: the baseline, one update, and everything that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.objectives.advantages import against_baseline, leave_one_out
from preceptor.objectives.entropy import entropy
from preceptor.objectives.kl import kl_exact
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.objectives.statistics import RunningMoments
from preceptor.run.checkpoint import Checkpoint, copy_tensors, load_optimizer, optimizer_tensors
from preceptor.run.folder import Run
from preceptor.run.guard import NonFiniteGuard, guarded_step
from preceptor.run.strict_json import JSON
from preceptor.systems.bandit.config import UpdateOptions
from preceptor.systems.bandit.environment import Bandit


class Baseline:
    """What is subtracted from a reward before it teaches.

    Args:
        kind: ``none``, ``running_mean``, ``bandit_mean`` or ``leave_one_out``.
        bandits: names of the bandits.
    """

    def __init__(self, kind: str, bandits: Sequence[str]) -> None:
        self.kind = kind
        self._moments = {name: RunningMoments() for name in (bandits if kind == "bandit_mean" else ("all",))}

    def advantages(self, rewards: Float[Tensor, " batch"], bandit: str) -> Float[Tensor, " batch"]:
        """Advantages of one bandit's ``rewards``. The running means are of earlier batches: theirs would be biased."""
        if self.kind == "none":
            return rewards
        if self.kind == "leave_one_out":
            return leave_one_out(rewards)
        moments = self._moments[bandit if self.kind == "bandit_mean" else "all"]
        advantages = against_baseline(rewards, moments.mean)
        moments.update(rewards)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {name: moments.state_dict() for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state over from :meth:`state_dict`."""
        for name, moments in self._moments.items():
            moments.load_state_dict(state[name])


@dataclass(frozen=True)
class Measured:
    """What an update was made of: nats, but for the loss, which is in units of the reward."""

    loss: float
    entropy: float
    kl: float | None


def policy_gradient(
    log_probs: Float[Tensor, "batch options"],
    actions: Int[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    *,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    reference: Float[Tensor, "batch options"] | None = None,
) -> tuple[Float[Tensor, ""], Measured]:
    """−A ln π(a) − c_H H(π) + c_KL KL(π‖π_ref), a mean over the batch, to be minimised (Williams 1992).

    Args:
        log_probs: of the policy that drew ``actions``, with gradient; −inf where there is no such option.
        actions: indices of the drawn options.
        advantages: one an action, in units of the reward.
        reference: of the pre-trained model; needed with ``kl_coefficient``.
    """
    chosen = log_probs.gather(1, actions[:, None])
    loss = reinforce_loss(
        chosen,
        advantages[:, None].to(chosen.dtype),
        mask=torch.ones_like(chosen, dtype=torch.bool),
        aggregation="sequence_sum",
    )
    mean_entropy = entropy(log_probs).mean()
    kl = None if reference is None else kl_exact(log_probs, reference).mean()
    measured = Measured(loss.item(), mean_entropy.item(), None if kl is None else kl.item())
    if entropy_coefficient:
        loss = loss - entropy_coefficient * mean_entropy
    if kl_coefficient and kl is not None:
        loss = loss + kl_coefficient * kl
    return loss, measured


class Learner:
    """The state of learning; it changes hands from pretraining to REINFORCE with an optimiser that starts fresh.

    Args:
        lm: whose weights move; nothing else's do.
        update: of the configuration.
        bandits: names of the bandits.

    Attributes:
        optimiser: of the phase that runs.
        pretrained: the model before the first reward, frozen; None before that.
        queue: batches still to come in this epoch, the next one last: number of the bandit, indices of its prompts.
        regret: of every bandit, in expected reward, after each of its steps.
        num_pulls, num_best, reward_sum: pulls, pulls of the best word, and rewards, of every bandit.
    """

    def __init__(self, lm: LanguageModel, update: UpdateOptions, bandits: Sequence[str]) -> None:
        self.lm = lm
        self.parameters = lm.trainable_parameters()
        self.optimiser: torch.optim.Optimizer = torch.optim.AdamW(self.parameters.values())
        self.pretrained: LanguageModel | None = None
        self.baseline = Baseline(update.baseline, bandits)
        self.guard = NonFiniteGuard()
        self.queue: list[tuple[int, list[int]]] = []
        self.regret: dict[str, list[float]] = {name: [] for name in bandits}
        self.num_pulls = dict.fromkeys(bandits, 0)
        self.num_best = dict.fromkeys(bandits, 0)
        self.reward_sum = dict.fromkeys(bandits, 0.0)

    def start(self, *, learning_rate: float, weight_decay: float) -> None:
        """A fresh optimiser, for the phase that begins."""
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=weight_decay)

    def apply(self, loss: Tensor, run: Run, step: int, *, clip_norm: float) -> float:
        """Backward and one step of the optimiser; the gradient's norm before clipping, NaN for a step skipped."""
        loss.backward()
        return guarded_step(
            self.guard, self.optimiser, self.parameters, step=step, clip_norm=clip_norm, notice=run.notice
        )

    def count(self, bandit: Bandit, actions: Int[Tensor, " batch"], rewards: Float[Tensor, " batch"]) -> None:
        """Take a batch of pulls into the sums: regret is against the best word's expected reward."""
        name, expected = bandit.name, bandit.expected
        before = self.regret[name][-1] if self.regret[name] else 0.0
        self.regret[name].append(before + float((expected.max() - expected[actions]).sum()))
        self.num_pulls[name] += len(actions)
        self.num_best[name] += int((expected[actions] == expected.max()).sum())
        self.reward_sum[name] += float(rewards.sum())

    def mean_rewards(self) -> dict[str, float]:
        """Mean reward so far of every bandit that was played."""
        return {name: self.reward_sum[name] / pulls for name, pulls in self.num_pulls.items() if pulls}

    def save(self, run: Run, step: int) -> None:
        """Write a checkpoint of ``run`` at ``step``."""
        optimiser_state, optimiser_settings = optimizer_tensors(self.optimiser)
        tensors = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimiser": optimiser_state,
        }
        if self.pretrained is not None:
            tensors["pretrained"] = dict(self.pretrained.model.named_parameters())
        state: dict[str, JSON] = {
            "optimiser": optimiser_settings,
            "baseline": self.baseline.state_dict(),
            "guard": self.guard.state_dict(),
            "queue": [[number, prompts] for number, prompts in self.queue],
            "regret": self.regret,
            "counts": [self.num_pulls, self.num_best, self.reward_sum],
        }
        run.save(step, tensors, state)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore :meth:`save`, after :meth:`start` of the same phase; strict in every part.

        Raises:
            CheckpointError: it is a checkpoint of another model.
        """
        state: Mapping[str, Any] = checkpoint.state
        copy_tensors(checkpoint.tensors["model"], self.parameters)
        load_optimizer(self.optimiser, checkpoint.tensors["optimiser"], state["optimiser"])
        if "pretrained" in checkpoint.tensors:
            self.pretrained = self.lm.frozen_copy()
            copy_tensors(checkpoint.tensors["pretrained"], dict(self.pretrained.model.named_parameters()))
        self.baseline.load_state_dict(state["baseline"])
        self.guard.load_state_dict(state["guard"])
        self.queue = [(number, list(prompts)) for number, prompts in state["queue"]]
        self.regret = {name: list(values) for name, values in state["regret"].items()}
        self.num_pulls, self.num_best, self.reward_sum = map(dict, state["counts"])
