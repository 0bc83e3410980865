"""From rewards to advantages: per-token KL in the reward, and what each token is credited with."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.objectives.advantages import gae, group_normalised, leave_one_out, reinforce_plus_plus
from preceptor.objectives.statistics import whiten


@dataclass(frozen=True)
class Credit:
    """What a batch of continuations is credited with.

    Attributes:
        advantages: of each token; 0 where the mask is False.
        returns: targets of the value network, None where none is used.
    """

    advantages: Float[Tensor, "batch token"]
    returns: Float[Tensor, "batch token"] | None


def credit_tokens(
    rewards: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    kind: str,
    values: Float[Tensor, "batch token"] | None = None,
    group_size: int = 1,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    whiten_advantages: bool = True,
) -> Credit:
    """Advantages of ``kind``, each over the tokens of its own sequence; no gradient.

    - ``gae``: generalised advantage estimation against ``values``, whitened over the batch if asked;
    - ``rloo``: a continuation's total reward minus the mean of the others of its prompt, for all of its tokens;
    - ``grpo``: the same minus its group's mean, over the group's standard deviation; ``dr_grpo``: not divided;
    - ``reinforce_plus_plus``: the reward to go, whitened over the batch.

    Args:
        rewards: of each token, the KL penalty included where it belongs there; anything where the mask is False.
        mask: True = counts.
        kind: as above.
        values: of the value network before the update, for ``gae``.
        group_size: continuations of one prompt, neighbours in the batch; at least 2 for the kinds that compare them.
        discount: per token, in [0, 1].
        gae_lambda: in [0, 1].
        whiten_advantages: for ``gae``.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    if kind == "gae":
        assert values is not None, "gae needs values"
        advantages = gae(rewards, values, mask=mask, discount=discount, gae_lambda=gae_lambda)
        returns = advantages + values.masked_fill(~mask, 0.0)
        return Credit(whiten(advantages, mask) if whiten_advantages else advantages, returns)
    if kind == "reinforce_plus_plus":
        return Credit(reinforce_plus_plus(rewards, mask, discount=discount), None)
    totals = rewards.sum(1).view(-1, group_size)
    if kind == "rloo":
        relative = leave_one_out(totals, dim=1)
    else:
        relative = group_normalised(totals, dim=1, with_standard_deviation=kind == "grpo")
    return Credit(relative.flatten()[:, None] * mask, None)
