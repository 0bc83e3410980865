from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from preceptor.errors import DataError
from preceptor.systems.surgery.text import character_tokenizer, draw_windows, make_corpus, read_text

TEXT = "Ein Mops kam in die Küche\nund stahl dem Koch ein Ei. " * 20


def test_characters_are_the_vocabulary_and_come_back(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(TEXT, context_length=8)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == [sorted(set(TEXT)).index(character) for character in TEXT]
    assert tokenizer.decode(ids) == TEXT


def test_the_split_is_by_characters(tmp_path: Path) -> None:
    path = tmp_path / "mops.txt"
    path.write_text(TEXT.strip(), encoding="utf-8")
    text = TEXT.strip()
    cut = int(0.9 * len(text))
    corpus = make_corpus(str(path), tokens="characters", vocab_size=0, train_share=0.9, block_size=8)
    assert corpus.name == "mops"
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.vocab_size == len(set(text))
    assert corpus.tokenizer.decode(corpus.train.tolist()) == text[:cut]
    assert corpus.tokenizer.decode(corpus.held_out.tolist()) == text[cut:]


def test_byte_pairs_are_fitted_on_the_training_part(tmp_path: Path) -> None:
    path = tmp_path / "mops.txt"
    path.write_text("aaaa " * 400 + "zqzq " * 100, encoding="utf-8")
    corpus = make_corpus(str(path), tokens="bpe", vocab_size=300, train_share=0.8, block_size=8)
    assert "zq" not in corpus.tokenizer.get_vocab()
    assert corpus.tokenizer.decode(corpus.train.tolist()).startswith("aaaa aaaa")


def test_without_a_file_python_explains_itself() -> None:
    name, text = read_text("")
    assert name == "python_documentation"
    assert len(text) > 300_000
    assert "expression" in text


def test_a_text_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short to learn from", encoding="utf-8")
    with pytest.raises(DataError, match="a block of 16 needs more than 32; give a longer text"):
        make_corpus(str(path), tokens="characters", vocab_size=0, train_share=0.9, block_size=16)
    with pytest.raises(DataError, match="does not exist"):
        read_text(str(tmp_path / "absent.txt"))


def test_windows_lie_anywhere_and_within_the_text() -> None:
    # To catch: the last window left out, and one beyond the end.
    windows = draw_windows(torch.arange(10), num_windows=500, length=8, generator=torch.Generator().manual_seed(0))
    assert windows.shape == (500, 8)
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    assert (windows.diff(dim=1) == 1).all()
