"""The teacher: a language model that writes queries, and the attention by which a query chooses a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from preceptor.data.embedders.base import TextEmbedder
from preceptor.errors import ModelError, ShapeError
from preceptor.lm.embedding import ModelEmbedding, key_vectors
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.score import pad_rows, span_mask
from preceptor.objectives.entropy import entropy
from preceptor.objectives.selection import selection_entropy, selection_log_probs
from preceptor.systems.reading.material import Material


@dataclass(frozen=True)
class Keys:
    """Vectors of one article's keys, made once.

    Attributes:
        vectors: one a pair, less ``centre``; float32, no gradient.
        centre: what is subtracted from queries too (the mean key, or zero).
        version: which embedder made them.
    """

    vectors: Float[Tensor, "pairs dimension"]
    centre: Float[Tensor, " dimension"]
    version: str


@dataclass(frozen=True)
class Trajectories:
    """A batch of episodes over one article, on the CPU.

    Attributes:
        material: what was read.
        queries: tokens that the policy wrote at each step.
        query_log_probs: of those tokens under the distribution that they were drawn from, nats.
        query_entropy: of that distribution at each token, nats.
        query_vectors: what was compared with the keys.
        order: pair chosen at each step.
        available_mask: True = the pair could still be chosen at that step.
        selection_log_probs: over pairs, at each step, nats; −inf for what is gone.
        reference_queries: what the untrained model wrote in the same place, or None.
    """

    material: Material
    queries: Int[Tensor, "batch step token"]
    query_log_probs: Float[Tensor, "batch step token"]
    query_entropy: Float[Tensor, "batch step token"]
    query_vectors: Float[Tensor, "batch step dimension"]
    order: Int[Tensor, "batch step"]
    available_mask: Bool[Tensor, "batch step pairs"]
    selection_log_probs: Float[Tensor, "batch step pairs"]
    reference_queries: Int[Tensor, "batch step token"] | None = None

    def __post_init__(self) -> None:
        batch, step, token = self.queries.shape
        pairs = self.material.reading.num_pairs
        for name, shape in (
            ("query_log_probs", (batch, step, token)),
            ("query_entropy", (batch, step, token)),
            ("order", (batch, step)),
            ("available_mask", (batch, step, pairs)),
            ("selection_log_probs", (batch, step, pairs)),
        ):
            if tuple(getattr(self, name).shape) != shape:
                raise ShapeError(f"`{name}` must have shape {shape}, got {tuple(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class ActionScores:
    """What the policy, as it is now, says of recorded trajectories; carries gradient.

    Attributes:
        query_log_probs: of the recorded query tokens under the sampling distribution, nats.
        query_entropy: of the sampling distribution at each query token, nats.
        selection_log_probs: of the recorded choices, nats.
        selection_entropy: of the selection at each step, nats.
        query_logits: at query tokens, row-major over batch, step, token.
        value_logits: at value tokens, row-major over batch and position; none unless asked for.
    """

    query_log_probs: Float[Tensor, "batch step token"]
    query_entropy: Float[Tensor, "batch step token"]
    selection_log_probs: Float[Tensor, "batch step"]
    selection_entropy: Float[Tensor, "batch step"]
    query_logits: Float[Tensor, "query vocab"]
    value_logits: Float[Tensor, "value vocab"]


class Policy:
    """A language model and the selection that its queries make.

    Args:
        lm: writes the queries.
        sampling: how query tokens are drawn.
        embedding: the model's own embedding (carries gradient), or None.
        text_embedder: an embedder of texts outside the model (no gradient), or None. Exactly one of the two is given.
        projection: linear map on the query's vector, or None.
        centre: subtract the mean key from keys and queries.
        temperature: of the softmax over keys, in units of the inner product.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        sampling: Sampling,
        embedding: ModelEmbedding | None,
        text_embedder: TextEmbedder | None = None,
        projection: nn.Linear | None = None,
        centre: bool = True,
        temperature: float = 1.0,
    ) -> None:
        if (embedding is None) == (text_embedder is None):
            raise ModelError("a policy needs either the model's own embedding or a text embedder, got both or neither")
        self.lm = lm
        self.sampling = sampling
        self.embedding = embedding
        self.text_embedder = text_embedder
        self.projection = projection
        self.centre = centre
        self.temperature = temperature

    @property
    def selection_has_gradient(self) -> bool:
        """Whether the choice of a key teaches anything beyond its query's tokens."""
        return self.embedding is not None or self.projection is not None

    def embed_keys(self, material: Material) -> Keys:
        """Vectors of the article's keys under the policy's weights as they are now."""
        if self.embedding is not None:
            vectors, version = key_vectors(self.lm, self.embedding, material.keys), self.embedding.version
        else:
            assert self.text_embedder is not None
            vectors = self.text_embedder.embed(material.reading.keys).to(self.lm.device)
            version = self.text_embedder.version
        centre = vectors.mean(0) if self.centre else torch.zeros_like(vectors[0])
        return Keys(vectors=vectors - centre, centre=centre, version=version)

    def query_vectors(
        self, keys: Keys, *, captured: Tensor | None, queries: Int[Tensor, "*batch token"]
    ) -> Float[Tensor, "*batch dimension"]:
        """One vector a query: mean over its tokens (or the text's embedding), less the centre, projected."""
        if self.embedding is not None:
            assert captured is not None
            vectors = self.embedding.queries(captured).mean(-2)
        else:
            assert self.text_embedder is not None
            texts = [self.lm.decode(query) or " " for query in queries.flatten(0, -2).tolist()]
            vectors = self.text_embedder.embed([text if text.strip() else "." for text in texts])
            vectors = vectors.to(self.lm.device).unflatten(0, queries.shape[:-1])
        vectors = vectors - keys.centre
        return vectors if self.projection is None else self.projection(vectors)

    def select(
        self, keys: Keys, query_vectors: Float[Tensor, "*batch dimension"], available_mask: Bool[Tensor, "*batch pairs"]
    ) -> Float[Tensor, "*batch pairs"]:
        """Log-probabilities over pairs: log-softmax of inner products over temperature, over what is available."""
        return selection_log_probs(
            query_vectors, keys.vectors, available_mask=available_mask, temperature=self.temperature
        )

    def score(self, trajectories: Trajectories, keys: Keys, *, with_values: bool) -> ActionScores:
        """One packed pass over the trajectories, with gradient; equals what was recorded under equal weights."""
        lm, material = self.lm, trajectories.material
        rows = [
            material.query_row(order, queries)
            for order, queries in zip(trajectories.order.tolist(), trajectories.queries.tolist(), strict=True)
        ]
        tokens = pad_rows([row.tokens for row in rows], filler=lm.begin_token, device=lm.device)
        width = tokens.shape[1]
        at_query = span_mask([row.stretches("query") for row in rows], width=width, device=lm.device)
        at_value = span_mask([row.stretches("value") for row in rows], width=width, device=lm.device)
        predicts_query, predicts_value = _before(at_query), _before(at_value) & with_values
        output = lm.forward(
            tokens,
            keep=predicts_query | predicts_value,
            capture=self.embedding.query_module if self.embedding is not None else None,
        )
        is_query = predicts_query[predicts_query | predicts_value]
        query_logits, value_logits = output.logits[is_query], output.logits[~is_query]
        shape = trajectories.queries.shape
        queries = trajectories.queries.to(lm.device)
        log_probs = self.sampling.log_probs(query_logits, drawn=queries.flatten())
        captured = None if output.captured is None else output.captured[at_query].unflatten(0, shape)
        available = trajectories.available_mask.to(lm.device)
        selections = self.select(keys, self.query_vectors(keys, captured=captured, queries=queries), available)
        return ActionScores(
            query_log_probs=log_probs.gather(-1, queries.flatten()[:, None])[:, 0].unflatten(0, shape),
            query_entropy=entropy(log_probs).unflatten(0, shape),
            selection_log_probs=selections.gather(-1, trajectories.order.to(lm.device)[..., None])[..., 0],
            selection_entropy=selection_entropy(selections, available),
            query_logits=query_logits,
            value_logits=value_logits,
        )


def reference_logits(
    lm: LanguageModel, rows: Sequence[Sequence[int]], at: Bool[Tensor, "batch time"]
) -> Float[Tensor, "kept vocab"]:
    """Logits of a frozen model that predict the tokens marked in ``at``; no gradient."""
    with torch.no_grad():
        return lm.forward(pad_rows(rows, filler=lm.begin_token, device=lm.device), keep=_before(at)).logits


def _before(at: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """The positions whose logits predict the marked tokens."""
    keep = torch.zeros_like(at)
    keep[:, :-1] = at[:, 1:]
    return keep
