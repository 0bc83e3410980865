"""The compiled step: ``decode_step.c``, called for one token of every row."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import ModelError
from preceptor.lm.kv_cache import KVCacheLayer

if TYPE_CHECKING:
    from preceptor.lm.cpu.engine import CpuEngine, FusedLinear, Layer

PANEL = 32
"""Outputs side by side in a packed weight, as ``decode_step.c`` has it."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "attention_norm",
                "attention_norm_bias",
                "feed_forward_norm",
                "feed_forward_norm_bias",
                "query_norm",
                "key_norm",
            )
        ),
        *((name, _Linear) for name in ("query_key_value", "attention_output", "up", "down")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers",
                "width",
                "num_heads",
                "num_kv_heads",
                "head_width",
                "capacity",
                "captured_layer",
                "is_bfloat16",
                "is_layer_norm",
                "is_gated",
            )
        ),
        ("norm_epsilon", ctypes.c_float),
        ("head_norm_epsilon", ctypes.c_float),
    )


class CpuDecodeStep:
    """One token of every row through the layers of ``native``, whose weights are packed when this is made."""

    def __init__(self, native: CpuEngine, library: ctypes.CDLL) -> None:
        self._library = library
        self._tensors: list[Tensor] = []  # what the pointers point to
        layers = native.layers
        norm = layers[0].attention_norm
        self._model = _Model(
            num_layers=len(layers),
            width=layers[0].attention_output.num_outputs,
            num_heads=native.num_heads,
            num_kv_heads=native.num_kv_heads,
            head_width=native.head_width,
            is_bfloat16=native.dtype == torch.bfloat16,
            is_layer_norm=norm.bias is not None,
            is_gated=native.is_gated,
            norm_epsilon=norm.epsilon,
            head_norm_epsilon=layers[0].head_norms[0].epsilon if layers[0].head_norms else 0.0,
        )
        self._layers = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))

    def __call__(
        self,
        states: Float[Tensor, "row width"],
        cache: Sequence[KVCacheLayer],
        *,
        rotary: Tensor | None,
        filled: Tensor | None,
        captured_layer: int,
    ) -> tuple[Float[Tensor, "row width"], Float[Tensor, "row width"]]:
        """Output of the last layer and of layer ``captured_layer`` (−1: none, and the tensor says nothing).

        Args:
            states: embedded tokens, float32.
            cache: kept layers, which the step extends by one slot.
            rotary: rotary embedding as complex numbers, [row, …, head_width / 2], or None.
            filled: True = the slot counts, [row, slots with the new one], or None for all.
            captured_layer: whose output is wanted.
        """
        states, captured = states.clone(), torch.empty_like(states)
        slot = cache[0].length
        for layer, kept in zip(self._layers, cache, strict=True):
            assert kept.keys is not None
            assert kept.values is not None
            kept.extend(1)
            layer.keys, layer.values = kept.keys.data_ptr(), kept.values.data_ptr()
        self._model.capacity = cache[0].capacity
        self._model.captured_layer = captured_layer
        rotary = None if rotary is None else rotary.contiguous()
        filled = None if filled is None else filled.contiguous()

        failed = self._library.preceptor_step(
            ctypes.byref(self._model),
            self._layers,
            ctypes.c_int64(len(states)),
            ctypes.c_int64(torch.get_num_threads()),
            _pointer(states),
            _pointer(rotary),
            _pointer(filled),
            ctypes.c_int64(slot),
            _pointer(captured),
        )
        if failed:
            raise ModelError(f"no memory for one step of {len(states)} rows; decode fewer at once")
        return states, captured

    def _layer(self, layer: Layer) -> _Layer:
        norms = layer.head_norms or (None, None)
        pointers = {
            "attention_norm": layer.attention_norm.weight,
            "attention_norm_bias": layer.attention_norm.bias,
            "feed_forward_norm": layer.feed_forward_norm.weight,
            "feed_forward_norm_bias": layer.feed_forward_norm.bias,
            "query_norm": None if norms[0] is None else norms[0].weight,
            "key_norm": None if norms[1] is None else norms[1].weight,
        }
        return _Layer(
            **{name: self._keep(None if tensor is None else tensor.float()) for name, tensor in pointers.items()},
            query_key_value=self._packed(layer.query_key_value),
            attention_output=self._packed(layer.attention_output),
            up=self._packed(layer.up),
            down=self._packed(layer.down),
        )

    def _packed(self, product: FusedLinear) -> _Linear:
        (weight,) = product.weights
        inputs, outputs = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -outputs % PANEL))
        panels = padded.view(inputs, -1, PANEL).transpose(0, 1).contiguous()
        bias = None if product.bias is None else product.bias.float()
        return _Linear(weight=self._keep(panels), bias=self._keep(bias), inputs=inputs, outputs=outputs)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
