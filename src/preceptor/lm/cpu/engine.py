"""A forward pass without gradient for common decoders: Transformers' weights in few and large operations.

A small model decodes at the speed of its calls, not of its arithmetic. Here a layer is four products with fused
weights, two batched products with the cached keys and values, and little in between. Where a C compiler is at hand, one
token per row goes through all layers in a single call (:class:`~preceptor.lm.cpu.decode_step.CpuDecodeStep`). On a GPU
the same few operations run with the model's own weights and PyTorch's attention.

Nothing here is trusted: :class:`~preceptor.lm.model.LanguageModel` compares an engine's logits with Transformers' own
before it uses one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from preceptor.lm.cpu.decode_step import CpuDecodeStep
from preceptor.lm.cpu.kernels import kernel_library
from preceptor.lm.cpu.weights import (
    DecoderLayer,
    DecoderWeights,
    can_read,
    decoder_layers,
    load_weights,
    projections,
)
from preceptor.lm.forward import KVCacheLayer

MAX_SCORES = 2**24
"""Attention scores held at once on a CPU: 64 MiB in float32."""

MAX_COMPILED = 2**28
"""Feed-forward weights up to which the decode step is compiled; it holds a packed copy of every layer's."""

_ROWS_FOR_FAST_KERNEL = 9
"""Rows from which a product is faster with the kernel that ``medium`` selects; measured with AVX-512."""


class Engine(Protocol):
    """A forward pass without gradient over a model's weights as they were at its first call."""

    def can_capture(self, module: nn.Module | None) -> bool:
        """Whether :meth:`forward` can return the output of ``module``; None (nothing) always can be."""
        ...

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        keep: Bool[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time slots"] | None,
        positions: Int[Tensor, "batch time"],
        cache: Sequence[KVCacheLayer],
        capture: nn.Module | None = None,
    ) -> tuple[Float[Tensor, "kept vocab"], Float[Tensor, "batch time features"] | None]:
        """Float32 logits of the positions that ``keep`` marks, in row-major order, and the output of ``capture``.

        Args:
            tokens: token ids, appended to what ``cache`` holds.
            keep: True = logits are wanted here.
            attention_mask: True = this token attends to that slot (of the cache, then of ``tokens``); None = every
                token attends to every slot, which is right for a single token without holes.
            positions: position of each token in its row.
            cache: keys and values of each layer, which this pass extends.
            capture: a module for which :meth:`can_capture` holds, or None.
        """
        ...


def accelerate(model: Any, *, dtype: torch.dtype | None = None, adapter_enabled: bool = True) -> Engine | None:
    """An engine for ``model``, or None where :func:`~preceptor.lm.cpu.weights.can_read` says no.

    Cheap until the first pass, when the weights are read; later changes of the model go unseen on a CPU.

    Args:
        model: a causal language model of Transformers; its linear layers may carry adapters.
        dtype: matrices are held and multiplied in this dtype; None is the model's own. Everything between the products
            is float32 (float64 for a float64 model), on a CPU the attention too.
        adapter_enabled: False leaves adapters out.
    """
    if not can_read(model):
        return None
    return CpuEngine(model, dtype=dtype or model.dtype, adapter_enabled=adapter_enabled)


