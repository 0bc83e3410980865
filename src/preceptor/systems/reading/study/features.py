"""What a policy knows of a case: vectors of query and keys, and how alike they are on several channels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.data.articles.pairs import Pair
from preceptor.lm.decode import Decoder
from preceptor.lm.embedding import ModelEmbedding
from preceptor.lm.sampling import Sampling
from preceptor.systems.reading.study.pool import NUM_HELD_OUT, Case, Pool
from preceptor.systems.reading.study.retrieval import Lexicon, late_interaction, token_idf, token_states
from preceptor.systems.reading.study.scores import Scorer

CHANNELS = ("cosine", "late_interaction", "bm25", "tfidf", "query_likelihood", "written_query")
"""Similarities that a policy may weigh; the first is always there, and its vectors are projected by the policy."""

MAX_WRITTEN_ROWS = 64
"""Rows that the model writes after at once, each with a KV cache of its own."""


def channel_names(further: Sequence[str]) -> tuple[str, ...]:
    """The cosine and the ``further`` channels, in the order of ``CHANNELS``."""
    return tuple(name for name in CHANNELS if name == CHANNELS[0] or name in further)


@dataclass(frozen=True)
class Corpus:
    """What is known of texts in general, from the training articles alone.

    Attributes:
        lexicon: of words.
        idf: of each token.
        mean, deviation: of the mean states of training keys.
        token_mean: mean state of a token.
        written_mean: mean state of what the model writes after a training key; None without that channel.
    """

    lexicon: Lexicon
    idf: Float[Tensor, " vocab"]
    mean: Float[Tensor, " dimension"]
    deviation: Float[Tensor, " dimension"]
    token_mean: Float[Tensor, " dimension"]
    written_mean: Float[Tensor, " dimension"] | None = None

    @cached_property
    def digest(self) -> str:
        """Of everything above."""
        tensors = [self.idf, self.mean, self.deviation, self.token_mean]
        if self.written_mean is not None:
            tensors.append(self.written_mean)
        numbers = torch.cat(tensors).numpy().tobytes()
        words = repr((self.lexicon.num_texts, self.lexicon.mean_length, sorted(self.lexicon.frequency.items())))
        return hashlib.sha256(numbers + words.encode()).hexdigest()

    def standardised(self, vectors: Float[Tensor, "text dimension"]) -> Float[Tensor, "text dimension"]:
        """Mean states of texts, each component by its mean and deviation over training keys; with gradient."""
        return (vectors - self.mean) / (self.deviation + 1e-6)

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        scorer: Scorer,
        embedding: ModelEmbedding,
        *,
        query_tokens: int = 0,
        max_states: int = 1_000,
        max_written: int = 200,
    ) -> Corpus:
        """The statistics of ``pairs``; the states of about ``max_states`` of them, evenly spread, are looked at.

        With ``query_tokens`` the model writes as many tokens after at most ``max_written`` keys.
        """
        rows = [scorer.value(text) for pair in pairs for text in (pair.key, pair.value)]
        some = pairs[:: max(1, len(pairs) // max_states)]
        states = token_states(scorer.lm, embedding, [scorer.value(pair.key) for pair in some], world=scorer.world)
        means = torch.stack([each.mean(0) for each in states])
        written_mean = None
        if query_tokens:
            keys = [scorer.value(pair.key) for pair in pairs[:: -(-len(pairs) // max_written)]]
            written_mean = written_queries(scorer, embedding, keys, num_tokens=query_tokens).mean(0)
        return cls(
            lexicon=Lexicon([text for pair in pairs for text in (pair.key, pair.value)]),
            idf=token_idf(rows, scorer.lm.vocab_size),
            mean=means.mean(0),
            deviation=means.std(0),
            token_mean=torch.cat(states).mean(0),
            written_mean=written_mean,
        )


@dataclass(frozen=True)
class CaseBatch:
    """Cases as tensors; channels are standardised by their mean and deviation between questions and keys.

    Attributes:
        queries: what the context says: the mean over its questions, or the seed.
        keys: of each candidate.
        query_channels: candidate's key against the query; the first (cosine) is left to the policy and 0 here.
        key_channels: candidate's key (first axis) against candidate's key (second axis).
        read_channels: candidate's key (first axis) against candidate's value (second axis).
        gains: of each candidate read alone, nats per value token, the mean over the held-out values.
        on_target: True = the candidate is of the target article.
    """

    queries: Float[Tensor, "case dimension"]
    keys: Float[Tensor, "case candidate dimension"]
    query_channels: Float[Tensor, "case candidate channel"]
    key_channels: Float[Tensor, "case candidate candidate channel"]
    read_channels: Float[Tensor, "case candidate candidate channel"]
    gains: Float[Tensor, "case candidate"]
    on_target: Bool[Tensor, "case candidate"]

    def __len__(self) -> int:
        return len(self.gains)

    def at(self, indices: Int[Tensor, " chosen"]) -> CaseBatch:
        """The cases at ``indices``."""
        return CaseBatch(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})


@dataclass(frozen=True)
class PoolFeatures:
    """Vectors and similarities of all texts of one pool.

    The texts: the held-out keys, article by article; the seeds, one an article; the candidates' keys; their values.
    """

    vectors: Float[Tensor, "text dimension"]
    channels: Float[Tensor, "channel text text"]  # rows are queries

    @staticmethod
    def held_out(article: int, index: int) -> int:
        """Place of a held-out key."""
        return article * NUM_HELD_OUT + index

    @staticmethod
    def seed(pool: Pool, article: int) -> int:
        """Place of an article's seed."""
        return len(pool.articles) * NUM_HELD_OUT + article


