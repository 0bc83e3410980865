"""Tokenizers for models from random weights: bundled, a folder, and OpenAI's encodings."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from preceptor.errors import ModelError
from preceptor.lm.load import load_tokenizer

TEXTS = ["Which do you prefer, chickpea or lentil?", "naïve  café\n\n\tx 12345", "<|endoftext|>"]


def test_the_bundled_tokenizer_and_a_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("starter")
    tokenizer.save_pretrained(tmp_path / "mine")
    assert load_tokenizer(str(tmp_path / "mine"))(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_an_absent_one_is_one_line() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer("./nowhere")


def test_an_encoding_of_tiktoken_is_the_same_tokenizer(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken downloads its encodings; here it gets GPT-2's own vocabulary from a local copy instead."""
    tiktoken = pytest.importorskip("tiktoken")
    original = AutoTokenizer.from_pretrained(test_data / "tokenizers" / "gpt2")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks={
            bytes(byte_of[character] for character in piece): rank
            for piece, rank in original.get_vocab().items()
            if piece != "<|endoftext|>"
        },
        special_tokens={"<|endoftext|>": 50256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("tiktoken:gpt2")
    assert len(tokenizer) == 50257
    assert tokenizer.bos_token_id == 50256
    assert tokenizer(TEXTS)["input_ids"] == original(TEXTS)["input_ids"]


def test_an_encoding_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def unreachable(name: str) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ModelError) as caught:
        load_tokenizer("tiktoken:gpt2")
    assert "out of reach" in str(caught.value)
    assert "\n" not in str(caught.value)
