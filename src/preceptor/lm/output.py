"""What goes into a forward pass of Transformers and what comes out of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
        logits: float32 logits at the positions marked by ``keep``, in row-major order.
        captured: output of the module ``capture`` at every position, or None.
    """

    logits: Float[Tensor, "kept vocab"]
    captured: Tensor | None


def additive_mask(mask: Bool[Tensor, "batch time slots"], dtype: torch.dtype) -> Float[Tensor, "batch 1 time slots"]:
    """0 where ``mask`` is True, else the lowest finite number: the form that every attention of Transformers takes."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    # The new axis broadcasts over the heads.
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The first output of a module: what a hook sees is a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
