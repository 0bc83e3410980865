"""A decoder's weights as the engine reads them: a handful of large matrices per layer instead of many small modules.

On a CPU the matrices are copied: fused (queries, keys and values are one matrix) and laid out as [input, output], so
that products with a few rows read them in order. On other devices they are the model's own: a copy would cost memory,
and the library there picks its own layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Values of ``config.model_type`` whose layers :func:`load_weights` can read."""

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the activation of GPT-2's feed-forward network, as its configuration may call it."""

SILU = ("silu", "swish")
"""The same for Llama and its kin."""


@dataclass(frozen=True)
class Norm:
    """A layer norm, or an RMS norm where ``bias`` is None."""

    weight: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None
    epsilon: float

    @classmethod
    def from_module(cls, module: Any) -> Norm:
        """The norm that ``module`` computes."""
        if isinstance(module, nn.LayerNorm):
            return cls(module.weight, module.bias, module.eps)
        return cls(module.weight, None, float(module.variance_epsilon))  # Transformers' RMS norms name it so

    def __call__(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        # Norm weights may be bfloat16; the states are float32 and stay it.
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return functional.rms_norm(x, weight.shape, weight, self.epsilon)
        return functional.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.epsilon)


@dataclass(frozen=True)
class FusedLinear:
    """``x @ weight + bias`` for several linear layers of one input, outputs side by side.

    Products are computed in the dtype of the weights and returned in that of ``x``.
    """

    weights: tuple[Float[Tensor, "input output"], ...]
    bias: Float[Tensor, " outputs"] | None

    @property
    def num_outputs(self) -> int:
        """Outputs of all layers together."""
        return sum(int(weight.shape[1]) for weight in self.weights)

    def __call__(self, x: Float[Tensor, "row input"]) -> Float[Tensor, "row outputs"]:
        inputs = x.to(self.weights[0].dtype)
        # On a CPU one product; elsewhere one for each of the model's own matrices.
        products = [inputs @ weight for weight in self.weights]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)

    def add_to(self, residual: Float[Tensor, "row outputs"], x: Float[Tensor, "row input"]) -> Tensor:
        """``residual + x @ weight + bias``, with product and sum in one call where the dtypes agree."""
        if self.weights[0].dtype != residual.dtype:
            return residual + self(x)
        # A product and a residual: addmm starts from `residual`, which saves a pass over memory.
        total = torch.addmm(residual, x, self.weights[0])
        return total if self.bias is None else total.add_(self.bias)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer.

    Attributes:
        module: the layer of Transformers that this one stands for.
        projections: its modules that compute queries, keys and values; GPT-2 has one for all three.
        head_norms: norms of each head's queries and keys (Qwen 3), or None.
        up: into the feed-forward network; gate and up projection side by side where it is gated.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    attention_norm: Norm
    query_key_value: FusedLinear
    head_norms: tuple[Norm, Norm] | None
    attention_output: FusedLinear
    feed_forward_norm: Norm
    up: FusedLinear
    down: FusedLinear


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder's layers and what surrounds them.

    Attributes:
        dtype: of the matrices.
        is_gated: gated SiLU in the feed-forward network (Llama and its kin), else GELU (GPT-2).
        position_embedding: learned positions, or None.
        rotary_embedding: Transformers' module with the rotary frequencies, or None; exactly one of the two is there.
    """

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_width: int
    is_gated: bool
    token_embedding: nn.Module
    position_embedding: nn.Module | None
    rotary_embedding: nn.Module | None
    layers: list[DecoderLayer]
    norm: Norm
    head: FusedLinear


def can_read(model: Any) -> bool:
    """Whether ``model`` is one of ``ARCHITECTURES`` with the usual activation and scale of attention.

    Read from the configuration: a comparison of logits may not see them while the weights that follow are zero.
    """
    config = model.config
    # Weights in 4 bits are packed: no matrix could be read from them.
    if config.model_type not in ARCHITECTURES or getattr(config, "quantization_config", None):
        return False
    if config.model_type == "gpt2":
        usual_scale = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        return bool(usual_scale and config.activation_function in TANH_GELU and not config.add_cross_attention)
    return config.hidden_act in SILU


def load_weights(model: Any, *, dtype: torch.dtype, adapter_enabled: bool) -> DecoderWeights:
    """The weights of ``model``, one of ``ARCHITECTURES``, as they are now, with matrices in ``dtype``.

    An adapter's update is added to the matrices where ``adapter_enabled``.
    """
    fuse = model.device.type == "cpu"  # see the head of this file

    def fused(*modules: nn.Module, copy: bool = True) -> FusedLinear:
        matrices, biases = zip(*(_matrix(module, adapter_enabled) for module in modules), strict=True)
        weights = [matrix.to(dtype) for matrix in matrices]  # each [input, output]
        if copy and fuse:  # one matrix, outputs next to each other; `contiguous` undoes the transpose of nn.Linear
            weights = [torch.cat(weights, dim=1)] if len(weights) > 1 else [weights[0].contiguous()]
        bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        return FusedLinear(tuple(weights), bias)

    def llama_layer(module: Any) -> DecoderLayer:
        attention, feed_forward = module.self_attn, module.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            head_norms = Norm.from_module(attention.q_norm), Norm.from_module(attention.k_norm)
        return DecoderLayer(
            module=module,
            projections=projections(module),
            attention_norm=Norm.from_module(module.input_layernorm),
            query_key_value=fused(*projections(module)),
            head_norms=head_norms,
            attention_output=fused(attention.o_proj),
            feed_forward_norm=Norm.from_module(module.post_attention_layernorm),
            up=fused(feed_forward.gate_proj, feed_forward.up_proj),  # in the order that the activation splits them
            down=fused(feed_forward.down_proj),
        )

    def gpt2_layer(module: Any) -> DecoderLayer:
        return DecoderLayer(
            module=module,
            projections=projections(module),
            attention_norm=Norm.from_module(module.ln_1),
            query_key_value=fused(*projections(module)),
            head_norms=None,
            attention_output=fused(module.attn.c_proj),
            feed_forward_norm=Norm.from_module(module.ln_2),
            up=fused(module.mlp.c_fc),
            down=fused(module.mlp.c_proj),
        )

    config, decoder = model.config, model.base_model
    # GPT-2 is the odd one: learned positions, layer norms with bias, Conv1D, no gate. All others are Llama's layer.
    is_gpt2 = config.model_type == "gpt2"
    num_heads = int(config.num_attention_heads)
    return DecoderWeights(
        dtype=dtype,
        num_heads=num_heads,
        # Absent, or None, means one key-value head for each query head.
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        is_gated=not is_gpt2,
        token_embedding=model.get_input_embeddings(),
        position_embedding=decoder.wpe if is_gpt2 else None,
        rotary_embedding=None if is_gpt2 else decoder.rotary_emb,
        layers=[gpt2_layer(module) if is_gpt2 else llama_layer(module) for module in decoder_layers(model)],
        norm=Norm.from_module(decoder.ln_f if is_gpt2 else decoder.norm),
        # As large as all layers of a small model together, and often tied to the embedding: never copied.
        head=fused(model.get_output_embeddings(), copy=False),
    )


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of ``model``, one of ``ARCHITECTURES``."""
    layers: nn.ModuleList = model.base_model.h if model.config.model_type == "gpt2" else model.base_model.layers
    return layers


def projections(layer: Any) -> tuple[nn.Module, ...]:
    """The modules that compute a layer's queries, keys and values, in this order."""
    if hasattr(layer, "attn"):
        return (layer.attn.c_attn,)
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def _matrix(
    module: Any, adapter_enabled: bool
) -> tuple[Float[Tensor, "input output"], Float[Tensor, " output"] | None]:
    """Matrix and bias of a linear module, with an adapter's update added to the matrix."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base.weight.detach()
    # The sum is a new tensor, so the model's own weight is left alone.
    if base is not module and adapter_enabled:
        for name in module.active_adapters:  # LoRA: weight + alpha / rank * B A
            weight = weight + module.get_delta_weight(name).detach().to(weight.dtype)
    bias = None if base.bias is None else base.bias.detach()
    # GPT-2's Conv1D is a linear layer whose weight is stored as [input, output].
    return (weight if isinstance(base, Conv1D) else weight.T), bias
