"""Pretraining: a small GPT from random weights learns by cross-entropy to answer a prompt with a word that it names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.lm.load import load_language_model, load_tokenizer
from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.config import ModelOptions

CORPUS_PASSES = 20
"""Passes over the corpus in the token stream, each in another order."""


def build_language_model(options: ModelOptions, *, device: torch.device) -> LanguageModel:
    """The named model, or a GPT with random weights from torch's global generator.

    Dropout is off until :func:`dropout_from` switches it on.

    Raises:
        ModelError: there is no such model or tokenizer.
    """
    if options.name:
        return load_language_model(options.name, device=device)
    tokenizer = load_tokenizer(options.tokenizer)
    config = GPT2Config(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        n_positions=options.context_length,
        n_embd=options.width,
        n_layer=options.num_layers,
        n_head=options.num_heads,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    nn.Module.to(model, device)
    return LanguageModel(model, tokenizer, name=f"GPT {options.num_layers} x {options.width}")


@contextlib.contextmanager
def dropout_from(lm: LanguageModel, generator: torch.Generator | None) -> Iterator[None]:
    """Dropout is on inside and drawn from ``generator``, a stream of its own; ``None`` leaves it off."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        lm.model.train()
        try:
            yield
        finally:
            lm.model.train(False)


def token_stream(lm: LanguageModel, lines: Sequence[str], *, generator: torch.Generator) -> Int[Tensor, " time"]:
    """The lines, each after the token that begins a text, over and over in random order."""
    encoded = [[lm.begin_token, *lm.encode(line)] for line in lines]
    orders = (torch.randperm(len(encoded), generator=generator).tolist() for _ in range(CORPUS_PASSES))
    return torch.tensor([token for order in orders for index in order for token in encoded[index]])


def sliding_windows(
    stream: Int[Tensor, " time"], *, batch_size: int, window: int, generator: torch.Generator
) -> Int[Tensor, "batch window"]:
    """Windows of ``window`` + 1 tokens (inputs and targets shifted by one) that begin anywhere in the stream."""
    width = min(window + 1, len(stream))
    starts = torch.randint(len(stream) - width + 1, (batch_size,), generator=generator)
    return torch.stack([stream[start : start + width] for start in starts.tolist()])


def next_token_loss(lm: LanguageModel, tokens: Int[Tensor, "batch time"]) -> Tensor:
    """Cross-entropy of every token but the first, a mean in nats; with gradient."""
    inputs = tokens[:, :-1].to(lm.device)
    keep = torch.ones(inputs.shape, dtype=torch.bool, device=lm.device)
    return F.cross_entropy(lm.forward(inputs, keep=keep).logits, tokens[:, 1:].to(lm.device).flatten())


@torch.no_grad()
def validation_loss(lm: LanguageModel, lines: Sequence[str], *, batch_size: int = 64) -> float:
    """Cross-entropy of whole lines that were never trained on, in nats per token."""
    # Sorted by length, so that a batch needs little padding.
    encoded = sorted(([lm.begin_token, *lm.encode(line)] for line in lines), key=len)
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[lm.begin_token] * (width - len(row))] for row in rows], device=lm.device)
        # True where a position predicts a token of its own line; the last column predicts nothing. [rows, width]
        predict_mask = torch.arange(1, width) < torch.tensor([len(row) for row in rows])[:, None]
        predict_mask = F.pad(predict_mask, (0, 1)).to(lm.device)
        logits = lm.forward(tokens, keep=predict_mask).logits  # [predicted, vocab]
        total += float(F.cross_entropy(logits, tokens.roll(-1, dims=1)[predict_mask], reduction="sum"))
        count += int(predict_mask.sum())
    return total / count
