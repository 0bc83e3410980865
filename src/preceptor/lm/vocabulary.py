"""Text to tokens of a model, and how many it can read.

Some tokens are control tokens, some stand in ordinary text, some have no text at all.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from preceptor.errors import ModelError


class Vocabulary:
    """A tokenizer for a model of ``size`` logits; attributes are those of :class:`~preceptor.lm.model.LanguageModel`.

    Raises:
        ModelError: the tokenizer has text tokens that the model does not, or no begin or end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, size: int, name: str) -> None:
        self._tokenizer = tokenizer
        control_tokens, ids = control_token_ids(tokenizer), set(tokenizer.get_vocab().values())
        # A vocabulary padded upwards is fine (fewer tokens than embeddings); the reverse would index beyond the
        # embedding. Control tokens there are never used.
        if (largest := max(ids - control_tokens, default=0)) >= size:
            raise ModelError(
                f"the tokenizer of {name} has {largest + 1} entries and the model {size}; "
                "use the tokenizer that the model was trained with"
            )
        # Some families (Qwen 2) have no begin token; a row then begins as after the end of an earlier text.
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        usable = [int(token) for token in named if token is not None and int(token) < size]
        if not usable:
            raise ModelError(
                f"the tokenizer of {name} has no begin or end token that the model knows; set its bos_token"
            )
        self.begin_token = usable[0]
        self.special_tokens = tuple(sorted(token for token in control_tokens if token < size))
        self.nameless_tokens = tuple(sorted(set(range(size)) - ids))
        # The unknown token stands for text, unless the tokenizer ends texts with the same token (GPT-2).
        self._never_text = control_tokens - ({tokenizer.unk_token_id} - {self.begin_token, tokenizer.eos_token_id})
        # A tokenizer that puts a space in front of every text (Llama 2) makes "▁a" of "a"; `encode` then drops one
        # space.
        first_piece = str(tokenizer.convert_ids_to_tokens(self._tokenize("a")[:1]))
        self._prepends_space = "▁" in first_piece

    def encode(self, text: str) -> list[int]:
        """As :meth:`~preceptor.lm.model.LanguageModel.encode`."""
        tokens = self._tokenize(text[1:] if self._prepends_space and text.startswith(" ") else text)
        if self._never_text.isdisjoint(tokens):
            return tokens
        # A unigram vocabulary lists control tokens among its pieces. Such a piece alone is spelled out, character by
        # character; the text around it stays as the tokenizer cut it.
        pieces = (spelled_out(self._tokenizer, token) if token in self._never_text else [token] for token in tokens)
        return [piece for several in pieces for piece in several if piece not in self._never_text]

    def _tokenize(self, text: str) -> list[int]:
        # `verbose` only warns about texts longer than the context.
        # No begin token either: callers join pieces, and only a row as a whole begins with one.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])


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


# ---- how many tokens a model can read -------------------------------------------------------------------------------

_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size", "local": "window_size"}
"""Kind of layer, and the key of its attention window in a configuration."""


def context_length(config: PreTrainedConfig, name: str) -> int:
    """Tokens that a row may hold: the least of its position limit and of the lengths beyond which attention changes.

    Up to its window (or chunk), a layer with windowed attention sees what full attention sees. Rotary positions that
    are rescaled beyond some length would be rescaled for cached keys too, which cannot be done.
    """
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    # A configuration that does not list the kinds of its layers means its window for all of them.
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or tuple(_WINDOWS)
    limits += [getattr(config, window, None) for kind, window in _WINDOWS.items() if kind in kinds]
    rotary = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each kind of layer.
    for parameters in (rotary, *rotary.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            limits.append(parameters.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise ModelError(f"the configuration of {name} states no context length; set max_position_embeddings there")
    return min(known)