def pool_features(
    pool: Pool,
    corpus: Corpus,
    scorer: Scorer,
    embedding: ModelEmbedding,
    *,
    channels: Sequence[str],
    query_tokens: int,
) -> PoolFeatures:
    """Every channel between all texts of ``pool``, not yet standardised; 0 where a channel is not defined.

    ``query_tokens`` is the length of what the model writes after a context, for the channel ``written_query``.
    """
    texts = [pair.key for pairs in pool.held_out for pair in pairs]
    texts += [pairs[0].value for pairs in pool.held_out]
    num_queries = len(texts)
    texts += [pair.key for pair in pool.candidates] + [pair.value for pair in pool.candidates]
    size = len(channels) * len(texts) ** 2
    content: list[object] = [corpus.digest, embedding.version, tuple(channels), num_queries, texts]
    if "written_query" in channels:
        content.append(query_tokens)
    found = scorer.remembered(
        hashlib.sha256(repr(tuple(content)).encode()).digest(),
        lambda: _similarities(
            texts, num_queries, corpus, scorer, embedding, channels=channels, query_tokens=query_tokens
        ),
    )
    return PoolFeatures(
        vectors=found[size:].view(len(texts), -1), channels=found[:size].view(len(channels), len(texts), len(texts))
    )


def _similarities(
    texts: Sequence[str],
    num_queries: int,
    corpus: Corpus,
    scorer: Scorer,
    embedding: ModelEmbedding,
    *,
    channels: Sequence[str],
    query_tokens: int,
) -> Float[Tensor, " number"]:
    """Every channel between all ``texts``, flat, and then their vectors; the first ``num_queries`` are queries."""
    rows = [scorer.value(text) for text in texts]
    num_keys = (len(texts) - num_queries) // 2
    states = token_states(scorer.lm, embedding, rows, world=scorer.world)
    vectors = corpus.standardised(torch.stack([each.mean(0) for each in states]))
    unit = torch.nn.functional.normalize(vectors, dim=-1)

    similarities = [unit @ unit.T]
    for channel in channels[1:]:
        if channel == "late_interaction":
            centred = [each - corpus.token_mean for each in states]
            similarities.append(late_interaction(centred, [corpus.idf[list(row)] for row in rows]))
        elif channel == "bm25":
            similarities.append(corpus.lexicon.bm25(texts, texts))
        elif channel == "tfidf":
            similarities.append(corpus.lexicon.tfidf(texts))
        elif channel == "query_likelihood":
            similarities.append(_query_likelihood(rows, num_queries, num_keys, scorer))
        else:
            assert corpus.written_mean is not None, "a corpus for this channel knows what the model writes"
            written = written_queries(scorer, embedding, rows[:num_queries], num_tokens=query_tokens)
            # What a model writes has a mean of its own, which says nothing about the question.
            written = (written - corpus.written_mean) / (corpus.deviation + 1e-6)
            similarities.append(torch.zeros(len(rows), len(rows)))
            similarities[-1][:num_queries] = torch.nn.functional.normalize(written, dim=-1) @ unit.T
    return torch.cat([torch.stack(similarities).flatten(), vectors.flatten()])


