"""What a policy knows of a case, against the slow way: which text is compared with which, and query likelihood."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from preceptor.lm.embedding import HiddenStates, key_vectors
from preceptor.lm.score import token_log_probs
from preceptor.systems.reading.study.features import (
    Corpus,
    case_batch,
    channel_names,
    channel_scales,
    pool_features,
)
from preceptor.systems.reading.study.pool import Case
from preceptor.systems.reading.study.scores import Scorer
from tests.systems.reading.small import language_model
from tests.systems.reading.study.small import article, pool

CASES = (Case(pool(), "asked", 0, (0, 2)), Case(pool(), "seed", 1, (1, 2), seed=0))


def test_channels_compare_what_their_axes_say() -> None:
    lm = language_model()
    scorer, embedding, names = Scorer(lm), HiddenStates(lm, layer=-2), channel_names(("query_likelihood",))
    corpus = Corpus.of([*article("bees").pairs, *article("salt").pairs], scorer, embedding)
    features = {"small": pool_features(pool(), corpus, scorer, embedding, channels=names, query_tokens=1)}
    scales = channel_scales(features, [pool()])
    gains = [torch.arange(8.0).view(4, 2), torch.ones(4, 2)]
    batch = case_batch(CASES, features, scales, gains)

    def vector(text: str) -> torch.Tensor:
        return (key_vectors(lm, embedding, [scorer.value(text)])[0] - corpus.mean) / (corpus.deviation + 1e-6)

    def standard(value: float, channel: int) -> float:
        return (value - float(scales[channel, 0])) / (float(scales[channel, 1]) + 1e-6)

    def likelihood(query: str, key: str) -> float:
        tokens = scorer.value(query)
        given = [lm.begin_token, *scorer.value(key), *tokens]
        alone = [lm.begin_token, *tokens]
        scored = [
            token_log_probs(lm, [row], spans=[[(len(row) - len(tokens) + 1, len(row))]])[0].mean()
            for row in (given, alone)
        ]
        return float(scored[0] - scored[1])

    for row, case in enumerate(CASES):
        contexts = ([pair.key for pair in case.pairs(case.targets)] if case.seed is None
                    else [case.pairs([case.seed])[0].value])  # fmt: skip
        expected = torch.stack([vector(text) for text in contexts]).mean(0)
        torch.testing.assert_close(batch.queries[row], expected, atol=1e-3, rtol=1e-3)
        for i, candidate in enumerate(case.pool.candidates):
            found = float(batch.query_channels[row, i, 1])
            slow = sum(standard(likelihood(text, candidate.key), 1) for text in contexts) / len(contexts)
            assert found == pytest.approx(slow, abs=1e-2)
            for j, other in enumerate(case.pool.candidates):
                # Candidate's key against the value that was read, and against another key.
                read = standard(float(cosine_similarity(vector(candidate.key), vector(other.value), dim=0)), 0)
                assert float(batch.read_channels[row, i, j, 0]) == pytest.approx(read, abs=1e-2)
                key = standard(float(cosine_similarity(vector(candidate.key), vector(other.key), dim=0)), 0)
                assert float(batch.key_channels[row, i, j, 0]) == pytest.approx(key, abs=1e-2)
    assert batch.gains[0].tolist() == [0.5, 2.5, 4.5, 6.5], "the mean over what is asked"
    assert batch.on_target.tolist() == [[False, True, True, False], [True, False, False, True]]
