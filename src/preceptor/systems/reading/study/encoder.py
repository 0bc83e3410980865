"""Vectors of contexts and keys by the policy's own model, whose weights learn while the reader stays as it is.

A policy's gradient goes through some hundreds of texts at once. They are encoded without gradient; the loss leaves the
gradient of their vectors; each text is then encoded again, some at a time, to hand it on to the weights. The gradient
is that of one graph over all texts, the memory that of one pass (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.lm.embedding import MODEL_EMBEDDINGS, ModelEmbedding, key_vectors, mean_vectors
from preceptor.lm.load import Adapter, with_adapter
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.guard import MicroBatch, NonFiniteGuard, guarded_step
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.config import ReadingConfig, UpdateOptions
from preceptor.systems.reading.study.features import CaseBatch, Corpus
from preceptor.systems.reading.study.pool import Case
from preceptor.systems.reading.study.scores import MAX_TOKENS

if TYPE_CHECKING:
    from preceptor.runs.folder import Run


@dataclass(frozen=True)
class Encoded:
    """Texts, in tokens, and their vectors: a leaf, so that a backward pass leaves its gradient there."""

    rows: list[list[int]]
    vectors: Float[Tensor, "text dimension"]


class Encoder:
    """A language model that turns contexts and keys into the vectors that a policy projects.

    As created its vectors are the reader's own. All other channels, also those between keys, stay the reader's.

    Args:
        lm: the model; shares no weights that learn with the reader.
        embedding: of ``lm``.
        corpus: standardises vectors.
        world: processes that share the passes.
    """

    def __init__(self, lm: LanguageModel, embedding: ModelEmbedding, corpus: Corpus, *, world: World = ALONE) -> None:
        self.lm, self._embedding, self._corpus, self._world = lm, embedding, corpus, world

    def encode(self, cases: Sequence[Case], batch: CaseBatch) -> tuple[CaseBatch, Encoded]:
        """``batch``, which are ``cases`` as tensors, with queries and keys by the model as it is now.

        A gradient reaches the vectors of what is returned second, and there it ends; see :meth:`backward`.
        """
        contexts = [case.context for case in cases]
        keys = [[pair.key for pair in case.pool.candidates] for case in cases]
        # Cases of one pool share their candidates: each text is encoded once.
        distinct = dict.fromkeys(text for texts in (*contexts, *keys) for text in texts)
        place = {text: index for index, text in enumerate(distinct)}
        rows = [self.lm.encode(" " + text) for text in place]

        def compute(mine: slice) -> tuple[Tensor]:
            return (key_vectors(self.lm, self._embedding, rows[mine], max_tokens=MAX_TOKENS).cpu(),)

        vectors = self._corpus.standardised(self._world.gathered(len(rows), compute)[0]).requires_grad_()
        queries = torch.stack([vectors[[place[text] for text in texts]].mean(0) for texts in contexts])
        own_keys = vectors[torch.tensor([[place[text] for text in texts] for texts in keys])]
        return replace(batch, queries=queries, keys=own_keys), Encoded(rows, vectors)

    def passes(self, encoded: Encoded) -> list[list[int]]:
        """The texts of this process, by place, of which each backward pass takes as many as ``MAX_TOKENS`` allow."""
        mine = range(len(encoded.rows))[self._world.shard(len(encoded.rows))]
        lengths = [1 + len(encoded.rows[index]) for index in mine]
        return [[mine[index] for index in batch] for batch in batches_by_length(lengths, max_tokens=MAX_TOKENS)]

    def backward(self, encoded: Encoded, *, micro_batch_size: int) -> None:
        """Adds to the weights' gradients what that of ``encoded`` gives, from this process's texts.

        The loss was divided by the number of processes, each of which has all of it; the processes' sum is then whole.

        Args:
            encoded: whose vectors have their gradient.
            micro_batch_size: texts of a pass, at most.
        """
        assert encoded.vectors.grad is not None, "a backward pass came before"
        for texts in self.passes(encoded):
            for start in range(0, len(texts), micro_batch_size):
                some = texts[start : start + micro_batch_size]
                rows = [[self.lm.begin_token, *encoded.rows[index]] for index in some]
                vectors = self._corpus.standardised(mean_vectors(self.lm, self._embedding, rows).cpu())
                vectors.backward(encoded.vectors.grad[some] * self._world.size)


class Learner:
    """An encoder whose weights learn, with all that belongs to it in a checkpoint.

    Attributes:
        encoder: as it is now.
        weights: those that learn, by name.
        has_moved: whether an update has been made; before, its vectors are the reader's, and nothing needs to be kept.
    """

    def __init__(self, encoder: Encoder, update: UpdateOptions) -> None:
        self.encoder = encoder
        self.weights = encoder.lm.trainable_parameters()
        self.has_moved = False
        self._clip_norm = update.clip_norm
        self.optimizer = build_encoder_optimizer(self.weights, update)
        self._guard = NonFiniteGuard()  # of its own, so that six bad steps in a row are told from a policy's
        self._micro_batch = MicroBatch(update.micro_batch_size)

    def step(self, batches: Sequence[Encoded], run: Run, *, number: int) -> dict[str, float]:
        """One optimizer step down the losses that left their gradients in ``batches``; gives its metrics."""

        def compute(*, micro_batch_size: int) -> None:
            for encoded in batches:
                self.encoder.backward(encoded, micro_batch_size=micro_batch_size)

        most = max((len(texts) for encoded in batches for texts in self.encoder.passes(encoded)), default=1)
        with self._micro_batch.first_trial(most) as trial:
            compute(micro_batch_size=trial.size)
        if trial.ran_out:
            self._micro_batch.search(trial.size, compute, self.weights.values())
        self._micro_batch.agree(run.world)
        run.world.sum_gradients(self.weights.values())
        norm = guarded_step(
            self._guard,
            self.optimizer,
            self.weights,
            step=number,
            clip_norm=self._clip_norm,
            notice=run.notice,
        )
        for notice in self._micro_batch.take_notices():
            run.notice(notice)
        self.has_moved = True
        return {"model_gradient_norm": norm, "model_skipped_steps": float(self._guard.num_skipped)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update changes; before the first one next to nothing."""
        state: dict[str, Any] = {
            "has_moved": self.has_moved,
            "guard": self._guard.state_dict(),
            "micro_batch": self._micro_batch.state_dict(),
        }
        if self.has_moved:
            state |= {"weights": dict(self.weights), "optimizer": optimizer_state(self.optimizer)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, in place."""
        self.has_moved = state["has_moved"]
        self._guard.load_state_dict(state["guard"])
        self._micro_batch.load_state_dict(state["micro_batch"])
        if self.has_moved:
            with torch.no_grad():
                copy_tensors(state["weights"], self.weights)
            load_optimizer(self.optimizer, state["optimizer"])


def build_encoder_optimizer(weights: Mapping[str, nn.Parameter], update: UpdateOptions) -> torch.optim.Optimizer:
    """The configured optimizer over the model's weights, as in reading one article."""
    if update.optimizer == "adamw":
        return torch.optim.AdamW(weights.values(), lr=update.learning_rate, weight_decay=update.weight_decay)
    return torch.optim.Adam(weights.values(), lr=update.learning_rate)


def copy_of_reader(reader: LanguageModel, config: ReadingConfig, corpus: Corpus, *, world: World = ALONE) -> Encoder:
    """An encoder that begins as ``reader``: a copy of it that learns, or an adapter over its own frozen weights."""
    rank, alpha = config.model.adapter_rank, config.model.adapter_alpha
    # deepcopy with a filled memo takes the weights as they are: under an adapter they stay frozen, and one is enough.
    shared = {id(weight): weight for weight in reader.model.parameters()} if rank else {}
    model: Any = copy.deepcopy(reader.model, shared)
    model = with_adapter(model, Adapter(rank, alpha)) if rank else model.requires_grad_(True)
    return _encoder(model, reader.tokenizer, config, corpus, world=world)


def trained_encoder(model: Any, tokenizer: Any, config: ReadingConfig, corpus: Corpus) -> Encoder:
    """The encoder whose ``model`` and ``tokenizer`` a run has written."""
    return _encoder(model.requires_grad_(False), tokenizer, config, corpus)


def _encoder(model: Any, tokenizer: Any, config: ReadingConfig, corpus: Corpus, *, world: World = ALONE) -> Encoder:
    # Another name than the reader's: vectors are known by it, and these are others.
    lm = LanguageModel(model, tokenizer, name=f"{config.model.name} (of the policy)")
    lm.recomputes = config.update.gradient_checkpointing
    embedding = MODEL_EMBEDDINGS[config.selection.embedder](lm, layer=config.selection.layer)
    return Encoder(lm, embedding, corpus, world=world)
