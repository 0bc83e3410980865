"""What the tests of the curriculum share: a tiny model, seeded streams, and a configuration of seconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.cli import main
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.curriculum.environment import Corpus, builtin_documents, read_corpora
from tests.systems.curriculum.made import CONFIG
from tests.systems.curriculum.small import arguments


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """That checkpoints are synced is tested where they are written; here waiting for the disk only makes it slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of 400 entries fitted on the built-in dialogues."""
    tokenizer = train_bpe_tokenizer(builtin_documents("dialogue"), vocab_size=400, context_length=256)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
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
def corpora(tiny: LanguageModel) -> list[Corpus]:
    """The datasets of the small run."""
    return read_corpora(CONFIG.data, tiny)


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments(tiny_folder, folder)) == 0
    return folder
