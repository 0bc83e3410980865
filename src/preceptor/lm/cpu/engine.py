"""The forward pass of common decoders for acting without gradient: Transformers' weights, few and large operations.

Small models decode at the speed of their calls, not of their arithmetic. Here a layer is four matrix products over
fused weights, two batched products over the kept keys and values, and what little is between them. Everything is
measured against Transformers' own forward when a :class:`~preceptor.lm.model.LanguageModel` is made; where the
two do not agree, or the architecture is not one of ``ARCHITECTURES``, Transformers' forward is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from preceptor.lm.cpu.decode_step import CpuDecodeStep
from preceptor.lm.cpu.kernels import kernel_library
from preceptor.lm.kv_cache import KVCacheLayer

if TYPE_CHECKING:
    from preceptor.lm.model import LanguageModel

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Values of ``config.model_type`` that this file knows."""

MAX_SCORES = 2**24
"""Attention scores held at once on a CPU: 64 MiB in float32."""

_ROWS_FOR_FAST_KERNEL = 9
"""Rows from which a product is faster by the kernel that ``medium`` routes to, as measured with AVX-512."""

MAX_COMPILED = 2**28
"""Weights of the layers up to which one token a row goes through the compiled step, which keeps them packed."""


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm where there is a bias."""

    weight: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        if isinstance(module, nn.LayerNorm):
            return cls(module.weight, module.bias, module.eps)
        return cls(module.weight, None, float(module.variance_epsilon))

    def __call__(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return functional.rms_norm(x, weight.shape, weight, self.epsilon)
        return functional.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.epsilon)


@dataclass(frozen=True)
class FusedLinear:
    """``x @ weight + bias`` with the outputs of several weights side by side.

    Computed in the weights' dtype and given in that of ``x``.
    """

    weights: tuple[Float[Tensor, "input output"], ...]
    bias: Float[Tensor, " outputs"] | None

    @property
    def num_outputs(self) -> int:
        return sum(int(weight.shape[1]) for weight in self.weights)

    def __call__(self, x: Float[Tensor, "row input"]) -> Float[Tensor, "row outputs"]:
        inputs = x.to(self.weights[0].dtype)
        products = [inputs @ weight for weight in self.weights]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)

    def added_to(self, residual: Float[Tensor, "row outputs"], x: Float[Tensor, "row input"]) -> Tensor:
        """``residual + x @ weight + bias``."""
        if self.weights[0].dtype != residual.dtype:
            return residual + self(x)
        total = torch.addmm(residual, x, self.weights[0])
        return total if self.bias is None else total.add_(self.bias)


@dataclass(frozen=True)
class Layer:
    """One decoder layer; ``module`` is the one of Transformers that it stands for."""

    module: nn.Module
    projections: tuple[nn.Module, ...]
    attention_norm: Norm
    query_key_value: FusedLinear
    head_norms: tuple[Norm, Norm] | None
    attention_output: FusedLinear
    feed_forward_norm: Norm
    up: FusedLinear
    down: FusedLinear


class CpuEngine:
    """The layers of a language model, with its weights as they are when this is made.

    On a CPU, or in another dtype, the matrices of the layers are copied (fused and laid out for small batches), so that
    a later change of the model is not seen; elsewhere they are the model's own.

    Args:
        lm: a model of one of ``ARCHITECTURES``.
        dtype: that matrices are kept and multiplied in; None is the model's own. Everything between the products is in
            float32 (float64 for a float64 model), on a CPU the attention too.
        compiled: one token a row goes through :class:`~preceptor.lm.cpu.decode_step.CpuDecodeStep` where that can be.
    """

    def __init__(self, lm: LanguageModel, *, dtype: torch.dtype | None = None, compiled: bool = True) -> None:
        model: Any = lm.model
        if lm.has_adapter:
            model = model.get_base_model()
        config = model.config
        self.dtype = dtype or lm.dtype
        self._states_dtype = torch.promote_types(lm.dtype, torch.float32)
        self._attention_dtype = self._states_dtype if lm.device.type == "cpu" else self.dtype
        self._fuse = lm.device.type == "cpu"
        self._rotary: Any
        self._position_embedding: Any
        self._adapter_enabled = lm.adapter_enabled
        self._embedding = model.get_input_embeddings()
        self._head = self._product(model.get_output_embeddings(), copy=False)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.num_heads)
        self.head_width = int(getattr(config, "head_dim", None) or config.hidden_size // self.num_heads)
        self.is_gated = config.model_type != "gpt2"
        self._activate = _gated_silu if self.is_gated else _gelu
        if config.model_type == "gpt2":
            self._rotary, self._position_embedding = None, model.base_model.wpe
            self._norm = Norm.of(model.base_model.ln_f)
            self.layers = [self._gpt2_layer(module) for module in lm.layers]
        else:
            self._rotary, self._position_embedding = model.base_model.rotary_emb, None
            self._norm = Norm.of(model.base_model.norm)
            self.layers = [self._llama_layer(module) for module in lm.layers]
        self._compiled = self._compile() if compiled else None

    @staticmethod
    def gives(lm: LanguageModel, capture: nn.Module | None) -> bool:
        """Whether the output of ``capture`` can be had: a layer's, or that of its query, key and value projections."""
        return capture is None or any(
            capture is module for layer in lm.layers for module in (layer, *_projections(layer))
        )

    @torch.no_grad()
    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        keep: Bool[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time slots"] | None,
        positions: Int[Tensor, "batch time"],
        cache: Sequence[KVCacheLayer],
        capture: nn.Module | None = None,
    ) -> tuple[Float[Tensor, "kept vocab"], Tensor | None]:
        """Float32 logits of the kept positions and the captured output, as ``LanguageModel.forward`` gives them.

        ``attention_mask`` None lets every token attend to every slot, which is right for a single token without holes.
        """
        with torch.autocast(tokens.device.type, enabled=False):  # the dtype is this object's own matter
            return self._forward(tokens, keep, attention_mask, positions, cache, capture)

    def _forward(
        self,
        tokens: Tensor,
        keep: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        cache: Sequence[KVCacheLayer],
        capture: nn.Module | None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, time = tokens.shape
        states = self._embedding(tokens).to(self._states_dtype)
        if self._position_embedding is not None:
            states = states + self._position_embedding(positions)
        rotary = None if self._rotary is None else self._rotary_factors(positions)
        captured: Tensor | None = None
        if time == 1 and self._compiled is not None and cache[0].length and self._layer_index(capture) is not None:
            states, captured = self._compiled(
                states[:, 0],
                cache,
                rotary=rotary,
                filled=None if attention_mask is None else attention_mask[:, 0],
                captured_layer=self._layer_index(capture) or 0,
            )
            logits = self._logits(states)
            return logits, None if capture is None else captured[:, None]
        mask = None
        if attention_mask is not None:
            lowest = torch.finfo(self._attention_dtype).min
            zeros = torch.zeros(attention_mask.shape, dtype=self._attention_dtype, device=tokens.device)
            mask = zeros.masked_fill_(~attention_mask, lowest)[:, None]
        states = states.flatten(0, 1)
        with _kernel_for(len(states)):
            for layer, kept in zip(self.layers, cache, strict=True):
                projected = layer.query_key_value(layer.attention_norm(states))
                heads = projected.view(batch, time, -1, self.head_width)
                queries, keys, values = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
                if layer.head_norms is not None:
                    queries, keys = layer.head_norms[0](queries), layer.head_norms[1](keys)
                if rotary is not None:
                    queries, keys = _apply_rotary(queries, rotary), _apply_rotary(keys, rotary)
                attended = attention(
                    queries.transpose(1, 2).to(self._attention_dtype),
                    *kept.update(*(part.transpose(1, 2).to(self._attention_dtype) for part in (keys, values))),
                    mask=mask,
                )
                states = layer.attention_output.added_to(states, attended.flatten(0, 1).to(states.dtype))
                hidden = self._activate(layer.up(layer.feed_forward_norm(states)))
                states = layer.down.added_to(states, hidden)
                if capture is not None and captured is None:
                    captured = self._captured(capture, layer, states, projected)
        logits = self._logits(states[keep.flatten()])
        return logits, None if captured is None else captured.view(batch, time, -1)

    def _logits(self, states: Tensor) -> Tensor:
        with _kernel_for(len(states)):
            return self._head(self._norm(states)).float()

    def _layer_index(self, capture: nn.Module | None) -> int | None:
        """The layer whose output is wanted (any, if none is); None where it is another module's."""
        if capture is None:
            return 0
        return next((index for index, layer in enumerate(self.layers) if layer.module is capture), None)

    def _compile(self) -> CpuDecodeStep | None:
        """The compiled step, where this machine, device and dtype have it."""
        weights = sum(weight.numel() for layer in self.layers for weight in layer.down.weights + layer.up.weights)
        fits = self._states_dtype == torch.float32 and self.dtype in (torch.float32, torch.bfloat16)
        if not (self._fuse and fits and weights <= MAX_COMPILED):
            return None
        library = kernel_library()
        return None if library is None else CpuDecodeStep(self, library)

    def _rotary_factors(self, positions: Tensor) -> Tensor:
        """Rotary embedding as complex numbers, one a position and pair of coordinates."""
        angles = positions[..., None, None].float() * self._rotary.inv_freq.float()
        return torch.polar(torch.full_like(angles, float(self._rotary.attention_scaling)), angles)

    def _captured(self, capture: nn.Module, layer: Layer, states: Tensor, projected: Tensor) -> Tensor | None:
        if capture is layer.module:
            return states
        start = 0
        for module in layer.projections:
            width = int(getattr(module, "out_features", 0)) or projected.shape[1]
            if capture is module:
                return projected[:, start : start + width]
            start += width
        return None

    def _llama_layer(self, module: Any) -> Layer:
        attention, feed_forward = module.self_attn, module.mlp
        projections = _projections(module)
        has_head_norms = hasattr(attention, "q_norm")
        return Layer(
            module=module,
            projections=projections,
            attention_norm=Norm.of(module.input_layernorm),
            query_key_value=self._product(*projections),
            head_norms=(Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if has_head_norms else None,
            attention_output=self._product(attention.o_proj),
            feed_forward_norm=Norm.of(module.post_attention_layernorm),
            up=self._product(feed_forward.gate_proj, feed_forward.up_proj),
            down=self._product(feed_forward.down_proj),
        )

    def _gpt2_layer(self, module: Any) -> Layer:
        return Layer(
            module=module,
            projections=_projections(module),
            attention_norm=Norm.of(module.ln_1),
            query_key_value=self._product(*_projections(module)),
            head_norms=None,
            attention_output=self._product(module.attn.c_proj),
            feed_forward_norm=Norm.of(module.ln_2),
            up=self._product(module.mlp.c_fc),
            down=self._product(module.mlp.c_proj),
        )

    def _product(self, *modules: nn.Module, copy: bool = True) -> FusedLinear:
        """The product that gives the outputs of ``modules`` side by side."""
        matrices, biases = zip(*(_matrix(module, self._adapter_enabled) for module in modules), strict=True)
        weights = [matrix.to(self.dtype) for matrix in matrices]
        if copy and self._fuse:
            weights = [torch.cat(weights, dim=1)] if len(weights) > 1 else [weights[0].contiguous()]
        bias = None if biases[0] is None else torch.cat(biases).to(self.dtype)
        return FusedLinear(tuple(weights), bias)


def attention(
    queries: Float[Tensor, "batch heads time width"],
    keys: Float[Tensor, "batch kv_heads slots width"],
    values: Float[Tensor, "batch kv_heads slots width"],
    *,
    mask: Float[Tensor, "batch 1 time slots"] | None,
) -> Float[Tensor, "batch time features"]:
    """Softmax attention of grouped heads, scaled by 1/√width; ``mask`` is added to the scores.

    On a CPU two batched products are several times faster than ``scaled_dot_product_attention`` when few tokens attend
    to many slots, most of all where products are routed to another kernel; keys are best kept with slots side by side.
    """
    batch, num_heads, time, width = queries.shape
    if queries.device.type != "cpu":
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)
    num_kv_heads, slots = keys.shape[1:3]
    keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    block = max(1, MAX_SCORES // (batch * num_heads * slots))
    parts = []
    with _kernel_for(time):
        for start in range(0, time, block):
            part = queries[:, :, start : start + block]
            scores = (part * width**-0.5).reshape(batch * num_kv_heads, -1, width) @ keys
            if mask is not None:
                scores.view(batch, num_heads, -1, slots).add_(mask[:, :, start : start + block])
            parts.append((scores.softmax(-1) @ values).view(batch, num_heads, -1, width))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return attended.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def _kernel_for(num_rows: int) -> Iterator[None]:
    """The full-precision kernel for products of few rows: it is the faster one there, whatever the setting allows."""
    setting = torch.get_float32_matmul_precision()
    if setting == "highest" or num_rows >= _ROWS_FOR_FAST_KERNEL:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


def _apply_rotary(
    heads: Float[Tensor, "batch time heads width"], rotary: Tensor
) -> Float[Tensor, "batch time heads width"]:
    """Rotary embedding; the pairs of coordinates come out side by side, which no inner product notices."""
    half = heads.shape[-1] // 2
    turned = torch.complex(heads[..., :half], heads[..., half:]) * rotary
    return torch.view_as_real(turned).flatten(-2)


def _gated_silu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _projections(layer: Any) -> tuple[nn.Module, ...]:
    """The modules that give a layer's queries, keys and values, in this order."""
    if hasattr(layer, "attn"):
        return (layer.attn.c_attn,)
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def _matrix(module: Any, adapter_enabled: bool) -> tuple[Tensor, Tensor | None]:
    """The matrix [input, output] and the bias of a linear module, with what an adapter adds to it."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base.weight.detach()
    if base is not module and adapter_enabled:
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).detach().to(weight.dtype)
    bias = None if base.bias is None else base.bias.detach()
    return (weight if isinstance(base, Conv1D) else weight.T), bias
