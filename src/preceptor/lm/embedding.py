"""Query and key vectors from inside a language model: hidden states, or the projections of its attention.

Gradients flow from both into the model if its pass records them. An embedding names the modules whose output it needs,
so that the vectors come out of a forward pass that happens anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.errors import ConfigError, ModelError, ShapeError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length, pad_rows, span_mask


@runtime_checkable
class ModelEmbedding(Protocol):
    """Which module's output becomes a query's vector, which a key's, and how; ``version`` identifies all three."""

    version: str
    query_module: nn.Module
    key_module: nn.Module

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """Query vectors from the output of ``query_module``; float32, with gradient."""
        ...

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """Key vectors from the output of ``key_module``; float32, with gradient."""
        ...


class HiddenStates:
    """The output of layer ``layer``; −1 is the last one, before the final norm.

    Raises:
        ConfigError: the model has no such layer.
    """

    def __init__(self, lm: LanguageModel, *, layer: int) -> None:
        self.version = f"hidden-states/{lm.name}/layer={layer}"
        # One module for both: a query and a key are compared in the same space.
        self.query_module = self.key_module = _layer(lm, layer)

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """The states, in float32."""
        return captured.float()

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """The states, in float32."""
        return captured.float()


class AttentionProjections:
    """The query and key projections of the attention of layer ``layer``, before norms of heads and rotary positions.

    The inner product of a query and a key vector is the mean over heads of ``q·k / √head_dim``. With grouped-query
    attention, all query heads of a group share a key head. Works with separate ``q_proj`` and ``k_proj`` (Llama, Qwen,
    Mistral, Gemma, …) and with the fused ``c_attn`` (GPT-2) and ``qkv_proj`` (Phi-3).

    Raises:
        ConfigError: the model has no such layer.
        ModelError: its attention has none of these projections.
    """

    def __init__(self, lm: LanguageModel, *, layer: int) -> None:
        self.version = f"attention-projections/{lm.name}/layer={layer}"
        config = lm.model.config.get_text_config()
        self._num_heads = int(config.num_attention_heads)
        self._num_key_heads = int(getattr(config, "num_key_value_heads", None) or self._num_heads)
        # Qwen 3 and Gemma state a head_dim that is not hidden_size / num_heads.
        self._head_width = int(getattr(config, "head_dim", None) or config.hidden_size // self._num_heads)
        # Name of the last component only: families nest attention at different depths.
        modules = {path.rsplit(".", 1)[-1]: module for path, module in _layer(lm, layer).named_modules()}
        fused = next((modules[name] for name in ("c_attn", "qkv_proj") if name in modules), None)
        if fused is None and not {"q_proj", "k_proj"} <= modules.keys():
            raise ModelError(
                f"the attention of {lm.name} has no q_proj and k_proj, c_attn or qkv_proj; use hidden_states instead"
            )
        self.query_module = modules["q_proj"] if fused is None else fused
        self.key_module = modules["k_proj"] if fused is None else fused
        # A fused projection puts all queries first, then all keys.
        self._key_start = 0 if fused is None else self._num_heads * self._head_width

    def queries(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """The queries of all heads, concatenated and divided by ``num_heads · √head_dim``."""
        # The slice drops the keys and values of a fused projection.
        vectors = captured[..., : self._num_heads * self._head_width].float()
        # n heads and 1/√d as in attention: ⟨query, key⟩ becomes the mean over heads of q·k / √d.
        return vectors / float(self._num_heads * self._head_width**0.5)

    def keys(self, captured: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch dimension"]:
        """The keys of all heads, concatenated; each is repeated for the query heads of its group."""
        vectors = captured[..., self._key_start : self._key_start + self._num_key_heads * self._head_width].float()
        heads = vectors.reshape(*vectors.shape[:-1], self._num_key_heads, self._head_width)  # [..., key head, width]
        return heads.repeat_interleave(self._num_heads // self._num_key_heads, dim=-2).flatten(-2)


MODEL_EMBEDDINGS: dict[str, type[HiddenStates] | type[AttentionProjections]] = {
    "hidden_states": HiddenStates,
    "attention": AttentionProjections,
}


@torch.no_grad()
def key_vectors(
    lm: LanguageModel, embedding: ModelEmbedding, keys: Sequence[Sequence[int]], *, max_tokens: int = 8_192
) -> Float[Tensor, "pairs dimension"]:
    """Mean of the embedding over the tokens of each key, encoded alone after the begin token; float32, no gradient.

    Args:
        lm: the model that ``embedding`` was made for.
        embedding: which vectors to read from it.
        keys: token ids of each key, at least one.
        max_tokens: padded tokens per pass.

    Raises:
        ShapeError: there are no keys, or a key is empty.
        ModelError: a key is longer than the model's context.
    """
    # The begin token is what a row starts with in training, but its state says nothing about the key.
    rows = [[lm.begin_token, *key] for key in keys]
    if not rows or min(map(len, rows)) == 1:
        raise ShapeError(f"every key must have at least one token, got {[len(key) for key in keys]}")
    if (longest := max(map(len, rows))) > lm.context_length:
        raise ModelError(
            f"a key of {longest} tokens does not fit the context of {lm.context_length} tokens of {lm.name}; shorten it"
        )
    vectors: dict[int, Tensor] = {}
    for batch in batches_by_length([len(row) for row in rows], max_tokens=max_tokens):
        found = mean_vectors(lm, embedding, [rows[index] for index in batch])
        vectors.update(zip(batch, found, strict=True))
    # Batches come sorted by length, so put the vectors back into the order of `keys`.
    return torch.stack([vectors[index] for index in range(len(rows))])


def mean_vectors(
    lm: LanguageModel, embedding: ModelEmbedding, rows: Sequence[Sequence[int]]
) -> Float[Tensor, "row dimension"]:
    """Mean of the embedding over the tokens of each row but its first, all rows in one pass; with gradient."""
    tokens = pad_rows(rows, filler=lm.begin_token, device=lm.device)
    counts = span_mask([[(1, len(row))] for row in rows], width=tokens.shape[1], device=lm.device)
    # No logits are wanted anywhere: the pass is made for the captured module alone.
    captured = lm.forward(tokens, keep=torch.zeros_like(counts), capture=embedding.key_module).captured
    assert captured is not None, "the key module is no part of the model"
    # [row, time, dimension], without begin token and padding, summed to [row, dimension].
    return (embedding.keys(captured) * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)


def _layer(lm: LanguageModel, layer: int) -> nn.Module:
    layers = lm.layers
    if not -len(layers) <= layer < len(layers):
        raise ConfigError(f"`layer` must lie in -{len(layers)}..{len(layers) - 1} for {lm.name}, got {layer}")
    return layers[layer]
