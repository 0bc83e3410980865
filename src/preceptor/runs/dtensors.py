"""Gradients of which each process has a part: whether all numbers are finite, and their norm over all parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of ``tensor``, which is a ``DTensor`` of the full shape."""
    if not (dist.is_available() and dist.is_initialized()):
        return False  # without the import of what few runs need
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """The part of ``tensor`` that this process has, sharing its memory; all of it where it is not divided."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def over_parts(values: Tensor, tensors: Iterable[Any], *, smallest: bool = False) -> Tensor:
    """The largest (or smallest) of each of ``values`` over the processes that have parts of ``tensors``, in place.

    Every one of them must call it. Without a divided tensor ``values`` stay as they are.
    """
    for tensor in tensors:
        if is_sharded(tensor):
            operation = dist.ReduceOp.MIN if smallest else dist.ReduceOp.MAX
            dist.all_reduce(values, op=operation, group=tensor.device_mesh.get_group())
            break
    return values


@torch.no_grad()
def clip_gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together, which are scaled so that it is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, which does not take divided and whole gradients together.
    """
    parameters = list(parameters)
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divided = [gradient for gradient in gradients if is_sharded(gradient)]
    if not divided:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    whole = [gradient for gradient in gradients if not is_sharded(gradient)]
    squares = _squares([local(gradient) for gradient in divided])
    dist.all_reduce(squares, group=divided[0].device_mesh.get_group())
    norm = (squares + _squares(whole)).sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale.to(gradient.device))
    return float(norm)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all numbers, in float64."""
    return nn.utils.get_total_norm(tensors).double().square()