class CpuEngine:
    """The :class:`Engine` of the decoders in ``ARCHITECTURES``."""

    def __init__(self, model: Any, *, dtype: torch.dtype, adapter_enabled: bool) -> None:
        self._model = model
        self._dtype = dtype
        self._adapter_enabled = adapter_enabled
        # Residual stream and norms are float32 whatever the matrices are: only products lose precision. On a CPU
        # attention stays in float32 too, because products of bfloat16 heads are slow there.
        self._states_dtype = torch.promote_types(model.dtype, torch.float32)
        self._attention_dtype = self._states_dtype if model.device.type == "cpu" else dtype

    @cached_property
    def _weights(self) -> DecoderWeights:
        """Read once, at the first pass."""
        return load_weights(self._model, dtype=self._dtype, adapter_enabled=self._adapter_enabled)

    @cached_property
    def _decode_step(self) -> CpuDecodeStep | None:
        """The compiled step, where this machine, device, dtype and size allow it."""
        # The feed-forward network holds most of a layer's weights, so it alone decides.
        layers = self._weights.layers
        size = sum(weight.numel() for layer in layers for weight in layer.down.weights + layer.up.weights)
        fits = self._states_dtype == torch.float32 and self._dtype in (torch.float32, torch.bfloat16)
        if not (self._model.device.type == "cpu" and fits and size <= MAX_COMPILED):
            return None
        library = kernel_library()
        return None if library is None else CpuDecodeStep(self._weights, library)

    def can_capture(self, module: nn.Module | None) -> bool:
        """True for a layer, and for a layer's query, key and value projections."""
        return module is None or any(
            module is candidate for layer in decoder_layers(self._model) for candidate in (layer, *projections(layer))
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
    ) -> tuple[Float[Tensor, "kept vocab"], Float[Tensor, "batch time features"] | None]:
        """As :meth:`Engine.forward`."""
        with torch.autocast(tokens.device.type, enabled=False):  # this engine chooses its dtypes itself
            step = self._decode_step  # before anything else, so that it too has the weights of the first pass
            states = self._embed(tokens, positions)
            rotary = self._rotary_factors(positions)
            captured_layer = self._layer_index(capture)
            # A first pass goes through `_forward`, which allocates the cache.
            # The compiled step wants one token a row, a cache whose buffers exist, and no projections.
            if step is not None and tokens.shape[1] == 1 and cache[0].length and captured_layer is not None:
                # [batch, slots]: one new token per row
                filled = None if attention_mask is None else attention_mask[:, 0]
                last, captured = step(
                    states[:, 0], cache, rotary=rotary, filled=filled, captured_layer=captured_layer
                )  # both [batch, width]
                return self._logits(last), None if capture is None else captured[:, None]
            return self._forward(states, keep, attention_mask, rotary, cache, capture)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Float[Tensor, "batch time width"]:
        weights = self._weights
        states: Tensor = weights.token_embedding(tokens).to(self._states_dtype)  # [batch, time, width]
        if weights.position_embedding is not None:
            states = states + weights.position_embedding(positions)
        return states

    def _forward(
        self,
        states: Float[Tensor, "batch time width"],
        keep: Bool[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time slots"] | None,
        rotary: Tensor | None,
        cache: Sequence[KVCacheLayer],
        capture: nn.Module | None,
    ) -> tuple[Float[Tensor, "kept vocab"], Float[Tensor, "batch time features"] | None]:
        weights = self._weights
        # One for the queries, one each for the keys and values.
        head_counts = (weights.num_heads, weights.num_kv_heads, weights.num_kv_heads)
        activate = _gated_silu if weights.is_gated else _gelu
        mask = None if attention_mask is None else self._additive_mask(attention_mask)
        captured: Tensor | None = None
        batch, time = states.shape[:2]
        # From here on [batch * time, width]: to a product with a weight every token is a row like any other, and the
        # residual can be added inside the product (`add_to`).
        states = states.flatten(0, 1)
        with _kernel_for(len(states)):
            for layer, layer_cache in zip(weights.layers, cache, strict=True):
                # All queries, then keys, then values: [batch * time, (num_heads + 2 * num_kv_heads) * head_width].
                projected = layer.query_key_value(layer.attention_norm(states))
                heads = projected.view(batch, time, -1, weights.head_width)
                # Each [batch, time, heads, head_width]; the key-value heads may be fewer (grouped queries).
                queries, keys, values = heads.split(head_counts, dim=2)
                if layer.head_norms is not None:
                    query_norm, key_norm = layer.head_norms
                    queries, keys = query_norm(queries), key_norm(keys)
                if rotary is not None:
                    queries, keys = _apply_rotary(queries, rotary), _apply_rotary(keys, rotary)
                # Attention and cache have heads outside time: [batch, heads, time, head_width].
                queries, keys, values = (
                    part.transpose(1, 2).to(self._attention_dtype) for part in (queries, keys, values)
                )
                keys, values = layer_cache.update(keys, values)  # all slots so far, the new ones last
                attended = cached_attention(queries, keys, values, mask=mask)  # [batch, time, num_heads * head_width]
                states = layer.attention_output.add_to(states, attended.flatten(0, 1).to(states.dtype))
                hidden = activate(layer.up(layer.feed_forward_norm(states)))  # [batch * time, feed-forward width]
                states = layer.down.add_to(states, hidden)
                if capture is not None and captured is None:
                    # Once the capturing layer is found the others are passed over; a later one cannot match.
                    captured = _captured(capture, layer, states, projected)
        # The head is the largest product of a small model, so only the rows that are wanted go through it.
        logits = self._logits(states[keep.flatten()])  # [kept, vocab]
        return logits, None if captured is None else captured.view(batch, time, -1)

    def _logits(self, states: Float[Tensor, "row width"]) -> Float[Tensor, "row vocab"]:
        with _kernel_for(len(states)):
            # The head's product is of few rows while decoding and of many while reading, so it chooses for itself.
            return self._weights.head(self._weights.norm(states)).float()

    def _additive_mask(self, attention_mask: Bool[Tensor, "batch time slots"]) -> Float[Tensor, "batch 1 time slots"]:
        """0 where ``attention_mask`` is True, else the lowest finite number: a row of −inf alone would become NaN."""
        zeros = torch.zeros(attention_mask.shape, dtype=self._attention_dtype, device=attention_mask.device)
        return zeros.masked_fill_(~attention_mask, torch.finfo(self._attention_dtype).min)[:, None]

    def _rotary_factors(self, positions: Tensor) -> Tensor | None:
        """Rotary embedding as complex numbers ``exp(i · position · frequency)``, [batch, time, 1, head_width / 2]."""
        embedding: Any = self._weights.rotary_embedding
        if embedding is None:
            return None
        # In float32: bfloat16 has eight significant bits, so positions above 256 would no longer be whole numbers.
        angles = positions[..., None, None].float() * embedding.inv_freq.float()
        return torch.polar(torch.full_like(angles, float(embedding.attention_scaling)), angles)

    def _layer_index(self, capture: nn.Module | None) -> int | None:
        """Index of the layer ``capture``, 0 (any would do) if nothing is captured, None if it is another module."""
        if capture is None:
            return 0
        return next((index for index, layer in enumerate(self._weights.layers) if layer.module is capture), None)


def probe_logits(engine: Engine, tokens: Int[Tensor, "1 time"], *, num_layers: int) -> Float[Tensor, "time vocab"]:
    """Logits at every position of one row, to be compared with the model's own.

    The last token is read in a pass of its own, so that the cache and the decode step are tried too.
    """
    time, device = tokens.shape[1], tokens.device
    cache = [KVCacheLayer(slots_innermost=device.type == "cpu") for _ in range(num_layers)]
    visible = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    positions = torch.arange(time, device=device)[None]
    # First everything but the last token as one block, then the last token on the cache that the block filled.
    parts = [
        engine.forward(
            tokens[:, start:end],
            keep=torch.ones_like(tokens[:, start:end], dtype=torch.bool),
            attention_mask=visible[None, start:end, :end],
            positions=positions[:, start:end],
            cache=cache,
        )[0]
        for start, end in ((0, time - 1), (time - 1, time))
    ]
    return torch.cat(parts)


def relative_difference(
    engine: Engine, tokens: Int[Tensor, "1 time"], logits: Float[Tensor, "time vocab"], *, num_layers: int
) -> float:
    """Largest difference of the engine's logits from the model's own ``logits``, relative to the largest of those."""
    difference = probe_logits(engine, tokens, num_layers=num_layers) - logits
    # NaN where both are: damaged weights are reported where they are sampled from.
    return float((difference.abs().max() / logits.abs().max()).nan_to_num(0.0))


def cached_attention(
    queries: Float[Tensor, "batch heads time width"],
    keys: Float[Tensor, "batch kv_heads slots width"],
    values: Float[Tensor, "batch kv_heads slots width"],
    *,
    mask: Float[Tensor, "batch 1 time slots"] | None,
) -> Float[Tensor, "batch time features"]:
    """Softmax attention of grouped heads, scaled by 1/√width; ``mask`` is added to the scores.

    On a CPU two batched products are several times faster than ``scaled_dot_product_attention`` when few tokens attend
    to many slots, most of all where the matmul precision routes its products elsewhere. They are fastest when the keys
    have slots innermost in memory (:class:`~preceptor.lm.decode.KVCacheLayer`).
    """
    batch, num_heads, time, width = queries.shape
    if queries.device.type != "cpu":
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)
    num_kv_heads, slots = keys.shape[1:3]
    # [batch * kv_heads, width, slots] and [batch * kv_heads, slots, width]
    keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    # At least one token, even if its scores alone exceed the limit.
    block = max(1, MAX_SCORES // (batch * num_heads * slots))  # tokens whose scores are held at once
    parts = []
    with _kernel_for(time):
        for start in range(0, time, block):
            part = queries[:, :, start : start + block]
            # Query heads of one group lie next to each other, so the group becomes more rows of one product:
            # [batch * kv_heads, group * block, slots].
            # [batch * kv_heads, group * block, width] @ [batch * kv_heads, width, slots].
            scores = (part * width**-0.5).reshape(batch * num_kv_heads, -1, width) @ keys
            if mask is not None:
                scores.view(batch, num_heads, -1, slots).add_(mask[:, :, start : start + block])
            # [batch * kv_heads, group * block, width] -> [batch, heads, block, width].
            parts.append((scores.softmax(-1) @ values).view(batch, num_heads, -1, width))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return attended.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def _kernel_for(num_rows: int) -> Iterator[None]:
    """Full float32 precision for products of few rows: there it is the faster kernel, whatever the setting allows."""
    setting = torch.get_float32_matmul_precision()
    # From nine rows on the setting's own kernel is the faster one.
    if setting == "highest" or num_rows >= _ROWS_FOR_FAST_KERNEL:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


def _captured(capture: nn.Module, layer: DecoderLayer, states: Tensor, projected: Tensor) -> Tensor | None:
    """The output of ``capture`` as rows, if it is ``layer`` or one of its projections; else None."""
    if capture is layer.module:
        return states
    start = 0
    for module in layer.projections:
        # A Conv1D (GPT-2) states no `out_features`; it is the only projection, so all columns are its own.
        width = int(getattr(module, "out_features", 0)) or projected.shape[1]
        if capture is module:
            return projected[:, start : start + width]
        start += width
    return None


def _apply_rotary(heads: Float[Tensor, "batch time heads width"], rotary: Tensor) -> Tensor:
    """Each pair of coordinates (i, i + width/2) turned by its angle.

    The two of a pair come out next to each other instead of half a head apart. Queries and keys are reordered alike, so
    their inner products do not change.
    """
    # A rotation of the plane is a complex product: (x + iy) · e^(i·angle).
    half = heads.shape[-1] // 2
    rotated = torch.complex(heads[..., :half], heads[..., half:]) * rotary  # [batch, time, heads, width / 2]
    return torch.view_as_real(rotated).flatten(-2)


def _gated_silu(x: Float[Tensor, "row double_width"]) -> Float[Tensor, "row width"]:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _gelu(x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    return functional.gelu(x, approximate="tanh")
