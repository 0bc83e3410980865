"""The policy: a named language model, or one of its kind from random weights."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import ModelOptions


def build_policy(options: ModelOptions, *, device: torch.device, seed: int) -> LanguageModel:
    """The language model that ``options`` describe, on ``device``.

    From scratch it keeps the named model's tokenizer and architecture; a width of its own keeps heads 64 wide and the
    named model's ratio of feed-forward width to width.

    Args:
        options: of the configuration.
        device: where the weights live.
        seed: of random weights.
    """
    adapter = Adapter(options.adapter_rank, options.adapter_alpha) if options.adapter_rank else None
    named = load_language_model(options.name, device=device, dtype=getattr(torch, options.dtype), adapter=adapter)
    if not options.from_scratch:
        return named
    shape = copy.deepcopy(named.model.config)
    if options.num_layers:
        shape.num_hidden_layers = options.num_layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[: options.num_layers]
    if options.width:
        shape.intermediate_size = shape.intermediate_size * options.width // shape.hidden_size
        shape.hidden_size = options.width
        shape.num_attention_heads = shape.num_key_value_heads = max(options.width // 64, 1)
        shape.head_dim = options.width // shape.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # drawn on the CPU, so that every device starts alike
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape, dtype=getattr(torch, options.dtype)
        )
    return LanguageModel(model.to(device), named.tokenizer, name=f"{options.name} from scratch")
