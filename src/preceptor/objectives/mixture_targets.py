"""Rules that know what is learned for: the datasets that are targets, or the gradient of the targets' loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import DataError
from preceptor.objectives.mixture_rules import Difficulty, State, check_ranges


@dataclass(frozen=True)
class ProgressOnTargets:
    """Weights of the targets in proportion to how much their losses move; other datasets are only explored.

        q ← q + α·(|ℓ_before − ℓ| − q),    w ∝ (q + d·mean of q over the targets) / √h

    with h the running share of the dataset in what was drawn. The change is absolute: a target that is being forgotten
    is practised again, which is safe only because nothing but targets takes part. Where no dataset is a target, nothing
    is preferred, and the mixture stays uniform. Where nobody said which are targets, all are.

    Source: Matiisen et al., arXiv 1707.00183 (absolute learning progress). Departures: √h and the mask.

    Args:
        rate: α in (0, 1]; the first change is taken as it is.
        doubt: d ≥ 0: the share of the mean progress that is granted to every target.
        share_rate: of h, in (0, 1].
        share_exponent: of h, in [0, 1].

    Raises:
        ConfigError: an argument out of its range.

    >>> rule, zeros, third = ProgressOnTargets(doubt=0.0), torch.zeros(3), torch.ones(3) / 3
    >>> targets, state = torch.tensor([True, True, False]), rule.initial_state(3)
    >>> for n, mean in enumerate([[3.0, 2.0, 9.0], [2.0, 2.5, 5.0]]):  # changes of 1 and 0.5 on the targets
    ...     measured = Difficulty(torch.tensor(mean), zeros, zeros, zeros, targets=targets)
    ...     preferences, state = rule.preferences(measured, state, tokens=zeros, weights=third, num_updates=n)
    >>> preferences / preferences.sum()
    tensor([0.6667, 0.3333, 0.0000], dtype=torch.float64)
    """

    rate: float = 0.4
    doubt: float = 0.1
    share_rate: float = 0.3
    share_exponent: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(
            ("rate", self.rate, 0 < self.rate <= 1, "lie in (0, 1]"),
            ("doubt", self.doubt, self.doubt >= 0, "be at least 0"),
            ("share_rate", self.share_rate, 0 < self.share_rate <= 1, "lie in (0, 1]"),
            ("share_exponent", self.share_exponent, 0 <= self.share_exponent <= 1, "lie in [0, 1]"),
        )

    def initial_state(self, num_datasets: int) -> State:
        """No measurement yet."""
        zeros = torch.zeros(num_datasets, dtype=torch.float64)
        return dict.fromkeys(("previous", "progress", "share"), zeros)

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        loss = difficulty.mean.double()
        mask = torch.ones_like(loss) if difficulty.targets is None else difficulty.targets.double()
        if num_updates == 0:  # nothing has moved yet: the targets alike
            return mask, {"previous": loss, "progress": torch.zeros_like(loss), "share": weights}
        change = (state["previous"] - loss).abs()
        progress = change if num_updates == 1 else state["progress"] + self.rate * (change - state["progress"])
        share = state["share"] + self.share_rate * (weights - state["share"])
        granted = self.doubt * (progress * mask).sum() / mask.sum().clamp(min=1)
        preferences = mask * (progress + granted) / share.clamp(min=1e-12) ** self.share_exponent
        return preferences, {"previous": loss, "progress": progress, "share": share}


@dataclass(frozen=True)
class Alignment:
    """Weights in proportion to what a step on each dataset does for the targets, as far as it helps them.

        a_k = ⟨∇ loss of dataset k, P·∇ mean loss of the targets⟩ / max_j |a_j|,    m ← β·m + (1 − β)·a,    w ∝ m₊

    With P the preconditioner of the optimizer, −a_k is to first order the change of the targets' loss under a step on
    dataset k. Noise, whose gradient points nowhere, is left alone; a dataset that only helps another one is found, also
    where no dataset is a target itself. On a plateau, where gradients say nothing, the rule knows nothing.

    Source: gradient alignment of Fan et al., arXiv 2310.15393 (DoGE) and Grangier et al., arXiv 2410.02498 (DGA).
    Departures: the positive part in place of exponentiated gradients; Adam's preconditioner; few rows and a memory.

    Args:
        memory: β in [0, 1); the first measurement of a dataset is taken as it is. Until then it is preferred like the
            average of the others.

    Raises:
        ConfigError: an argument out of its range.
        DataError: (at a measurement) no alignment was measured.

    >>> rule, zeros = Alignment(memory=0.5), torch.zeros(3)
    >>> state, third = rule.initial_state(3), torch.ones(3) / 3
    >>> for n, alignment in enumerate([[4.0, 2.0, -2.0], [2.0, 0.0, 1.0]]):  # memory (1, ½, −½), then (1, ¼, 0)
    ...     measured = Difficulty(zeros, zeros, zeros, zeros, alignment=torch.tensor(alignment))
    ...     preferences, state = rule.preferences(measured, state, tokens=zeros, weights=third, num_updates=n)
    >>> preferences
    tensor([1.0000, 0.2500, 0.0000], dtype=torch.float64)
    """

    memory: float = 0.7

    def __post_init__(self) -> None:
        check_ranges(("memory", self.memory, 0 <= self.memory < 1, "lie in [0, 1)"))

    def initial_state(self, num_datasets: int) -> State:
        """No measurement yet."""
        zeros = torch.zeros(num_datasets, dtype=torch.float64)
        return {"memory": zeros, "measured": zeros}

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`~preceptor.objectives.mixture_rules.MixtureRule`."""
        if difficulty.alignment is None:
            raise DataError("the rule alignment needs the alignment of each dataset; give `Difficulty.alignment`")
        alignment = difficulty.alignment.double()
        now = ~alignment.isnan()
        alignment = alignment.nan_to_num(nan=0.0)
        # On any scale: gradients shrink as a model learns, and the memory must not forget the less for it.
        scaled = alignment / alignment.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        before = state["measured"] > 0
        moved = torch.where(before, self.memory * state["memory"] + (1 - self.memory) * scaled, scaled)
        memory, known = torch.where(now, moved, state["memory"]), before | now
        preferences = memory.clamp(min=0)
        average = (preferences * known).sum() / known.sum().clamp(min=1)
        return torch.where(known, preferences, average), {"memory": memory, "measured": known.double()}
