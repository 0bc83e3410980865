"""What the surgeon sees: numbers about the student and its recent operations, normalised as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from preceptor.errors import CheckpointError
from preceptor.objectives.statistics import RunningMoments
from preceptor.systems.surgery.targets import Target

CLIP = 5.0
"""Standard deviations beyond which a feature is cut off."""

TREND_RATE = 0.1
"""Weight of the newest loss in the running mean that the trend is measured against."""


class StateFeatures:
    """The surgeon's state, a vector of numbers of order 1.

    In this order: ln ‖W‖ of every target (Frobenius); every head's attention entropy over its maximum, layer by layer;
    the loss of the fixed windows and its difference from its running mean; the last action; its reward; whether it was
    committed. Each is shifted and scaled by its own running mean and
    standard deviation (0 until a feature has varied) and cut off at five of them.

    Args:
        model: the student.
        targets: what is edited.
        windows: of text, on which attention is looked at.
        action_dim: numbers in an action.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[Target], *, windows: Int[Tensor, "window time"], action_dim: int
    ) -> None:
        self._model = model
        self._targets = tuple(targets)
        self._windows = windows
        num_heads = model.config.num_hidden_layers * model.config.num_attention_heads
        self.dim = len(self._targets) + num_heads + 2 + action_dim + 2
        self._moments = [RunningMoments() for _ in range(self.dim)]
        self._mean_loss: float | None = None
        self._last_action = torch.zeros(action_dim)
        self._last_outcome = [0.0, 0.0]  # reward, committed

    def observe(self, action: Float[Tensor, " action"], *, reward: float, committed: bool) -> None:
        """Remember the last operation."""
        self._last_action = action.detach().clone()
        self._last_outcome = [reward, float(committed)]

    def state(self, *, loss: float) -> Float[Tensor, " state"]:
        """The normalised features of the student as it is, whose fixed windows have ``loss`` (nats per token)."""
        trend = 0.0 if self._mean_loss is None else loss - self._mean_loss
        self._mean_loss = loss if self._mean_loss is None else self._mean_loss + TREND_RATE * trend
        norms = [math.log(float(target.matrix().norm())) for target in self._targets]
        heads = head_entropies(self._model, self._windows).flatten().tolist()
        raw = [*norms, *heads, loss, trend, *self._last_action.tolist(), *self._last_outcome]
        return torch.tensor(
            [self._normalised(value, moments) for value, moments in zip(raw, self._moments, strict=True)]
        )

    @staticmethod
    def _normalised(value: float, moments: RunningMoments) -> float:
        moments.update(torch.tensor([value], dtype=torch.float64))
        deviation = moments.standard_deviation
        # A feature that never varied has a deviation of rounding errors at most.
        if deviation <= 1e-9 * max(abs(moments.mean), 1.0):
            return 0.0
        return min(max((value - moments.mean) / deviation, -CLIP), CLIP)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics and the last operation."""
        return {
            "moments": [moments.state_dict() for moments in self._moments],
            "mean_loss": self._mean_loss,
            "last_action": self._last_action.tolist(),
            "last_outcome": self._last_outcome,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            CheckpointError: it has another number of features.
        """
        if len(state["moments"]) != self.dim:
            raise CheckpointError(f"the checkpoint has {len(state['moments'])} features, this surgeon {self.dim}")
        for moments, saved in zip(self._moments, state["moments"], strict=True):
            moments.load_state_dict(saved)
        self._mean_loss = state["mean_loss"]
        self._last_action = torch.tensor(state["last_action"])
        self._last_outcome = list(state["last_outcome"])


@torch.no_grad()
def head_entropies(model: PreTrainedModel, windows: Int[Tensor, "window time"]) -> Float[Tensor, "layer head"]:
    """Mean entropy of each head's attention over ln(positions in sight): 0 looks at one token, 1 at all alike.

    The first position of a window, which sees itself alone, is left out.
    """
    attentions = model(input_ids=windows, output_attentions=True, use_cache=False).attentions
    in_sight = torch.arange(2, windows.shape[1] + 1, device=windows.device).log()
    layers = []
    for attention in attentions:
        entropies = torch.special.entr(attention.float()).sum(-1)[..., 1:]  # window, head, time
        layers.append((entropies / in_sight).mean(dim=(0, 2)))
    return torch.stack(layers)
