"""The models that are measured: the bundled one, and small ones of known shape with random weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.lm.load import STARTER, load_language_model, load_tokenizer
from preceptor.lm.model import LanguageModel

H192 = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4_096,
}
"""4.3M parameters with a tied head."""

LLAMA_3B = {
    "hidden_size": 3_072,
    "intermediate_size": 8_192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
}
"""The shape of Llama-3.2-3B."""


def starter(*, context_length: int = 4_096) -> LanguageModel:
    """The bundled model, allowed longer rows than it was trained on: its positions are rotary."""
    lm = load_language_model(STARTER, device=torch.device("cpu"))
    lm.context_length = context_length
    return lm


def random_llama(shape: dict[str, object], *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A Llama of ``shape`` with random weights, and the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"max_position_embeddings": 4_096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, **shape}
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return LanguageModel(model, load_tokenizer(STARTER), name="random Llama")
