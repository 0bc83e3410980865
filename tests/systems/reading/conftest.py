"""What the tests of reading share: a tiny model that spells English, and seeded streams."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.reading.articles import bundled_article


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """That checkpoints are synced is tested where they are written; here waiting for the disk only makes it slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of 700 entries fitted on the bundled article."""
    tokenizer = train_bpe_tokenizer([bundled_article().text], vocab_size=700, context_length=1024)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=700,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> LanguageModel:
    """The model of ``tiny_folder``, freshly loaded: a test may change it."""
    return load_language_model(str(tiny_folder), device=torch.device("cpu"))


@pytest.fixture
def generators() -> Callable[[int], dict[str, torch.Generator]]:
    """Streams for episodes, from a seed."""
    names = ("query", "selection", "reference", "orders")
    return lambda seed: {name: torch.Generator().manual_seed(100 * seed + number) for number, name in enumerate(names)}