def _query_likelihood(rows: Sequence[Sequence[int]], num_queries: int, num_keys: int, scorer: Scorer) -> Tensor:
    """log p(query | key) less log p(query), nats per token, the first token apart; between queries and keys alone."""
    begin = scorer.lm.begin_token
    keys = rows[num_queries : num_queries + num_keys]
    # A target gives its first token and scores the others, so a query needs two tokens: every sentence has them.
    targets = [(row[:1], row[1:]) for row in rows[:num_queries]]
    scores = scorer.log_probs([[begin], *([begin, *key] for key in keys)], targets)  # key query
    found = torch.zeros(len(rows), len(rows))
    found[:num_queries, num_queries : num_queries + num_keys] = (scores[1:] - scores[0]).T
    return found


def written_queries(
    scorer: Scorer, embedding: ModelEmbedding, rows: Sequence[Sequence[int]], *, num_tokens: int
) -> Float[Tensor, "row dimension"]:
    """Mean state of the ``num_tokens`` likeliest tokens that the model writes after each of ``rows``; no gradient.

    The states are those that keys have, since keys are what they are compared with. Where two tokens are all but
    equally likely, the size of a batch and the device decide between them.
    """
    lm = scorer.lm
    sampling = Sampling(temperature=0.0, suppressed=lm.never_drawn)

    def compute(mine: slice) -> tuple[Tensor]:
        own, found = [[lm.begin_token, *row] for row in rows[mine]], []
        for start in range(0, len(own), MAX_WRITTEN_ROWS):
            some = own[start : start + MAX_WRITTEN_ROWS]
            decoder = Decoder(lm, batch_size=len(some), capture=embedding.key_module)
            decoder.append(some)
            # Greedy: the generator is asked and decides nothing.
            written = decoder.generate(num_tokens, sampling=sampling, generator=torch.Generator().manual_seed(0))
            assert written.captured is not None, "the key module is no part of the model"
            found.append(embedding.keys(written.captured).mean(1).cpu())  # [row, dimension]
        return (torch.cat(found),)

    return scorer.world.gathered(len(rows), compute)[0]


def channel_scales(features: Mapping[str, PoolFeatures], pools: Sequence[Pool]) -> Float[Tensor, "channel 2"]:
    """Mean and standard deviation of each channel between the held-out keys and the candidates' keys of ``pools``."""
    blocks = []
    for pool in pools:
        first = len(pool.articles) * (NUM_HELD_OUT + 1)
        keys = slice(first, first + len(pool.candidates))
        blocks.append(features[pool.name].channels[:, : len(pool.articles) * NUM_HELD_OUT, keys].flatten(1))
    values = torch.cat(blocks, 1)
    return torch.stack([values.mean(1), values.std(1)], -1)


def case_batch(
    cases: Sequence[Case],
    features: Mapping[str, PoolFeatures],
    scales: Float[Tensor, "channel 2"],
    gains: Sequence[Float[Tensor, "candidate target"]],
) -> CaseBatch:
    """The tensors of ``cases``, given the features of their pools (by name) and the gains of their candidates."""
    columns: dict[str, list[Tensor]] = {field.name: [] for field in fields(CaseBatch)}
    for case, gain in zip(cases, gains, strict=True):
        pool, found = case.pool, features[case.pool.name]
        if case.seed is None:
            query = [found.held_out(case.target, index) for index in case.targets]
        else:
            query = [found.seed(pool, case.target)]
        first = len(pool.articles) * (NUM_HELD_OUT + 1)
        keys, values = slice(first, first + len(gain)), slice(first + len(gain), first + 2 * len(gain))
        channels = (found.channels - scales[:, :1, None]) / (scales[:, 1:, None] + 1e-6)  # channel text text
        asked = channels[:, query, keys].mean(1)  # channel candidate
        asked[0] = 0.0  # the cosine, which depends on the policy's projections
        columns["queries"].append(found.vectors[query].mean(0))
        columns["keys"].append(found.vectors[keys])
        columns["query_channels"].append(asked.T)
        columns["key_channels"].append(channels[:, keys, keys].permute(1, 2, 0))
        # Values are the queries here: how well the key answers to what was read.
        columns["read_channels"].append(channels[:, values, keys].permute(2, 1, 0))
        columns["gains"].append(gain.mean(1))
        columns["on_target"].append(torch.tensor(pool.sources) == case.target)
    return CaseBatch(**{name: torch.stack(tensors) for name, tensors in columns.items()})
