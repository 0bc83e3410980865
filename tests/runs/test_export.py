"""Model folders: what is loaded is what was saved, and a failed save leaves the folder that was there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from preceptor.errors import ConfigError, ServiceError, StorageError
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.export import export_model, load_model, push_to_hub, save_model, write_model_card

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


# Taking a run's model out


def finished_run(folder: Path, *, adapter: Adapter | None = None) -> LanguageModel:
    """A folder with what a run leaves at its end; the model moved away from where it began."""
    lm = load_language_model("starter", device=CPU, adapter=adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.trainable_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_model(lm.model, lm.tokenizer, folder / "model")
    estimate = {"mean": 0.125, "low": 0.1, "high": 0.15, "unit": "nats", "n": 5}
    result = {"verdict": "It helped.", "arms": {"learned": {"gain": estimate}}, "table": ["gain"], "seeds": [3]}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "manifest.json").write_text(json.dumps({"system": "reading", "seed": 3, "environment": {"threads": 1}}))
    write_model_card(folder)
    return lm


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 17, 40, 9]])).logits.float()


def test_the_model_card_says_what_may_be_claimed(tmp_path: Path) -> None:
    finished_run(tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "It helped." in card
    assert "| learned | 0.125 [0.1, 0.15] |" in card
    assert "preceptor run reading --config config.yaml --seed 3" in card
    assert "pipeline_tag: text-generation" in card


def test_the_card_of_a_study_says_what_its_weights_are_for(tmp_path: Path) -> None:
    finished_run(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**result, "study": {}}))
    write_model_card(tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "text that this model writes was not measured" in card


def test_an_adapter_is_exported_as_it_is_or_merged(tmp_path: Path) -> None:
    lm = finished_run(tmp_path / "run", adapter=Adapter(rank=2))
    expected = logits(lm.model)
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    loaded, _ = load_model(export_model(tmp_path / "run", tmp_path / "adapter"))
    assert torch.allclose(logits(loaded), expected, atol=1e-5)  # float32, the same operations
    merged = export_model(tmp_path / "run", tmp_path / "merged", merge=True)
    assert not (merged / "adapter_config.json").exists()
    assert "library_name: transformers" in (merged / "README.md").read_text()
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(logits(whole), expected, atol=1e-4)  # W + BA is rounded once more than W x + B (A x)
    assert not torch.allclose(logits(load_language_model("starter", device=CPU).model), expected, atol=1e-2)


def test_a_transformers_model_with_an_adapter_is_a_language_model(tmp_path: Path) -> None:
    """Transformers loads an adapter's folder into a plain model, which only looks like PEFT's."""
    lm = finished_run(tmp_path, adapter=Adapter(rank=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)  # the base's file is bfloat16
    plain = LanguageModel(model, lm.tokenizer, name="plain")
    assert not plain.has_adapter
    assert torch.allclose(logits(model), logits(lm.model), atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(tmp_path / "run", tmp_path / "used")
    with pytest.raises(ConfigError, match="no adapter to merge"):
        export_model(tmp_path / "run", tmp_path / "new", merge=True)
    with pytest.raises(ConfigError, match="has no model/ to export"):
        export_model(tmp_path / "used", tmp_path / "new")
    assert (tmp_path / "used" / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()


class FakeHub:
    """The part of the hub's client that an upload uses."""

    def __init__(self) -> None:
        self.uploaded: dict[str, list[str]] = {}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        from huggingface_hub.errors import HFValidationError

        if name.count("/") != 1:
            raise HFValidationError(f"bad name {name}")
        if name.startswith("refused/"):
            raise OSError("403 Forbidden")
        assert private
        assert exist_ok
        return type("Url", (str,), {"repo_id": name})(f"https://hub.invalid/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert "Preceptor" in commit_message
        self.uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())


def test_a_model_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    finished_run(tmp_path)
    assert push_to_hub(tmp_path / "model", "me/reader") == "https://hub.invalid/me/reader"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.uploaded["me/reader"])
    with pytest.raises(ConfigError, match="write it as USER/MODEL"):
        push_to_hub(tmp_path / "model", "reader")
    with pytest.raises(ServiceError, match=r"did not take .* as refused/reader: 403 Forbidden"):
        push_to_hub(tmp_path / "model", "refused/reader")
