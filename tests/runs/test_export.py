"""Model folders: what is loaded is what was saved, and a failed save leaves the folder that was there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from preceptor.errors import StorageError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.export import save_model

CPU = torch.device("cpu")


@pytest.fixture
def lm() -> LanguageModel:
    return load_language_model("starter", device=CPU)


def test_a_saved_folder_gives_the_same_model(lm: LanguageModel, tmp_path: Path) -> None:
    for _ in range(2):  # a folder that is there is replaced
        with torch.no_grad():
            next(lm.model.parameters()).mul_(1.1)
        save_model(lm.model, lm.tokenizer, tmp_path / "model")
    loaded = load_language_model(str(tmp_path / "model"), device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), lm.model.parameters(), strict=True))
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_leaves_the_old_folder(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(lm.model, lm.tokenizer, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lm.tokenizer, "save_pretrained", full)
    with pytest.raises(StorageError, match="disk full"):
        save_model(lm.model, lm.tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
