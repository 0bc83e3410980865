"""Attention on a CPU, forward and backward, with the fastest kernel available.

Small models spend most of an update in attention, because general matrix products are slow for heads of width 24 or 64.
The kernel in ``attention.c`` takes at most half the time of PyTorch's (``docs/decisions/0009-attention-kernel.md``).
Where it is not built, or does not cover the case, PyTorch's kernel runs in float32, at full precision for short rows.
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
"""Parameters of ``scaled_dot_product_attention`` that may be passed by position, in order."""

_QUERIES = 48
"""Masks are padded to a multiple of this many queries, which is one of every processor's block (``attention.c``)."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that convert to float32 without loss; under autocast those of queries and values may differ."""

_LARGE = 20_480
"""Keys times width from which PyTorch's kernel is as fast at any precision setting: about 320 keys of width 64."""


class CpuAttention(TorchFunctionMode):
    """Context in which attention of CPU tensors is computed in float32 (or float64), whatever the settings outside.

    It intercepts ``scaled_dot_product_attention``, so any model that calls it gains, in the backward pass too. Outputs
    have the dtype of the queries; a query that may attend to nothing gets 0. Tensors on other devices, dropout and
    masks that need a gradient are left to PyTorch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mask: tuple[Tensor, Tensor] | None = None  # last one and its layout: all layers share it

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
        # Transformers passes these by position or by name, depending on its version and the model.
        options = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        mask = options.get("attn_mask")
        is_learned = mask is not None and mask.requires_grad
        if options["query"].device.type != "cpu" or options.get("dropout_p") or is_learned:
            return func(*args, **kwargs)
        query, key, value = (options.pop(name) for name in _PARAMETERS[:3])  # each [batch, heads, time, width]
        attend: Any = _CompiledAttention if _fits_kernel(query, key, value, options) else _PytorchAttention
        if attend is _CompiledAttention and mask is not None:
            options["attn_mask"] = self._mask_for_kernel(mask)
        # An autograd function of its own, so that the backward pass too runs the chosen kernel.
        return attend.apply(query, key, value, options)

    def _mask_for_kernel(self, mask: Tensor) -> Tensor:
        # Compared by identity: one pass hands the same mask object to every layer, so it is laid out once.
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, mask_for_kernel(mask)
        return self._mask[1]


def mask_for_kernel(mask: Tensor) -> Float[Tensor, "batch heads slots time"]:
    """``mask`` (True = counts, or numbers to add) as numbers to add, queries innermost and padded to whole blocks."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    mask = mask.detach().float()
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)  # [batch or 1, heads or 1, time, slots]
    # The kernel loads whole vectors of queries; those of the padding attend to nothing.
    padded = pad(mask, (0, 0, 0, -mask.shape[2] % _QUERIES), value=-torch.inf)
    return padded.transpose(2, 3).contiguous()


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether ``attention.c`` is built and covers this case; invalid arguments are left for PyTorch to reject."""
    if any(part.dim() != 4 or part.dtype not in _DTYPES or not part.numel() for part in (query, key, value)):
        return False
    rows, heads, queries, width = query.shape
    # Grouped queries: [batch, heads, time, width] against [batch, kv_heads, slots, width].
    num_kv_heads, slots = key.shape[1:3]
    mask = options.get("attn_mask")
    return (
        # From here on the case is well-formed: shapes agree, head counts divide, and the mask covers all scores.
        key.shape == value.shape == (rows, num_kv_heads, slots, width)
        and (heads == num_kv_heads or (bool(options.get("enable_gqa")) and heads % num_kv_heads == 0))
        and (mask is None or (_is_mask_of(mask, (rows, heads, queries, slots)) and not options.get("is_causal")))
        and kernel_is_faster()
    )


def kernel_is_faster() -> bool:
    """Whether the kernel is built and, where torch uses several threads, can use them too."""
    library = kernel_library()
    return library is not None and (torch.get_num_threads() == 1 or bool(library.preceptor_attention_is_threaded()))


def _is_mask_of(mask: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``mask`` covers every query and slot, and broadcasts over ``shape`` in its first two axes only."""
    if not 2 <= mask.dim() <= 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    wide = (1,) * (4 - mask.dim()) + tuple(mask.shape)  # missing axes broadcast
    return wide[2:] == tuple(shape[2:]) and all(
        size in (1, full) for size, full in zip(wide[:2], shape[:2], strict=True)
    )


# The structures below mirror those of attention.c field by field, in the same order.


