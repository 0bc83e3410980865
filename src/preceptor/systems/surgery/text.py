"""The text that is learned: read, split, cut into tokens; and windows drawn from it."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from preceptor.data.corpora.corpus import read_documents
from preceptor.errors import DataError
from preceptor.lm.tokenizer import train_bpe_tokenizer


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        name: of the text.
        sha256: of its UTF-8 bytes.
        tokenizer: characters or byte pairs.
        vocab_size: entries of the tokenizer.
        train: tokens that teach.
        held_out: tokens that only judge; they follow the others in the text.
    """

    name: str
    sha256: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    train: Int[Tensor, " token"]
    held_out: Int[Tensor, " token"]


def read_text(path: str) -> tuple[str, str]:
    """The name and the content of the text file ``path``; of Python's own reference documentation where it is empty.

    That documentation comes with every complete Python (half a million characters of plain English and code), so there
    is something to learn from without a download.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or this Python has no documentation.
    """
    if path:
        return Path(path).stem, "\n\n".join(read_documents(Path(path)))
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError("this Python comes without its documentation; give a text file with --text FILE") from error
    return "python_documentation", "\n\n".join(topics[name].strip() for name in sorted(topics))


def character_tokenizer(text: str, *, context_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose entries are the different characters of ``text``, in the order of their code points.

    >>> tokenizer = character_tokenizer("abba", context_length=8)
    >>> tokenizer("bab", add_special_tokens=False)["input_ids"], tokenizer.decode([0, 1])
    ([1, 0, 1], 'ab')
    """
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=context_length, clean_up_tokenization_spaces=False
    )


def make_corpus(
    path: str,
    *,
    tokens: str,
    vocab_size: int,
    train_share: float,
    block_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """The text of ``path`` as tokens; its leading ``train_share`` (of the characters) teaches.

    The characters are those of the whole text, as in nanoGPT; a byte-pair encoding is fitted on the training part.

    Args:
        path: as :func:`read_text`.
        tokens: ``characters``, ``bpe``, or ``referee``, which takes ``tokenizer``.
        vocab_size: of the byte-pair encoding.
        train_share: in (0, 1).
        block_size: tokens of the student's context; either part must hold more than two such windows.
        tokenizer: of the referee.

    Raises:
        DataError: as :func:`read_text`, or the text is too short.
    """
    name, text = read_text(path)
    cut = int(train_share * len(text))
    if tokens == "characters":
        tokenizer = character_tokenizer(text, context_length=block_size)
    elif tokens == "bpe":
        tokenizer = train_bpe_tokenizer([text[:cut]], vocab_size=vocab_size, context_length=block_size)
    assert tokenizer is not None, "the referee's tokenizer is missing"
    train, held_out = (_encode(tokenizer, part) for part in (text[:cut], text[cut:]))
    for part, what in ((train, "training"), (held_out, "held-out")):
        if len(part) <= 2 * block_size:
            raise DataError(
                f"the {what} part of {name} has {len(part)} tokens, a block of {block_size} needs more than "
                f"{2 * block_size}; give a longer text"
            )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, digest, tokenizer, len(tokenizer), train, held_out)


def draw_windows(
    tokens: Int[Tensor, " token"], *, num_windows: int, length: int, generator: torch.Generator
) -> Int[Tensor, "window time"]:
    """Random stretches of ``length`` tokens.

    >>> draw_windows(torch.arange(3), num_windows=1, length=3, generator=torch.Generator())
    tensor([[0, 1, 2]])
    """
    starts = torch.randint(len(tokens) - length + 1, (num_windows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    )
