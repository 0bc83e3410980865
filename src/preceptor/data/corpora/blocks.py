"""Documents as tokens, cut into blocks of at most one length; blocks of unequal length padded into a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from preceptor.errors import ConfigError, DataError

Document = list[int]


class TokenBlocks:
    """Blocks of tokens of one dataset, kept one after the other in a single tensor.

    Args:
        name: of the dataset.
        blocks: each of at least two tokens (the first is given, the others are predicted); there may be none.

    Attributes:
        num_tokens: in all blocks together.

    Raises:
        DataError: a block is too short.
    """

    def __init__(self, name: str, blocks: Sequence[Document]) -> None:
        if any(len(block) < 2 for block in blocks):
            raise DataError(f"dataset '{name}' has a block of fewer than two tokens, in which nothing is predicted")
        self.name = name
        # int32 holds every vocabulary and takes half the memory; Embedding wants int64, hence `long()` when one is
        # read.
        # Flat storage: a list of tensors would cost a few hundred bytes a block, which a corpus has by the million.
        self._tokens = torch.tensor([token for block in blocks for token in block], dtype=torch.int32)
        self._ends = torch.tensor([len(block) for block in blocks], dtype=torch.long).cumsum(dim=0)
        self.num_tokens = len(self._tokens)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Int[Tensor, " token"]:
        """Token ids of block ``index``, int64."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"dataset '{self.name}' has {len(self)} blocks, there is no block {index}")
        # Negative indices count from the end, as for any sequence.
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._tokens[start : int(self._ends[index])].long()


def tokenise(
    documents: Iterable[str], *, encode: Callable[[str], list[int]], begin: int, end: int | None = None
) -> list[Document]:
    """Token ids of each document: ``begin``, its text, and ``end`` where one is given.

    ``encode`` is one tokenizer for all datasets, such as ``LanguageModel.encode``.

    >>> tokenise(["ab"], encode=lambda text: [ord(letter) for letter in text], begin=0)
    [[0, 97, 98]]
    """
    return [[begin, *encode(text), *([] if end is None else [end])] for text in documents]


def split_held_out(documents: Sequence[Document], *, fraction: float) -> tuple[list[Document], list[Document]]:
    """``documents`` to train on and to hold out, about ``fraction`` of them, nothing in both.

    Of every 1/``fraction`` documents the last is held out, so that both parts cover the whole of a sorted corpus. Where
    that leaves none (few and long documents), the tail of each is, with the document's first token before it.

    Raises:
        ConfigError: ``fraction`` outside [0, 0.5].
        DataError: there is too little to hold anything out.

    >>> split_held_out([[0, 1], [0, 2], [0, 3], [0, 4]], fraction=0.5)
    ([[0, 1], [0, 3]], [[0, 2], [0, 4]])
    >>> split_held_out([[0, 1, 2, 3, 4]], fraction=0.5)
    ([[0, 1, 2]], [[0, 3, 4]])
    """
    if not 0 <= fraction <= 0.5:
        raise ConfigError(f"the fraction to hold out must lie in [0, 0.5], got {fraction}")
    if fraction == 0:
        return list(documents), []
    # A fixed pattern and no draw: what is held out is the same in every run.
    every = round(1 / fraction)
    if len(documents) >= every:
        train = [document for index, document in enumerate(documents) if index % every != every - 1]
        return train, list(documents[every - 1 :: every])
    # At least one token is held out and one is left to predict, whatever rounding says; two tokens cannot be shared.
    cuts = [max(2, min(len(document) - 1, 1 + round((len(document) - 1) * (1 - fraction)))) for document in documents]
    train = [document[:cut] for document, cut in zip(documents, cuts, strict=True)]
    held_out = [
        [document[0], *document[cut:]] for document, cut in zip(documents, cuts, strict=True) if cut < len(document)
    ]
    if not held_out:
        raise DataError(f"{len(documents)} documents are too few and short to hold {fraction} of them out; give more")
    return train, held_out


def pack_blocks(
    name: str, documents: Sequence[Document], *, block_length: int, cross_documents: bool = False
) -> TokenBlocks:
    """``documents`` of the dataset ``name`` as blocks of at most ``block_length`` tokens; none, if there is too little.

    A block stays within one document, so blocks are of unequal length; with ``cross_documents`` the documents are laid
    end to end first and all blocks but the last are full. Where a document is cut, the token before the cut starts the
    next block: so every token but a document's first is predicted exactly once, and no block starts without context.

    Raises:
        ConfigError: ``block_length`` below 2.

    >>> [block.tolist() for block in pack_blocks("d", [[0, 1, 2, 3], [0, 4]], block_length=3)]
    [[0, 1, 2], [2, 3], [0, 4]]
    >>> [block.tolist() for block in pack_blocks("d", [[0, 1, 2, 3], [0, 4]], block_length=3, cross_documents=True)]
    [[0, 1, 2], [2, 3, 0], [0, 4]]
    """
    if block_length < 2:
        raise ConfigError(f"blocks must hold at least 2 tokens (one given, one predicted), got {block_length}")
    if cross_documents:
        documents = [[token for document in documents for token in document]]
    # One token less than a block: blocks overlap by the token that starts the next one.
    step = block_length - 1
    blocks = [
        document[start : start + block_length]
        for document in documents
        for start in range(0, len(document) - 1, step)  # a last block of one token has nothing to predict
    ]
    return TokenBlocks(name, blocks)


@dataclass(frozen=True)
class Batch:
    """Blocks side by side.

    Attributes:
        tokens: token ids, filled on the right.
        token_mask: True = a token of the block, False = filling.
    """

    tokens: Int[Tensor, "batch time"]
    token_mask: Bool[Tensor, "batch time"]


def pad_blocks(blocks: Sequence[Int[Tensor, " token"]], *, filler: int) -> Batch:
    """``blocks`` as one batch, as wide as the longest of them.

    >>> batch = pad_blocks([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], filler=9)
    >>> batch.tokens.tolist(), batch.token_mask.tolist()
    ([[1, 2, 3], [4, 5, 9]], [[True, True, True], [True, True, False]])
    """
    lengths = torch.tensor([len(block) for block in blocks])
    tokens = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True, padding_value=filler)
    # [batch, time] by broadcasting [time] against [batch, 1].
    return Batch(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])
