"""Floating-point operations of a transformer, counted from its configuration: a forward pass is a third of training."""

from __future__ import annotations

from typing import Any

from torch import nn

TRAINING_FACTOR = 3
"""A backward pass costs two forward passes."""


def flops_per_token(model: nn.Module, *, context: int) -> int:
    """Operations of one forward pass per token: 2 per weight that multiplies, and attention over ``context`` tokens.

    2 N + 4 · layers · width · context / 2, where N counts the weights of matrices that multiply the token's state: all
    but embeddings that are looked up (a tied one multiplies as the output head). Attention is causal, so that a token
    sees half the context on average.

    Source: Kaplan et al., arXiv 2001.08361, table 1.
    """
    config: Any = model.config
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplies = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up - {id(head)})
    operations: int = 2 * multiplies + 2 * config.num_hidden_layers * config.hidden_size * context
    return operations
