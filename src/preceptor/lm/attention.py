"""Attention on a CPU by the kernel that is fastest there: PyTorch's own, in float32, short rows at ``highest``.

The setting that doubles the speed of a model's large products (:func:`~preceptor.run.device.exact_matmul_precision`)
and bfloat16 both route the many small products inside an attention kernel to a library whose cost per call outweighs
them: up to four times slower forward and backward (``docs/decisions/0008-attention-on-a-cpu.md``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""What may be given by position, in order."""

_LARGE = 20_480
"""Keys times width from which the setting outside is as fast: about 320 keys of width 64, 850 of width 24."""


class CpuAttention(TorchFunctionMode):
    """Within this context, attention of CPU tensors is computed in float32 (float64 stays), whatever is set outside.

    Any model that calls ``scaled_dot_product_attention`` gains from it, in the backward pass too; outputs have the
    dtype of the queries. Tensors elsewhere, dropout, and a mask that needs a gradient are left to PyTorch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        mask = given.get("attn_mask")
        is_learned = mask is not None and mask.requires_grad
        if given["query"].device.type != "cpu" or given.get("dropout_p") or is_learned:
            return func(*args, **kwargs)
        apply: Any = _Attention.apply
        return apply(given.pop("query"), given.pop("key"), given.pop("value"), given)


class _Attention(torch.autograd.Function):
    """PyTorch's kernel on a small graph of its own, so that its backward pass runs at the same setting."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            kwargs["attn_mask"] = mask.to(dtype)
        with _faster_kernel(key), torch.set_grad_enabled(any(ctx.needs_input_grad)):
            inputs = [
                tensor.detach().to(dtype).requires_grad_(needed)
                for tensor, needed in zip((query, key, value), ctx.needs_input_grad, strict=False)
            ]
            output = scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], **kwargs)
        ctx.inputs, ctx.output = inputs, output
        return output.detach().to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _faster_kernel(ctx.inputs[1]):
            found = iter(torch.autograd.grad(ctx.output, wanted, gradient.to(ctx.output.dtype), retain_graph=True))
        return *(next(found) if tensor.requires_grad else None for tensor in ctx.inputs), None


@contextlib.contextmanager
def _faster_kernel(key: Tensor) -> Iterator[None]:
    """The setting under which the kernel's products are faster: ``highest`` while they are small."""
    setting = torch.get_float32_matmul_precision()
    if key.shape[-2] * key.shape[-1] < _LARGE:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(setting)
