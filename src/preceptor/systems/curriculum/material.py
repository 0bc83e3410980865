"""What a run learns from and is measured on: each dataset's rows for training, for difficulty and for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from preceptor.data.corpora.blocks import TokenBlocks, pack_blocks, split_held_out, tokenise
from preceptor.data.corpora.datasets import read_sources
from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import DataOptions, DatasetOptions
from preceptor.systems.curriculum.rollout import Prompt, end_token
from preceptor.systems.curriculum.texts import builtin_documents


@dataclass(frozen=True)
class Corpus:
    """One dataset, cut into three parts that share no document.

    Attributes:
        name: what it is called.
        target: whether it counts in the macro mean.
        documents: token ids of the training documents, for prompts.
        train, difficulty, validation: rows of token ids.
        validation_documents: token ids of the validation documents, for the prompts on which rewards are measured.
    """

    name: str
    target: bool
    documents: list[list[int]]
    train: TokenBlocks
    difficulty: TokenBlocks
    validation: TokenBlocks
    validation_documents: list[list[int]]


def read_corpora(options: DataOptions, lm: LanguageModel) -> list[Corpus]:
    """The datasets of the configuration under the tokenizer of ``lm``.

    Raises:
        DataError: datasets that are missing, unreadable, or too small to be cut in three, all of them together.
    """
    sources = [dataset.source for dataset in options.datasets if dataset.builtin is None]
    documents = read_sources(sources, root=Path(options.root) if options.root else None) if sources else {}
    for dataset in options.datasets:
        if dataset.builtin is not None:
            documents[dataset.name] = builtin_documents(dataset.builtin)
    corpora, small = [], []
    for dataset in options.datasets:
        corpus = _corpus(dataset, documents[dataset.name], options, lm)
        corpora.append(corpus)
        if not all(len(part) for part in (corpus.train, corpus.difficulty, corpus.validation)):
            small.append(f"{dataset.name} ({len(documents[dataset.name])} documents)")
    if small:
        raise DataError(
            f"too few documents to train, measure difficulty and validate on: {', '.join(small)}; "
            "give more documents, or larger fractions"
        )
    return corpora


def _corpus(dataset: DatasetOptions, texts: Sequence[str], options: DataOptions, lm: LanguageModel) -> Corpus:
    end = end_token(lm)
    encoded = tokenise(texts, encode=lm.encode, begin=lm.begin_token, end=None if end < 0 else end)
    rest, validation = split_held_out(encoded, fraction=options.validation_fraction)
    # A fraction of all documents, not of the rest.
    share = options.difficulty_fraction / (1 - options.validation_fraction)
    train, difficulty = split_held_out(rest, fraction=share)

    def blocks(documents: list[list[int]]) -> TokenBlocks:
        return pack_blocks(
            dataset.name,
            documents,
            block_length=options.block_tokens,
            cross_documents=options.cross_documents,
        )

    return Corpus(
        name=dataset.name,
        target=dataset.target,
        documents=train,
        train=blocks(train),
        difficulty=blocks(difficulty),
        validation=blocks(validation),
        validation_documents=validation,
    )


def evenly(blocks: TokenBlocks, num_rows: int) -> list[list[int]]:
    """At most ``num_rows`` rows, spread evenly over the dataset; always the same."""
    num_rows = min(num_rows, len(blocks))
    return [blocks[index * len(blocks) // num_rows].tolist() for index in range(num_rows)]


def prompt_of(dataset: str, document: Sequence[int], *, prompt_tokens: int, continuation_tokens: int) -> Prompt:
    """The first tokens of a document, at most half of it, and how it goes on."""
    size = max(1, min(prompt_tokens, len(document) // 2))
    return Prompt(dataset, tuple(document[:size]), tuple(document[size : size + continuation_tokens]))


def draw_prompts(
    corpora: Sequence[Corpus],
    weights: torch.Tensor,
    *,
    num_prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    generator: torch.Generator,
) -> list[Prompt]:
    """The beginnings of training documents, the dataset drawn by ``weights`` and the document within it evenly."""
    prompts = []
    for dataset in torch.multinomial(weights, num_prompts, replacement=True, generator=generator).tolist():
        corpus = corpora[dataset]
        index = int(torch.randint(len(corpus.documents), (), generator=generator))
        prompts.append(
            prompt_of(
                corpus.name,
                corpus.documents[index],
                prompt_tokens=prompt_tokens,
                continuation_tokens=continuation_tokens,
            )
        )
    return prompts
