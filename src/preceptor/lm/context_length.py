"""How many tokens a model can read, from its configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig

from preceptor.errors import ModelError

_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size", "local": "window_size"}
"""Kind of layer, and the key of its attention window in a configuration."""


def context_length(config: PreTrainedConfig, name: str) -> int:
    """Tokens that a row may hold: the least of its position limit and of the lengths beyond which attention changes.

    Up to its window (or chunk), a layer with windowed attention sees what full attention sees. Rotary positions that
    are rescaled beyond some length would be rescaled for cached keys too, which cannot be done.
    """
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    # A configuration that does not list the kinds of its layers means its window for all of them.
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or tuple(_WINDOWS)
    limits += [getattr(config, window, None) for kind, window in _WINDOWS.items() if kind in kinds]
    rotary = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    for parameters in (rotary, *rotary.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            limits.append(parameters.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise ModelError(f"the configuration of {name} states no context length; set max_position_embeddings there")
    return min(known)
