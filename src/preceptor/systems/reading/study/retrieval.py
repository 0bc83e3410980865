"""How alike texts are, in several ways: BM25, tf-idf, mean states, late interaction, query likelihood."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.lm.embedding import ModelEmbedding
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length, pad_rows
from preceptor.runs.world import ALONE, World

K1, B = 1.2, 0.75
"""Saturation of term counts and strength of length normalisation in BM25, at their usual values."""

_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all also an and any are as at be because been before being both but by can could did do does
        during each few for from had has have he her his how i if in into is it its like made many may more most much no
        nor not of on one only or other our out over s same she since so some such than that the their them then there
        these they this those through to two under until up very was we were what when where which while who will with
        would you
        """,
    )
)


def terms(text: str) -> list[str]:
    """Lower-case words of ``text`` without stop words, plural and past endings cut.

    >>> terms("The cats were playing with Anna's ball.")
    ['cat', 'play', 'anna', 'ball']
    """
    words = re.findall(r"\w+", re.sub(r"['’]s\b", "", text.lower()))
    return [_stem(word) for word in words if word not in _STOP_WORDS]


def _stem(word: str) -> str:
    for ending, shortest in (("ing", 6), ("ed", 5), ("ies", 5), ("es", 5), ("s", 4)):
        if word.endswith(ending) and len(word) >= shortest and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word


class Lexicon:
    """How rare each term is in a corpus, and how long its texts are.

    Args:
        corpus: texts of the training articles; those of held-out articles are never counted.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        counted = [terms(text) for text in corpus]
        self.num_texts = len(counted)
        self.frequency = Counter(term for each in counted for term in set(each))
        self.mean_length = sum(map(len, counted)) / max(len(counted), 1)

    def idf(self, term: str) -> float:
        """ln(1 + (N − df + ½) / (df + ½)) of a term in df of N texts."""
        df = self.frequency[term]
        return math.log(1 + (self.num_texts - df + 0.5) / (df + 0.5))

    def bm25(self, queries: Sequence[str], texts: Sequence[str]) -> Float[Tensor, "query text"]:
        """BM25 of every text for every query.

        Σ over the query's distinct terms of idf · f (k₁ + 1) / (f + k₁ (1 − b + b · length / mean length)), f the
        term's count in the text.

        Source: Robertson and Zaragoza (2009), doi:10.1561/1500000019.
        """
        counts = [Counter(terms(text)) for text in texts]
        norms = [K1 * (1 - B + B * sum(each.values()) / self.mean_length) for each in counts]
        scores = torch.zeros(len(queries), len(texts))
        for row, query in enumerate(queries):
            for term in dict.fromkeys(terms(query)):
                weight = self.idf(term) * (K1 + 1)
                for column, (count, norm) in enumerate(zip(counts, norms, strict=True)):
                    if term in count:
                        scores[row, column] += weight * count[term] / (count[term] + norm)
        return scores

    def tfidf(self, texts: Sequence[str]) -> Float[Tensor, "text text"]:
        """Cosine of (1 + ln f) · idf between all texts; 0 for a text without terms."""
        counts = [Counter(terms(text)) for text in texts]
        vocabulary = {term: index for index, term in enumerate(dict.fromkeys(term for each in counts for term in each))}
        matrix = torch.zeros(len(texts), max(len(vocabulary), 1))
        for row, each in enumerate(counts):
            for term, count in each.items():
                matrix[row, vocabulary[term]] = (1 + math.log(count)) * self.idf(term)
        matrix = torch.nn.functional.normalize(matrix, dim=-1)
        return matrix @ matrix.T


@torch.no_grad()
def token_states(
    lm: LanguageModel,
    embedding: ModelEmbedding,
    rows: Sequence[Sequence[int]],
    *,
    max_tokens: int = 8_192,
    world: World = ALONE,
) -> list[Float[Tensor, "token dimension"]]:
    """State of every token of each row, the row alone after the begin token; float32 on the CPU, no gradient.

    Each process of ``world`` computes some rows and has all.
    """
    lengths = [len(row) for row in rows]

    def compute(mine: slice) -> list[Tensor]:
        own = [[lm.begin_token, *row] for row in rows[mine]]
        states: dict[int, Tensor] = {}
        for batch in batches_by_length([len(row) for row in own], max_tokens=max_tokens):
            tokens = pad_rows([own[index] for index in batch], filler=lm.begin_token, device=lm.device)
            captured = lm.forward(tokens, keep=torch.zeros_like(tokens, dtype=torch.bool), capture=embedding.key_module)
            assert captured.captured is not None, "the key module is no part of the model"
            vectors = embedding.keys(captured.captured).cpu()
            states.update({index: vectors[row, 1 : len(own[index])].clone() for row, index in enumerate(batch)})
        return [states[index] for index in range(len(own))]

    return world.gathered_lists(lengths, compute)


def late_interaction(
    states: Sequence[Float[Tensor, "token dimension"]], weights: Sequence[Float[Tensor, " token"]]
) -> Float[Tensor, "text text"]:
    """MaxSim of all texts: Σ_t w_t max_u cos(query token t, text token u) / Σ_t w_t; rows are queries.

    Args:
        states: token vectors of each text, centred.
        weights: of each token as part of a query (idf), of which some are positive.

    Source: ColBERT, arXiv 2004.12832, section 3.3; the weights by idf are ours.
    """
    segment = torch.repeat_interleave(torch.arange(len(states)), torch.tensor([len(each) for each in states]))
    vectors = torch.nn.functional.normalize(torch.cat(list(states)), dim=-1)  # [tokens of all texts, dimension]
    similarity = vectors @ vectors.T
    # [query token, text]: the best match of each token in each text.
    index = segment.expand(len(segment), -1)
    best = torch.full((len(segment), len(states)), -torch.inf).scatter_reduce(1, index, similarity, "amax")
    weight = torch.cat(list(weights))
    sums = torch.zeros(len(states), len(states)).index_add_(0, segment, best * weight[:, None])
    return sums / torch.zeros(len(states)).index_add_(0, segment, weight)[:, None]


def token_idf(rows: Sequence[Sequence[int]], vocab_size: int) -> Float[Tensor, " vocab"]:
    """ln(1 + (N − df + ½) / (df + ½)) of every token, df the number of ``rows`` that hold it."""
    df = torch.zeros(vocab_size)
    for row in rows:
        df[list(set(row))] += 1
    return torch.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
