"""The protocol of an engine that writes continuations, and Preceptor's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, Stream


@dataclass(frozen=True)
class Generations:
    """Continuations; those of one prompt are adjacent rows, in the order of the prompts.

    Attributes:
        tokens: the sampled tokens; what stands where ``mask`` is False means nothing.
        mask: True = the token counts: the continuation had not ended before it. The end token itself counts.
        log_probs: of each sampled token as the engine says, in nats.
        entropy: of the distribution of each token in nats; None where the engine does not tell it.
    """

    tokens: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    log_probs: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"] | None = None


class Generator(Protocol):
    """Writes continuations with the weights of one model.

    Attributes:
        name: of the engine, as messages call it.
    """

    name: str

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        number: int,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Generations:
        """``number`` continuations of every prompt.

        Args:
            prompts: token ids, at least one each.
            number: continuations of each prompt, at least 1.
            num_tokens: the most tokens that a continuation may have; the end token ends it earlier.
            sampling: the distribution to sample from.
            generator: of the samples, or of the seed that the engine is given.
        """
        ...

    def refresh(self) -> None:
        """Make what is written from now on that of the model's present weights."""
        ...


def end_token(lm: LanguageModel) -> int:
    """The token that ends a continuation; −1 where the tokenizer has none."""
    token = lm.tokenizer.eos_token_id
    return -1 if token is None else int(token)


def counted(tokens: Int[Tensor, "batch token"], *, end: int) -> Bool[Tensor, "batch token"]:
    """True up to and with the first ``end`` of each row.

    >>> counted(torch.tensor([[5, 0, 5], [5, 5, 5]]), end=0)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    ends = tokens == end
    return ends.cumsum(1) - ends.long() == 0  # no end *before* the token


class OwnGenerator:
    """Preceptor's decoder: a prompt is read once for its group, and every row is sampled to full length.

    Args:
        lm: whose present weights write.
    """

    name = "own"

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        number: int,
        num_tokens: int,
        sampling: Sampling,
        generator: Stream,
    ) -> Generations:
        """``number`` continuations of every prompt (:meth:`Generator.generate`)."""
        decoder = Decoder(self._lm, batch_size=len(prompts))
        decoder.append(prompts)
        decoder.repeat(number)  # copies the prompts' KV cache: [prompts · number] rows from here
        generated = decoder.generate(num_tokens, sampling=sampling, generator=generator)
        mask = counted(generated.tokens, end=end_token(self._lm))
        return Generations(generated.tokens, mask, generated.log_probs, generated.entropy)

    def refresh(self) -> None:
        """Nothing to do: the decoder reads the model's own weights."""
