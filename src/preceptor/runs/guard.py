"""Numbers that are not finite: found by name, skipped, counted, and fatal when they do not go away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from preceptor.errors import CheckpointError, ConfigError, NumericError
from preceptor.runs.dtensors import clip_gradient_norm, local, over_parts


def first_nonfinite(named_tensors: Mapping[str, Tensor | None] | Iterable[tuple[str, Tensor | None]]) -> str | None:
    """``"<name> is NaN"`` (or ``+Inf``, ``-Inf``) for the first tensor with such a number, else ``None``.

    Takes what ``named_parameters`` yields, mapped to gradients; ``None`` (no gradient) is skipped. Check gradients
    *before* clipping: one NaN makes the norm NaN and clipping then spreads it to every parameter. The device is
    waited for once.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    every = [(name, tensor) for name, tensor in pairs if tensor is not None]
    present = [(name, local(tensor)) for name, tensor in every]
    if not present:
        return None
    device = present[0][1].device
    finite = torch.stack([tensor.detach().isfinite().all().to(device) for _, tensor in present]).byte()
    over_parts(finite, (tensor for _, tensor in every), smallest=True)
    for (name, tensor), all_finite in zip(present, finite.tolist(), strict=True):
        if not all_finite:
            kinds = torch.stack([tensor.isnan().any(), tensor.isposinf().any()]).byte()
            is_nan, is_positive = over_parts(kinds, (tensor for _, tensor in every)).tolist()
            return f"{name} is {'NaN' if is_nan else '+Inf' if is_positive else '-Inf'}"
    return None


class NonFiniteGuard:
    """Counts skipped steps; more than ``limit`` in a row end the run with ``NumericError``.

    ``num_in_a_row`` and ``num_skipped`` are part of a run's state: ``state_dict``, ``load_state_dict``.
    """

    def __init__(self, limit: int = 5) -> None:
        if limit < 0:
            raise ConfigError(f"the limit of skipped steps in a row must be at least 0, got {limit}")
        self.limit = limit
        self.num_in_a_row = 0
        self.num_skipped = 0

    def skip(self, step: int, what: str) -> str:
        """Counts ``step`` as skipped because of ``what`` (``"gradient of lm_head.weight is NaN"``); returns the notice.

        Raises ``NumericError`` when that is one more in a row than allowed.
        """
        self.num_in_a_row += 1
        self.num_skipped += 1
        if self.num_in_a_row > self.limit:
            raise NumericError(
                f"step {step}: {what}; {self.num_in_a_row} steps in a row were not finite, {self.limit} are allowed; "
                "lower the learning rate or look at the rewards"
            )
        return f"step {step} skipped: {what} ({self.num_in_a_row} of {self.limit} allowed in a row)"

    def ok(self) -> None:
        """Says that a step was finite, which ends the row."""
        self.num_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """The counters, fit for JSON."""
        return {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Puts the counters back; raises ``CheckpointError`` when they are not exactly those of ``state_dict``."""
        if set(state) != set(self.state_dict()):
            raise CheckpointError(f"the guard's counters differ: got {sorted(state)}, need {sorted(self.state_dict())}")
        self.num_in_a_row, self.num_skipped = state["num_in_a_row"], state["num_skipped"]


def guarded_step(
    guard: NonFiniteGuard,
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    step: int,
    clip_norm: float,
    notice: Callable[[str], None],
) -> float:
    """Clips the gradients and takes one step of ``optimiser``, unless a gradient is not finite; clears them.

    Gives the gradients' norm before clipping, NaN for a step that was skipped (``notice`` is told why). Raises
    ``NumericError`` as :meth:`NonFiniteGuard.skip`.
    """
    gradients = ((f"gradient of {name}", parameter.grad) for name, parameter in parameters.items())
    norm = float("nan")
    if (what := first_nonfinite(gradients)) is None:
        norm = clip_gradient_norm(parameters.values(), clip_norm)
        optimiser.step()
        guard.ok()
    else:
        notice(guard.skip(step, what))
    optimiser.zero_grad(set_to_none=True)
    return norm
