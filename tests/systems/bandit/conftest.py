"""A small GPT with a tokenizer in which some words are one token and some are several."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.lm.model import LanguageModel
from preceptor.lm.tokenizer import train_bpe_tokenizer

TEXTS = ["Pick red or blue: red. Pick blue or red: blue."] * 20


@pytest.fixture
def lm() -> LanguageModel:
    """``red`` and ``blue`` are one token each after a space; any other word is several."""
    tokenizer = train_bpe_tokenizer(TEXTS, vocab_size=290, context_length=128)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
        initializer_range=0.15,
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config), tokenizer, name="tiny")
