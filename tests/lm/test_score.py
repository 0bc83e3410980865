"""Scores of given tokens, against one row at a time through plain Transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.errors import ModelError, ShapeError
from preceptor.lm import score
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length, branch_log_probs, pad_rows, span_mask, token_log_probs

# float32 rounds log-probabilities of magnitude 10 to about 1e-6; other shapes add in another order.
TOLERANCE = 1e-5
MakeLM = Callable[..., LanguageModel]


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def expected_spans(plain: Any, lm: LanguageModel, row: list[int], spans: list[tuple[int, int]]) -> Tensor:
    every = plain.log_probs(lm, row)
    return torch.cat([torch.empty(0), *(every[start - 1 : end - 1] for start, end in spans)])


@pytest.fixture
def rows(random_tokens: Any) -> list[list[int]]:
    return [[0, *random_tokens(length)] for length in (12, 3, 30, 7, 30, 1, 19)]


SPANS = [[(1, 13)], [(2, 4)], [(1, 5), (5, 6), (20, 31)], [], [(30, 31)], [(1, 1), (1, 2)], [(3, 8), (10, 20)]]


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize("max_tokens", [None, 64, 1])
def test_token_log_probs(
    family: str, attention: str | None, max_tokens: int | None, make_lm: MakeLM, plain: Any, rows: list[list[int]]
) -> None:
    lm = make_lm(family, attention=attention)
    scored = token_log_probs(lm, rows, spans=SPANS, max_tokens=max_tokens)
    assert [len(values) for values in scored] == [12, 2, 16, 0, 1, 1, 15]
    for row, spans, values in zip(rows, SPANS, scored, strict=True):
        close(values, expected_spans(plain, lm, row, spans))
    assert not scored[0].requires_grad


def test_padding_is_never_scored_and_changes_nothing(make_lm: MakeLM, rows: list[list[int]]) -> None:
    lm = make_lm()
    together = token_log_probs(lm, rows, spans=SPANS)
    for row, spans, values in zip(rows, SPANS, together, strict=True):
        (alone,) = token_log_probs(lm, [row], spans=[spans])
        close(values, alone)
    assert token_log_probs(lm, [], spans=[]) == []


def test_bad_spans_and_rows_are_refused(make_lm: MakeLM, random_tokens: Any) -> None:
    lm, row = make_lm(), [0, *random_tokens(5)]
    for spans in ([(0, 2)], [(2, 7)], [(3, 2)], [(3, 5), (4, 6)], [(4, 5), (1, 2)]):
        with pytest.raises(ShapeError, match=r"in order, without overlap, in 1\.\.6"):
            token_log_probs(lm, [row], spans=[spans])
    with pytest.raises(ShapeError, match="each of 1 rows, got 2"):
        token_log_probs(lm, [row], spans=[[], []])
    with pytest.raises(ModelError, match="a row of 97 tokens does not fit the context of 96 tokens of tiny llama"):
        token_log_probs(lm, [[0] * 97], spans=[[]])
    with pytest.raises(ModelError, match="a row of 0 tokens"):
        token_log_probs(lm, [[]], spans=[[]])
    assert len(token_log_probs(lm, [[0] * 96], spans=[[(1, 96)]])[0]) == 95


def test_batches_hold_what_they_may_and_every_row_once() -> None:
    lengths = [5, 1, 9, 9, 2, 5, 30]
    batches = batches_by_length(lengths, max_tokens=20)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 20
    assert batches == [[1, 4, 0, 5], [2, 3], [6]]


def test_rows_and_spans_as_tensors() -> None:
    device = torch.device("cpu")
    assert pad_rows([[5], [6, 7, 8]], filler=1, device=device).tolist() == [[5, 1, 1], [6, 7, 8]]
    mask = span_mask([[(0, 1), (3, 4)], [(1, 3)]], width=4, device=device)
    assert mask.tolist() == [[True, False, False, True], [False, True, True, False]]


def test_logits_held_at_once_are_bounded(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, widths = make_lm(num_hidden_layers=1), []
    score_tokens = lm.chosen_log_probs
    monkeypatch.setattr(
        lm, "chosen_log_probs", lambda tokens, **rest: widths.append(tokens.numel()) or score_tokens(tokens, **rest)
    )
    monkeypatch.setattr(score, "MAX_LOGITS", 300 * 1_000)  # of a vocabulary of 300: 1,000 tokens, 11 rows of 90
    token_log_probs(lm, [[0] * 90] * 23, spans=[[(89, 90)]] * 23)
    assert widths == [990, 990, 90]


# ---- branches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize("max_tokens", [None, 10, 1])
def test_branches_equal_encoding_each_on_its_own(
    family: str, attention: str | None, max_tokens: int | None, make_lm: MakeLM, plain: Any, random_tokens: Any
) -> None:
    lm = make_lm(family, attention=attention)
    trunk = [0, *random_tokens(24)]
    shared = random_tokens(3)
    branches = [
        (25, random_tokens(6), 0),  # from the trunk's end
        (1, random_tokens(4), 0),  # from its first token
        (13, random_tokens(8), 3),  # some of it given
        (13, shared, 0),  # two from one place
        (13, shared, 1),
        (7, random_tokens(1), 0),
        (9, random_tokens(2), 2),  # all of it given: nothing is scored
        (9, [], 0),
        (25, random_tokens(20), 19),
    ]
    scored = branch_log_probs(lm, trunk, branches, max_tokens=max_tokens)
    assert [len(values) for values in scored] == [6, 4, 5, 3, 2, 1, 0, 0, 1]
    for (at, tokens, given), values in zip(branches, scored, strict=True):
        row = trunk[:at] + tokens
        close(values, plain.log_probs(lm, row, at + given) if len(tokens) > given else torch.empty(0))


def test_the_trunk_is_encoded_once_a_pass(make_lm: MakeLM, random_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, widths = make_lm(), []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda tokens, **rest: widths.append(tokens.numel()) or forward(tokens, **rest))
    branches = [(20, random_tokens(5), 0)] * 6
    branch_log_probs(lm, [0, *random_tokens(29)], branches)
    branch_log_probs(lm, [0, *random_tokens(29)], branches, max_tokens=12)
    assert widths == [30 + 6 * 5, 30 + 10, 30 + 10, 30 + 10]
    assert branch_log_probs(lm, [0], []) == []


def test_bad_branches_are_refused(make_lm: MakeLM, random_tokens: Any) -> None:
    lm, trunk = make_lm(), [0, *random_tokens(9)]
    for at in (0, 11, -1):
        with pytest.raises(ShapeError, match=r"1\.\.10 tokens of its trunk"):
            branch_log_probs(lm, trunk, [(at, [5], 0)])
    for given in (-1, 3):
        with pytest.raises(ShapeError, match=r"0\.\.2 can be given"):
            branch_log_probs(lm, trunk, [(4, [5, 6], given)])
    with pytest.raises(ModelError, match="a branch of 97 tokens does not fit the context of 96"):
        branch_log_probs(lm, trunk, [(10, [5] * 87, 0)])
    with pytest.raises(ModelError, match="a trunk of 97 tokens"):
        branch_log_probs(lm, [0] * 97, [])
    assert len(branch_log_probs(lm, trunk, [(10, [5] * 86, 0)])[0]) == 86


@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_real_models(name: str, real_lm: Any, plain: Any) -> None:
    lm = real_lm(name)
    trunk = [1, *lm.encode("Tom had a red ball. He threw it to his dog. The dog ran after it.")]
    ends = [lm.encode(text) for text in (" Tom was happy.", " The ball was blue.")]
    scored = branch_log_probs(lm, trunk, [(at, end, 1) for at in (5, len(trunk)) for end in ends])
    expected = [plain.log_probs(lm, trunk[:at] + end, at + 1) for at in (5, len(trunk)) for end in ends]
    rows = token_log_probs(
        lm,
        [trunk[:at] + end for at in (5, len(trunk)) for end in ends],
        spans=[[(at + 1, at + len(end))] for at in (5, len(trunk)) for end in ends],
    )
    for values, row, reference in zip(scored, rows, expected, strict=True):
        close(values, reference)
        close(row, reference)
