"""The byte-pair encoding that the starter model is trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from preceptor.errors import ConfigError
from preceptor.lm.tokenizer import train_bpe_tokenizer

TEXTS = ["A harbour at dusk: 1,204 lamps, and the sea repeats them. ", "Lamps repeat; so does the sea, at dusk. "] * 4


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@given(st.text(max_size=40) | st.text(alphabet=" \t\n\r\u00a0\u200b\ufeff<|>beginpad019", max_size=40))
def test_every_string_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = ids(tokenizer, text)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert not {0, 1, 2} & set(tokens)


def test_control_tokens_come_first() -> None:
    tokenizer = train_bpe_tokenizer(TEXTS, vocab_size=280, context_length=77)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|begin|>", "<|end|>", "<|pad|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert len(tokenizer) == 280
    assert tokenizer.model_max_length == 77
    assert tokenizer("sea")["input_ids"][0] == 0  # a text encoded for itself begins with the begin token


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="`vocab_size` must be at least 259, got 258"):
        train_bpe_tokenizer(TEXTS, vocab_size=258, context_length=64)
    assert len(train_bpe_tokenizer(TEXTS, vocab_size=259, context_length=64)) == 259


def test_training_on_spelled_control_tokens_makes_none_of_text() -> None:
    texts = ["<|begin|><|end|> <|pad|>"] * 100
    tokenizer = train_bpe_tokenizer(texts, vocab_size=300, context_length=64)
    assert not {0, 1, 2} & set(ids(tokenizer, texts[0]))


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(ids(tokenizer, "12120")) == 5


def test_training_is_deterministic_and_survives_saving(tmp_path: Path) -> None:
    first, second = (train_bpe_tokenizer(iter(TEXTS), vocab_size=320, context_length=64) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == first.get_vocab()
    assert loaded.model_max_length == 64
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    for text in ("The sea at dusk.", "œuf 漢字 🙂 <|end|>", " leading and trailing "):
        assert ids(loaded, text) == ids(first, text) == ids(second, text)
        assert loaded.decode(ids(loaded, text)) == text


@pytest.mark.parametrize("text", ["don't , and . stay", "a  b", " "])
def test_decoding_tidies_nothing(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text
