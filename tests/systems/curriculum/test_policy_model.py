"""The policy by name or from scratch, and its folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from preceptor.errors import StorageError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import ModelOptions
from preceptor.systems.curriculum.model_folder import save_model
from preceptor.systems.curriculum.policy_model import build_policy

CPU = torch.device("cpu")


def test_the_named_model_has_its_own_weights(tiny: LanguageModel, tiny_folder: Path) -> None:
    named = build_policy(ModelOptions(name=str(tiny_folder)), device=CPU, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(named.model.parameters(), tiny.model.parameters(), strict=True))


def test_from_scratch_the_seed_decides_and_the_tokenizer_stays(tiny: LanguageModel, tiny_folder: Path) -> None:
    options = ModelOptions(name=str(tiny_folder), from_scratch=True, width=64, num_layers=1)
    before = torch.get_rng_state()
    first, again, other = (build_policy(options, device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
    assert (first.model.config.hidden_size, len(first.layers)) == (64, 1)
    assert first.model.config.intermediate_size == 96  # 48 · 64 / 32
    assert first.encode("How much?") == tiny.encode("How much?")
    assert first.vocab_size == tiny.vocab_size


def test_an_untouched_shape_is_the_named_models(tiny: LanguageModel, tiny_folder: Path) -> None:
    scratch = build_policy(ModelOptions(name=str(tiny_folder), from_scratch=True), device=CPU, seed=1)
    theirs = {name: parameter.shape for name, parameter in tiny.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in scratch.model.named_parameters()} == theirs


def test_a_saved_folder_gives_the_same_model(tiny: LanguageModel, tmp_path: Path) -> None:
    for _ in range(2):  # a folder that is there is replaced
        with torch.no_grad():
            next(tiny.model.parameters()).mul_(1.1)
        save_model(tiny, tmp_path / "model")
    loaded = load_language_model(str(tmp_path / "model"), device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), tiny.model.parameters(), strict=True))
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_leaves_the_old_folder(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tiny.tokenizer, "save_pretrained", full)
    with pytest.raises(StorageError, match="disk full"):
        save_model(tiny, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
