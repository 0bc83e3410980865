"""Referees: another model's probabilities of the next token, for partial rewards and to judge what a student wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.surgery.flops import flops_per_token
from preceptor.systems.surgery.ngram import NGram


class Referee(Protocol):
    """Gives probabilities; ``flops_per_token`` is what one position costs, ``training_flops`` what the referee did."""

    flops_per_token: int
    training_flops: int

    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """p(· | the tokens of the row up to and with each position)."""
        ...


class NGramReferee:
    """Counts on the training text. Counting a token once per order, and mixing once per order, are its operations."""

    def __init__(self, tokens: Int[Tensor, " token"], *, order: int, vocab_size: int) -> None:
        self._ngram = NGram(tokens, order=order, vocab_size=vocab_size)
        self.flops_per_token = 2 * order * vocab_size
        self.training_flops = order * len(tokens)

    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """As :class:`Referee`."""
        return self._ngram.probabilities(tokens)


class ModelReferee:
    """A language model in the student's vocabulary, frozen; every row begins with its begin token.

    Args:
        lm: the model.
        training_tokens: that it was trained on; each cost six operations a parameter.

    Raises:
        DataError: it has fewer positions than a row needs.
    """

    def __init__(self, lm: LanguageModel, *, training_tokens: int, block_size: int) -> None:
        if lm.context_length < block_size + 1:
            raise DataError(
                f"the referee {lm.name} reads {lm.context_length} tokens, a block of {block_size} and the begin token "
                "do not fit; choose a smaller `student.block_size`"
            )
        self._lm = lm
        self.flops_per_token = flops_per_token(lm.model, context=block_size + 1)
        self.training_flops = 3 * flops_per_token(lm.model, context=lm.context_length) * training_tokens

    @torch.no_grad()
    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """As :class:`Referee`."""
        begin = tokens.new_full((len(tokens), 1), self._lm.begin_token)
        logits: Tensor = self._lm.model(input_ids=torch.cat([begin, tokens], dim=1), use_cache=False).logits
        return logits[:, 1:].float().softmax(-1)


def load_referee(name: str, *, device: torch.device) -> LanguageModel:
    """The referee model in the folder ``name``, frozen."""
    lm = load_language_model(name, device=device)
    lm.model.requires_grad_(False)
    return lm


def training_tokens(name: str) -> int:
    """What ``preceptor pretrain`` says that the model in the folder ``name`` was trained on (tokens).

    Raises:
        DataError: its result.json is not beside the folder.
    """
    result = Path(name).resolve().parent / "result.json"
    try:
        tokens: int = json.loads(result.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"what the referee {name} cost is unknown, for {result} says no tokens; set `referee.training_tokens`"
        ) from error
    return tokens
