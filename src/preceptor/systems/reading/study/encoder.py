"""Vectors of contexts and keys by the policy's own model, whose weights learn while the reader stays as it is.

A policy's gradient goes through a few hundred texts at once. They are encoded without gradient; the loss gives the
gradient of their vectors; each text is then encoded again, a batch at a time, to hand it on to the weights. Memory is
that of one batch, the gradient is the same (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.lm.embedding import MODEL_EMBEDDINGS, ModelEmbedding, key_vectors, mean_vectors
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length
from preceptor.runs.device import parse_dtype
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.features import CaseBatch, Corpus
from preceptor.systems.reading.study.pool import Case

MAX_TOKENS = 8_192
"""Padded tokens in a pass."""


@dataclass(frozen=True)
class Encoded:
    """Texts, in tokens, and their vectors: a leaf, so that a backward pass leaves its gradient there."""

    rows: list[list[int]]
    vectors: Float[Tensor, "text dimension"]


class Encoder:
    """A language model that turns contexts and keys into the vectors that a policy projects.

    As created its vectors are the reader's own. The other channels, also those of what was read, stay the reader's.

    Args:
        lm: the model; shares no weights that learn with the reader.
        embedding: of ``lm``.
        corpus: by whose mean and deviation vectors are standardised.
        world: processes that share the passes.
    """

    def __init__(self, lm: LanguageModel, embedding: ModelEmbedding, corpus: Corpus, *, world: World = ALONE) -> None:
        self.lm, self._embedding, self._corpus, self._world = lm, embedding, corpus, world

    def encode(self, cases: Sequence[Case], batch: CaseBatch) -> tuple[CaseBatch, Encoded]:
        """``batch``, which are ``cases`` as tensors, with vectors by the model as it is now."""
        contexts = [context_texts(case) for case in cases]
        keys = [[pair.key for pair in case.pool.candidates] for case in cases]
        # Cases of one pool share their candidates: each text is encoded once.
        distinct = dict.fromkeys(text for texts in (*contexts, *keys) for text in texts)
        place = {text: index for index, text in enumerate(distinct)}
        rows = [self.lm.encode(" " + text) for text in place]

        def compute(mine: slice) -> tuple[Tensor]:
            return (key_vectors(self.lm, self._embedding, rows[mine], max_tokens=MAX_TOKENS).cpu(),)

        vectors = self._standardised(self._world.gathered(len(rows), compute)[0]).requires_grad_()
        queries = torch.stack([vectors[[place[text] for text in texts]].mean(0) for texts in contexts])
        own_keys = vectors[torch.tensor([[place[text] for text in texts] for texts in keys])]
        return replace(batch, queries=queries, keys=own_keys), Encoded(rows, vectors)

    def backward(self, encoded: Encoded) -> None:
        """Hands the gradient of ``encoded`` on to the weights; each process that of its own share of the texts."""
        assert encoded.vectors.grad is not None, "a backward pass came before"
        mine = self._world.shard(len(encoded.rows))
        rows = [[self.lm.begin_token, *row] for row in encoded.rows[mine]]
        # Of a loss that every process has divided by their number, because each has all of it.
        gradient = encoded.vectors.grad[mine] * self._world.size
        for chosen in batches_by_length([len(row) for row in rows], max_tokens=MAX_TOKENS):
            found = mean_vectors(self.lm, self._embedding, [rows[index] for index in chosen])
            self._standardised(found.cpu()).backward(gradient[chosen])

    def _standardised(self, vectors: Float[Tensor, "text dimension"]) -> Float[Tensor, "text dimension"]:
        return (vectors - self._corpus.mean) / (self._corpus.deviation + 1e-6)


def context_texts(case: Case) -> list[str]:
    """What the context of ``case`` says: its questions, or the sentence that was read."""
    if case.seed is not None:
        return [case.pairs([case.seed])[0].value]
    return [pair.key for pair in case.pairs(case.targets)]


def load_encoder(config: ReadingConfig, corpus: Corpus, *, device: str, world: World = ALONE) -> Encoder:
    """The encoder of ``config`` before training: a copy of the reader, with the adapter that ``config`` asks for."""
    rank, alpha = config.model.adapter_rank, config.model.adapter_alpha
    with world.first_then_others():
        lm = load_language_model(
            config.model.name,
            device=torch.device(device),
            dtype=parse_dtype(config.model.dtype),
            adapter=Adapter(rank, alpha) if rank else None,
        )
    lm.recomputes = config.update.gradient_checkpointing
    return Encoder(lm, _embedding(lm, config), corpus, world=world)


def trained_encoder(model: nn.Module, tokenizer: Any, config: ReadingConfig, corpus: Corpus) -> Encoder:
    """The encoder whose ``model`` and ``tokenizer`` a run has written."""
    lm = LanguageModel(model, tokenizer, name=config.model.name)
    lm.model.requires_grad_(False)
    return Encoder(lm, _embedding(lm, config), corpus)


def _embedding(lm: LanguageModel, config: ReadingConfig) -> ModelEmbedding:
    return MODEL_EMBEDDINGS[config.selection.embedder](lm, layer=config.selection.layer)
