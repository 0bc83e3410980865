"""Attention on a CPU, forward and backward, by the kernel that is fastest there.

Small models spend most of an update in attention, since a library's general products are slow for heads of width 24 or
64. Ours (``attention.c``) takes half the time of PyTorch's or less (``docs/decisions/0009-attention-kernel.md``); where
it is not built, or does not know the case, PyTorch's own kernel runs in float32 and short rows at ``highest``.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from preceptor.errors import ModelError
from preceptor.lm.cpu.kernels import kernel_library

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""What may be given by position, in order."""

_QUERIES = 48
"""Columns of a mask come in multiples of this, which the blocks of every processor divide (``attention.c``)."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What becomes float32 without loss; under autocast queries and values may differ."""

_LARGE = 20_480
"""Keys times width from which PyTorch's kernel is as fast at the setting outside: about 320 keys of width 64."""


class CpuAttention(TorchFunctionMode):
    """Within this context, attention of CPU tensors is computed in float32 (float64 stays), whatever is set outside.

    Any model that calls ``scaled_dot_product_attention`` gains from it, in the backward pass too; outputs have the
    dtype of the queries. A query that may attend to nothing gets 0. Tensors elsewhere, dropout, and a mask that needs a
    gradient are left to PyTorch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mask: tuple[Tensor, Tensor] | None = None  # all layers of a pass are given the same one

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
        query, key, value = (given.pop(name) for name in _PARAMETERS[:3])
        attend: Any = _CompiledAttention if _fits_kernel(query, key, value, given) else _PytorchAttention
        if attend is _CompiledAttention and mask is not None:
            given["attn_mask"] = self._laid_out(mask)
        return attend.apply(query, key, value, given)

    def _laid_out(self, mask: Tensor) -> Tensor:
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, mask_for_kernel(mask)
        return self._mask[1]


def mask_for_kernel(mask: Tensor) -> Float[Tensor, "batch heads slots time"]:
    """``mask`` (True = counts, or numbers to add) as numbers to add, queries innermost and padded to whole blocks."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    mask = mask.detach().float()
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    padded = pad(mask, (0, 0, 0, -mask.shape[2] % _QUERIES), value=-torch.inf)
    return padded.transpose(2, 3).contiguous()


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether ``attention.c`` is here and knows the case; what is not even a case is PyTorch's to refuse."""
    if any(part.dim() != 4 or part.dtype not in _DTYPES or not part.numel() for part in (query, key, value)):
        return False
    rows, heads, queries, width = query.shape
    kv_heads, slots = key.shape[1:3]
    mask = options.get("attn_mask")
    return (
        key.shape == value.shape == (rows, kv_heads, slots, width)
        and (heads == kv_heads or (bool(options.get("enable_gqa")) and heads % kv_heads == 0))
        and (mask is None or (_is_mask_of(mask, (rows, heads, queries, slots)) and not options.get("is_causal")))
        and kernel_is_faster()
    )


def kernel_is_faster() -> bool:
    """Whether the kernel is here and, where PyTorch's has several threads, has them too."""
    library = kernel_library()
    return library is not None and (torch.get_num_threads() == 1 or bool(library.preceptor_attention_is_threaded()))


def _is_mask_of(mask: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``mask`` is of every query and slot, and the same for all rows or heads where it is not of each."""
    if not 2 <= mask.dim() <= 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    wide = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    return wide[2:] == tuple(shape[2:]) and all(
        size in (1, full) for size, full in zip(wide[:2], shape[:2], strict=True)
    )


class _Heads(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Heads:
        """Where ``tensor`` lies; along an axis of one entry, that entry stands for all."""
        if tensor is None:
            return cls()
        strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return cls(tensor.data_ptr(), *strides[:3])


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "queries", "slots", "width")),
        ("scale", ctypes.c_float),
        ("is_causal", ctypes.c_int32),
        *((name, _Heads) for name in ("query", "key", "value", "mask", "out", "log_sums")),
        *((name, _Heads) for name in ("slope", "for_query", "for_key", "for_value")),
    )


class _CompiledAttention(torch.autograd.Function):
    """``attention.c``, which takes tensors as they lie (a head's coordinates side by side)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
        inputs = [_plain(part) for part in (query, key, value)]
        out = _like(inputs[0])
        log_sums = out.new_empty(out.shape[:3])
        scale = options.get("scale")
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        ctx.is_causal = bool(options.get("is_causal"))
        tensors = (*inputs, options.get("attn_mask"), out, log_sums)
        ctx.save_for_backward(*tensors)
        _run("preceptor_attention", _arguments(ctx, tensors))
        return out.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        slope, gradients = _plain(gradient), [_like(part) for part in saved[:3]]
        _run("preceptor_attention_backward", _arguments(ctx, (*saved, slope, *gradients)))
        return *gradients, None


def _arguments(ctx: Any, tensors: Sequence[Tensor | None]) -> _Arguments:
    """For tensors in the order of the structure."""
    query, key = tensors[:2]
    assert query is not None
    assert key is not None
    rows, heads, queries, width = query.shape
    kv_heads, slots = key.shape[1:3]
    sizes = rows, heads, kv_heads, queries, slots, width
    return _Arguments(*sizes, ctx.scale, ctx.is_causal, *(_Heads.of(tensor) for tensor in tensors))


def _run(name: str, arguments: _Arguments) -> None:
    library = kernel_library()
    assert library is not None
    if library[name](ctypes.byref(arguments), ctypes.c_int64(torch.get_num_threads())):
        raise ModelError(f"no memory for attention over {arguments.rows} rows; make the batch smaller")


def _plain(tensor: Tensor) -> Tensor:
    """In float32, a head's coordinates side by side; where it is so, as it lies."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor of that shape, a token's heads side by side as the product that comes next wants them."""
    rows, heads, tokens, width = tensor.shape
    return tensor.new_empty(rows, tokens, heads, width).transpose(1, 2)


class _PytorchAttention(torch.autograd.Function):
    """PyTorch's kernel on a small graph of its own, so that its backward pass runs at the same setting.

    The setting that doubles the speed of a model's large products
    (:func:`~preceptor.run.device.exact_matmul_precision`) and bfloat16 both route the many small products inside that
    kernel to a library whose cost per call outweighs them: up to four times slower forward and backward
    (``docs/decisions/0008-attention-on-a-cpu.md``).
    """

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
