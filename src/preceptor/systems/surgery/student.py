"""The student: a small transformer from random weights, what it knows of a text, and what it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from preceptor.objectives.entropy import entropy

WINDOWS_PER_PASS = 128


def build_student(
    *,
    architecture: str,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    width: int,
    block_size: int,
    seed: int,
    device: torch.device,
) -> PreTrainedModel:
    """A GPT-2 or Llama of the given size with random weights drawn from ``seed``; no dropout, tied embeddings.

    Llama's feed-forward layer has 8/3 of the width (rounded up to eight), so that both have as many weights.
    """
    size: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": block_size,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",  # the one that shows its attention to the surgeon; no slower at this size
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel
        if architecture == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        else:
            size |= {"intermediate_size": 8 * math.ceil(width / 3), "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=num_heads))
    nn.Module.to(model, device)
    model.eval()  # type: ignore[no-untyped-call]  # nothing is dropped in either mode
    return model


def next_token_logits(model: PreTrainedModel, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
    """Logits of the token after each position."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


@dataclass(frozen=True)
class Knowledge:
    """What a student knows of a text, means over its tokens: nats, share of right guesses, nats."""

    cross_entropy: float
    accuracy: float
    entropy: float


@torch.no_grad()
def knowledge(model: PreTrainedModel, tokens: Int[Tensor, " token"], *, block_size: int) -> Knowledge:
    """What ``model`` knows of the running text ``tokens``, read in consecutive blocks of ``block_size``.

    Every token but the first of the text is predicted once, from what precedes it in its block, as nanoGPT does it; a
    last, shorter block is read too.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    num_whole = len(inputs) // block_size * block_size
    nats, hits, entropies = 0.0, 0, 0.0
    for start, end in ((0, num_whole), (num_whole, len(inputs))):
        if start == end:
            continue
        length = block_size if start == 0 and num_whole else end - start
        rows, wanted = (part[start:end].view(-1, length) for part in (inputs, targets))
        for first in range(0, len(rows), WINDOWS_PER_PASS):
            logits = next_token_logits(model, rows[first : first + WINDOWS_PER_PASS])
            target = wanted[first : first + WINDOWS_PER_PASS]
            nats += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").double().sum())
            hits += int((logits.argmax(-1) == target).sum())
            entropies += float(entropy(logits).double().sum())
    return Knowledge(nats / len(inputs), hits / len(inputs), entropies / len(inputs))


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: Int[Tensor, "window time"]) -> Float[Tensor, " window"]:
    """Mean cross-entropy of each window, nats per token."""
    logits = next_token_logits(model, windows[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return losses.double().mean(1)


@torch.no_grad()
def write(
    model: PreTrainedModel, prompts: Int[Tensor, "prompt time"], noise: Float[Tensor, "prompt token"]
) -> Int[Tensor, "prompt token"]:
    """Continuations of ``prompts``: token t of a row is where the cumulative probability exceeds ``noise[:, t]``.

    The same noise gives the same words until a distribution has moved past it, so what two models write differs by the
    models and not by luck.

    Args:
        model: writes at temperature 1.
        prompts: at least one token each; with the continuation they fit the model's positions.
        noise: uniform in [0, 1), float64.
    """
    cache = DynamicCache(config=model.config)
    read, written = prompts, []
    for step in range(noise.shape[1]):
        logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits[:, -1].double()
        cumulative = logits.softmax(-1).cumsum(-1)
        wanted = noise[:, step : step + 1].to(cumulative.device) * cumulative[:, -1:]
        read = torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[-1] - 1)
        written.append(read)
    return torch.cat(written, dim=1)


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a folder that Transformers loads."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
