"""No answer of an embeddings service is so odd that it passes for vectors or ends in a traceback."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from preceptor.data.embedders.answer import read_answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"data": null}',
        b'{"data": {"0": 1}}',
        b"[" * 200_000,
        b"\xff\xfe",
        b'{"data": [7, {}, {"index": true}, {"index": 1e3}, {"index": -1}]}',
        b'{"data": [{"index": 0}, {"index": 1, "embedding": "AAAA"}]}',
        b'{"data": [{"index": 0, "embedding": [1, "2"]}, {"index": 1, "embedding": [1e999, 0]}]}',
        b'{"data": [{"index": 0, "embedding": [true, false]}, {"index": 1, "embedding": [1e39, 0]}]}',
        b'{"data": [{"index": 0, "embedding": [1' + b"0" * 400 + b', 0]}, {"index": 1, "embedding": [[1, 0]]}]}',
    ],
)
def test_odd_answers_give_faults_and_no_vectors(body: bytes) -> None:
    vectors, _, faults = read_answer(body, [b"a", b"b"], dimension=2)
    assert vectors == {}
    assert faults


def test_numbers_and_base64_mean_the_same() -> None:
    packed = base64.b64encode(np.array([0.6, 0.8], dtype="<f4").tobytes()).decode()
    items = [{"index": 1, "embedding": packed}, {"index": 0, "embedding": [0.6, 0.8]}]
    for usage, tokens in [
        ({"total_tokens": 5}, 5),
        ({"total_tokens": -1}, None),
        ({"total_tokens": "5"}, None),
        ({"total_tokens": 10**30}, None),
        (3, None),
    ]:
        vectors, num_tokens, faults = read_answer(
            json.dumps({"data": items, "usage": usage}).encode(), [b"a", b"b"], dimension=2
        )
        assert (faults, num_tokens) == ([], tokens)
        assert np.array_equal(vectors[b"a"], vectors[b"b"])