class _Heads(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Heads:
        """Address and strides of ``tensor``; an axis with one entry gets stride 0, which broadcasts it."""
        if tensor is None:
            return cls()
        # The kernel walks by strides, so transposed views and broadcast masks need no copy. The innermost stride is not
        # passed on: it must be 1 (see `_plain`).
        strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return cls(tensor.data_ptr(), *strides[:3])


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "queries", "slots", "width")),
        ("scale", ctypes.c_float),
        ("is_causal", ctypes.c_int32),
        *((name, _Heads) for name in ("query", "key", "value", "mask", "out", "log_sums")),
        *((name, _Heads) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
    )


class _CompiledAttention(torch.autograd.Function):
    """``attention.c``, which reads tensors with any strides as long as the coordinates of a head are contiguous."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
        inputs = [_plain(part) for part in (query, key, value)]
        out = _like(inputs[0])
        log_sums = out.new_empty(out.shape[:3])  # [batch, heads, time]: what the backward pass needs of the softmax
        scale = options.get("scale")
        # 1/√width, as in scaled_dot_product_attention.
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
        # Named, so that a copy lives until the kernel returns: the structure holds only its address.
        grad_out, gradients = _plain(gradient), [_like(part) for part in saved[:3]]
        _run("preceptor_attention_backward", _arguments(ctx, (*saved, grad_out, *gradients)))
        return *gradients, None


def _arguments(ctx: Any, tensors: Sequence[Tensor | None]) -> _Arguments:
    """Sizes, options and ``tensors``, which come in the order of the structure."""
    query, key = tensors[:2]
    assert query is not None
    assert key is not None
    rows, heads, queries, width = query.shape
    num_kv_heads, slots = key.shape[1:3]
    sizes = rows, heads, num_kv_heads, queries, slots, width
    return _Arguments(*sizes, ctx.scale, ctx.is_causal, *(_Heads.of(tensor) for tensor in tensors))


def _run(name: str, arguments: _Arguments) -> None:
    library = kernel_library()
    assert library is not None
    # The return value is nonzero when an allocation fails; the buffers grow with rows and threads.
    if library[name](ctypes.byref(arguments), ctypes.c_int64(torch.get_num_threads())):
        raise ModelError(f"no memory for attention over {arguments.rows} rows; make the batch smaller")


def _plain(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 with contiguous coordinates; the tensor itself where it is so already."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor of that shape, stored as [batch, time, heads, width] because the output product reads it so."""
    rows, heads, tokens, width = tensor.shape
    return tensor.new_empty(rows, tokens, heads, width).transpose(1, 2)


class _PytorchAttention(torch.autograd.Function):
    """PyTorch's kernel on a small graph of its own, so that the backward pass runs with the same setting.

    The precision setting that doubles the speed of a model's large products
    (:func:`~preceptor.runs.device.exact_matmul_precision`) and bfloat16 both send the many small products inside this
    kernel to a library with a high cost per call, which makes attention up to four times slower
    (``docs/decisions/0008-attention-on-a-cpu.md``).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        # float32 at least; float64 stays as it is.
        dtype = torch.promote_types(query.dtype, torch.float32)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            kwargs["attn_mask"] = mask.to(dtype)
        # Detached inputs begin a new graph, which `backward` differentiates under the same setting.
        with _faster_kernel(key), torch.set_grad_enabled(any(ctx.needs_input_grad)):
            inputs = [
                tensor.detach().to(dtype).requires_grad_(needed)
                for tensor, needed in zip((query, key, value), ctx.needs_input_grad, strict=False)
            ]
            output = scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], **kwargs)
        # Not in save_for_backward: the small graph hangs on these very tensors.
        ctx.inputs, ctx.output = inputs, output
        return output.detach().to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _faster_kernel(ctx.inputs[1]):
            # retain_graph, in case the caller's backward pass keeps its own graph and runs twice.
            gradients = iter(torch.autograd.grad(ctx.output, wanted, gradient.to(ctx.output.dtype), retain_graph=True))
        return *(next(gradients) if tensor.requires_grad else None for tensor in ctx.inputs), None


@contextlib.contextmanager
def _faster_kernel(key: Tensor) -> Iterator[None]:
    """The precision setting at which PyTorch's kernel is faster: ``highest`` while its products are small."""
    setting = torch.get_float32_matmul_precision()
    if key.shape[-2] * key.shape[-1] < _LARGE:
        # The setting is global to the process, so it must be restored even if the kernel raises.
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(setting)
