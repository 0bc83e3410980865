"""BM25 and tf-idf by hand, late interaction by loops."""

from __future__ import annotations

import math

import pytest
import torch

from preceptor.lm.embedding import HiddenStates, key_vectors
from preceptor.systems.reading.study.retrieval import Lexicon, late_interaction, terms, token_idf, token_states
from tests.systems.reading.small import language_model

CORPUS = ["red stone", "red red leaf", "blue"]


def test_terms_lose_endings_and_stop_words() -> None:
    assert terms("The boxes, and the CITIES: walked; glass is Anna's.") == ["box", "city", "walk", "glass", "anna"]


def test_bm25_by_hand() -> None:
    """N = 3, mean length (2 + 3 + 1) / 3 = 2; red in 2 texts: idf ln(1 + 1.5 / 2.5) = ln 1.6; leaf in 1."""
    lexicon = Lexicon(CORPUS)
    red, leaf = math.log(1.6), math.log(1 + 2.5 / 1.5)
    assert lexicon.idf("red") == pytest.approx(red)
    # "red red leaf": length 3, norm 1.2 (0.25 + 0.75 · 3/2) = 1.65; "red stone": length 2, norm 1.2.
    expected = [red * 1 * 2.2 / (1 + 1.2), red * 2 * 2.2 / (2 + 1.65) + leaf * 1 * 2.2 / (1 + 1.65), 0.0]
    assert lexicon.bm25(["red leaf red"], CORPUS)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_tfidf_is_a_cosine() -> None:
    lexicon = Lexicon(CORPUS)
    found = lexicon.tfidf(["red leaf", "leaf red", "blue", "of the"])
    assert found[0, 1].item() == pytest.approx(1.0)
    assert found[0, 2].item() == 0.0
    assert found[3].tolist() == [0.0] * 4, "a text without terms is like nothing"


def test_late_interaction_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(length, 5, generator=generator) for length in (3, 1, 4)]
    weights = [torch.rand(len(each), generator=generator) for each in states]
    found = late_interaction(states, weights)
    for i, query in enumerate(states):
        for j, text in enumerate(states):
            total = 0.0
            for token, weight in zip(query, weights[i], strict=True):
                cosines = [float(token @ other / token.norm() / other.norm()) for other in text]
                total += float(weight) * max(cosines)
            assert found[i, j].item() == pytest.approx(total / float(weights[i].sum()), abs=1e-5)
    assert found[0, 2] != found[2, 0], "rows are queries"


def test_token_states_have_the_mean_that_keys_have() -> None:
    lm = language_model()
    embedding = HiddenStates(lm, layer=-2)
    rows = [[5, 6, 7], [8], [9, 10, 11, 12]]
    states = token_states(lm, embedding, rows)
    assert [len(each) for each in states] == [3, 1, 4]
    torch.testing.assert_close(torch.stack([each.mean(0) for each in states]), key_vectors(lm, embedding, rows))


def test_token_idf() -> None:
    idf = token_idf([[0, 1, 1], [1]], 3)
    assert idf.tolist() == pytest.approx([math.log(2), math.log(1 + 0.5 / 2.5), math.log(1 + 2.5 / 0.5)])
