"""The compiled decode step: ``decode_step.c``, called for one token of every row."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from preceptor.errors import ModelError
from preceptor.lm.cpu.weights import DecoderLayer, DecoderWeights, FusedLinear
from preceptor.lm.forward import KVCacheLayer

PANEL = 32
"""Outputs that lie next to each other in a packed weight, as in ``decode_step.c``."""


# The structures below mirror those of decode_step.c field by field, in the same order.


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


_NORMS = (
    *("attention_norm", "attention_norm_bias", "feed_forward_norm", "feed_forward_norm_bias"),
    *("query_norm", "key_norm"),
)
_LINEARS = ("query_key_value", "attention_output", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, _Linear) for name in _LINEARS),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


_SIZES = ("num_layers", "width", "num_heads", "num_kv_heads", "head_width", "capacity", "captured_layer")
_FLAGS = ("is_bfloat16", "is_layer_norm", "is_gated")


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, *_FLAGS)),
        ("norm_epsilon", ctypes.c_float),
        ("head_norm_epsilon", ctypes.c_float),
    )


class CpuDecodeStep:
    """One token of every row through all layers; packs the matrices of ``weights`` when it is made."""

    def __init__(self, weights: DecoderWeights, library: ctypes.CDLL) -> None:
        self._library = library
        self._tensors: list[Tensor] = []  # owns the memory that the structures point to
        first = weights.layers[0]
        self._model = _Model(
            num_layers=len(weights.layers),
            width=first.attention_output.num_outputs,
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_width=weights.head_width,
            is_bfloat16=weights.dtype == torch.bfloat16,
            is_layer_norm=first.attention_norm.bias is not None,
            is_gated=weights.is_gated,
            norm_epsilon=first.attention_norm.epsilon,
            head_norm_epsilon=first.head_norms[0].epsilon if first.head_norms else 0.0,
        )
        # An array of structures, which C walks layer by layer.
        self._layers = (_Layer * len(weights.layers))(*(self._layer(layer) for layer in weights.layers))

    def __call__(
        self,
        states: Float[Tensor, "batch width"],
        cache: Sequence[KVCacheLayer],
        *,
        rotary: Complex[Tensor, "batch 1 1 half_head_width"] | None,
        filled: Bool[Tensor, "batch slots"] | None,
        captured_layer: int,
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
        """Output of the last layer and of layer ``captured_layer``.

        Args:
            states: embedded tokens, float32.
            cache: one per layer, not empty; each is extended by one slot.
            rotary: rotary embedding of each row's position, or None.
            filled: True = the slot counts, the new one included; None = all of them count.
            captured_layer: index of the layer whose output is returned too.

        Raises:
            ModelError: there is no memory for the intermediate results.
        """
        states, captured = states.clone(), torch.empty_like(states)  # the step overwrites both
        slot = cache[0].length  # index of the new token's slot, the same in every layer
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            assert layer_cache.keys is not None
            assert layer_cache.values is not None
            layer_cache.extend(1)  # may move the buffers, so their addresses are read afterwards
            layer.keys, layer.values = layer_cache.keys.data_ptr(), layer_cache.values.data_ptr()
        # Every layer's cache has seen the same calls, so the first speaks for all.
        self._model.capacity = cache[0].capacity
        self._model.captured_layer = captured_layer
        # Named, so that a copy lives until the call returns.
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

    def _layer(self, layer: DecoderLayer) -> _Layer:
        query_norm, key_norm = layer.head_norms or (None, None)
        norms = (
            layer.attention_norm.weight,
            layer.attention_norm.bias,
            layer.feed_forward_norm.weight,
            layer.feed_forward_norm.bias,
            None if query_norm is None else query_norm.weight,
            None if key_norm is None else key_norm.weight,
        )
        return _Layer(
            **{name: self._address(tensor) for name, tensor in zip(_NORMS, norms, strict=True)},
            **{name: self._packed(getattr(layer, name)) for name in _LINEARS},
        )

    def _packed(self, linear: FusedLinear) -> _Linear:
        """Weights as panels [output / PANEL, input, PANEL], so that the step reads them front to back exactly once."""
        # Exactly one: on a CPU the matrices of a layer are fused (`load_weights`).
        (weight,) = linear.weights
        inputs, outputs = weight.shape
        # [input, output] padded to whole panels -> [input, panel, PANEL] -> [panel, input, PANEL].
        panels = pad(weight, (0, -outputs % PANEL)).view(inputs, -1, PANEL).transpose(0, 1)
        return _Linear(
            weight=self._address(panels, weight.dtype), bias=self._address(linear.bias), inputs=inputs, outputs=outputs
        )

    def _address(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        """Where ``tensor`` lies as a contiguous one in ``dtype``, which is kept alive; None (NULL) for None."""
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype).contiguous()
        # Only a pointer goes to C; without this reference Python would free the memory behind it.
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
