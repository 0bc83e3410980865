"""Vectors that a language model computes for queries and keys: hidden states, or its attention's own projections.

Both carry gradient into the model when it is run with gradient. An embedding names the modules whose output it reads,
so that the vectors come from a forward pass that happens anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.errors import ConfigError, ModelError
from preceptor.lm.language_model import LanguageModel
from preceptor.lm.score import pad_rows, span_mask


class ModelEmbedding(Protocol):
    """Which module's output becomes a query's vector, which a key's, and how."""

    version: str
    query_module: nn.Module
    key_module: nn.Module

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]: ...

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]: ...


class HiddenStates:
    """The output of layer ``layer`` (negative counts from the end; −1 is the last layer, before the final norm)."""

    def __init__(self, lm: LanguageModel, *, layer: int) -> None:
        self.version = f"hidden-states/{lm.name}/layer={layer}"
        self.query_module = self.key_module = _layer(lm, layer)

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        return captured.float()

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        return captured.float()


class AttentionProjections:
    """The query and key projections of layer ``layer``'s attention, before rotary positions.

    The inner product of a query's and a key's vector is the mean over heads of ``q·k / √head_dim``; with grouped-query
    attention a key head serves all query heads of its group. Works for separate ``q_proj``/``k_proj`` (Llama, Qwen,
    Mistral, Gemma, …) and fused ``c_attn`` (GPT-2) or ``qkv_proj`` (Phi) projections.
    """

    def __init__(self, lm: LanguageModel, *, layer: int) -> None:
        self.version = f"attention-projections/{lm.name}/layer={layer}"
        config = lm.model.config.get_text_config()
        self._num_heads = int(config.num_attention_heads)
        self._num_key_heads = int(getattr(config, "num_key_value_heads", None) or self._num_heads)
        self._head_width = int(getattr(config, "head_dim", None) or config.hidden_size // self._num_heads)
        self.query_module, self.key_module, self._fused = _projections(_layer(lm, layer), lm.name)

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        vectors = captured[..., : self._num_heads * self._head_width].float()
        return vectors / (self._num_heads * self._head_width**0.5)

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        start = self._num_heads * self._head_width if self._fused else 0
        vectors = captured[..., start : start + self._num_key_heads * self._head_width].float()
        heads = vectors.unflatten(-1, (self._num_key_heads, self._head_width))
        return heads.repeat_interleave(self._num_heads // self._num_key_heads, dim=-2).flatten(-2)


MODEL_EMBEDDINGS = {"hidden_states": HiddenStates, "attention": AttentionProjections}


@torch.no_grad()
def key_vectors(
    lm: LanguageModel, embedding: ModelEmbedding, keys: Sequence[Sequence[int]]
) -> Float[Tensor, "pairs dimension"]:
    """Mean of the embedding over each key's tokens, each key read alone after the begin token; float32, no gradient."""
    rows = [[lm.begin_token, *key] for key in keys]
    tokens = pad_rows(rows, filler=lm.begin_token, device=lm.device)
    counts = span_mask([[(1, len(row))] for row in rows], width=tokens.shape[1], device=lm.device)
    captured = lm.forward(tokens, keep=torch.zeros_like(counts), capture=embedding.key_module).captured
    assert captured is not None
    vectors = embedding.keys(captured) * counts[..., None]
    return vectors.sum(1) / counts.sum(1, keepdim=True)


def _layer(lm: LanguageModel, layer: int) -> nn.Module:
    if not -len(lm.layers) <= layer < len(lm.layers):
        raise ConfigError(f"`layer` must lie in -{len(lm.layers)}..{len(lm.layers) - 1} for {lm.name}, got {layer}")
    return lm.layers[layer]


def _projections(layer: nn.Module, name: str) -> tuple[nn.Module, nn.Module, bool]:
    modules = {path.rsplit(".", 1)[-1]: module for path, module in layer.named_modules()}
    if "q_proj" in modules and "k_proj" in modules:
        return modules["q_proj"], modules["k_proj"], False
    for fused in ("c_attn", "qkv_proj"):
        if fused in modules:
            return modules[fused], modules[fused], True
    raise ModelError(
        f"the attention of {name} has no q_proj/k_proj, c_attn or qkv_proj; use the hidden_states embedding"
    )
