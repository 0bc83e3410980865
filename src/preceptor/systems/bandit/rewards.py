"""From rewards to a gradient: the reward baseline and the REINFORCE loss over words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.objectives.advantages import against_baseline, leave_one_out
from preceptor.objectives.kl import entropy, kl_exact
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.objectives.statistics import RunningMoments


class RewardBaseline:
    """What is subtracted from a reward to give its advantage.

    Args:
        kind: ``none``, ``running_mean`` (over all bandits), ``bandit_mean`` or ``leave_one_out``.
        bandits: names of the bandits.
    """

    def __init__(self, kind: str, bandits: Sequence[str]) -> None:
        self.kind = kind
        self._moments = {name: RunningMoments() for name in (bandits if kind == "bandit_mean" else ("all",))}

    def advantages(self, rewards: Float[Tensor, " batch"], bandit: str) -> Float[Tensor, " batch"]:
        """Advantages of one bandit's ``rewards``, in their unit; a running mean then takes ``rewards`` in."""
        if self.kind == "none":
            return rewards
        if self.kind == "leave_one_out":
            return leave_one_out(rewards)
        moments = self._moments[bandit if self.kind == "bandit_mean" else "all"]
        # The mean of earlier batches alone: one that holds the action's own reward would bias the gradient.
        advantages = against_baseline(rewards, moments.mean)
        moments.update(rewards)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {name: moments.state_dict() for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        for name, moments in self._moments.items():
            moments.load_state_dict(state[name])


@dataclass(frozen=True)
class LossMetrics:
    """Parts of a loss: the REINFORCE term in units of the reward, entropy and KL in nats."""

    loss: float
    entropy: float
    kl: float | None


def policy_gradient_loss(
    log_probs: Float[Tensor, "batch options"],
    actions: Int[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    *,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    reference_log_probs: Float[Tensor, "batch options"] | None = None,
) -> tuple[Float[Tensor, ""], LossMetrics]:
    """−A ln π(a) − c_H H(π) + c_KL KL(π‖π_ref), a mean over the batch, to be minimised (Williams 1992).

    No gradient into ``advantages`` and ``reference_log_probs``.

    Args:
        log_probs: of the policy that drew ``actions``, with gradient; −inf where there is no such option.
        actions: indices of the drawn options.
        advantages: one for each action, in units of the reward.
        entropy_coefficient: c_H, in units of the reward per nat.
        kl_coefficient: c_KL, in units of the reward per nat.
        reference_log_probs: of the reference model; without them there is no KL term.
    """
    # A choice is a sequence of one action, so the sequence axis has length 1.
    chosen = log_probs.gather(1, actions[:, None])  # [batch, 1]
    loss = reinforce_loss(
        chosen,
        advantages[:, None].to(chosen.dtype),
        mask=torch.ones_like(chosen, dtype=torch.bool),
        aggregation="sequence_sum",
    )
    mean_entropy = entropy(log_probs).mean()
    kl = None if reference_log_probs is None else kl_exact(log_probs, reference_log_probs).mean()
    metrics = LossMetrics(loss.item(), mean_entropy.item(), None if kl is None else kl.item())
    if entropy_coefficient:
        # An entropy bonus lowers the loss, a KL penalty raises it.
        loss = loss - entropy_coefficient * mean_entropy
    if kl_coefficient and kl is not None:
        loss = loss + kl_coefficient * kl
    return loss, metrics
