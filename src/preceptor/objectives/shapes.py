"""Shape checks that hold at run time, where the annotations are not enforced."""

from __future__ import annotations

from torch import Tensor

from preceptor.errors import ShapeError


def check_same_shape(**tensors: Tensor) -> None:
    """Nothing, when all ``tensors`` have one shape; broadcasting would hide a mistake, so it is refused.

    Raises:
        ShapeError: naming the first two that differ.

    >>> import torch
    >>> check_same_shape(rewards=torch.zeros(2), mask=torch.ones(2, dtype=torch.bool))
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)} and {first_name} {tuple(first.shape)}; "
                "they must be equal, expand the smaller one"
            )
