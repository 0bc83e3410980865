"""Which tokens of a tokenizer are control tokens and which stand in ordinary text."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r"[<\[{(|｜].+[>\]})|｜]", re.DOTALL)
"""How control tokens are spelled: ``<s>``, ``[PAD]``, ``<|im_end|>``."""


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of added tokens marked special, such as those of a chat template, without those that stand in ordinary text.

    Whatever a tokenizer names as its pad or end token is listed as added and special, even a piece of text such as "!".
    """
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return {token for token in added | set(tokenizer.all_special_ids) if not _stands_in_text(tokenizer, token)}


def _stands_in_text(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether text gives the token by itself, without its having been added; a unigram model gives markup too."""
    spelling = str(tokenizer.convert_ids_to_tokens(token))
    return not _MARKUP.fullmatch(spelling) and _model_tokens(tokenizer, spelling) == [token]


def _model_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens that the vocabulary gives for ``text``: no added token, no normalisation, no space in front."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return [piece.id for piece in backend.model.tokenize(text)]
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def spelled_out(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int]:
    """The spelling of a control token as tokens of single characters."""
    spelling = str(tokenizer.convert_ids_to_tokens(token))
    return [piece for character in spelling for piece in _model_tokens(tokenizer, character)]
