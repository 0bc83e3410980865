"""Targets scored apart in one pass, against one row for each; the table and readings; what is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.errors import ModelError, ShapeError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import token_log_probs
from preceptor.systems.reading.study import scores
from preceptor.systems.reading.study.pool import Case
from preceptor.systems.reading.study.scores import Scorer, target_log_probs
from tests.systems.reading.small import language_model
from tests.systems.reading.study.small import pool

PREFIXES = [[0, 7, 8, 9], [0], [0, 30, 31]]
TARGETS = [([5, 6], [7, 8, 9]), ([11], [12]), ([20, 21, 22], [23, 24])]


def one_by_one(
    lm: LanguageModel, prefixes: list[list[int]], targets: list[tuple[list[int], list[int]]]
) -> torch.Tensor:
    """The slow way: every prefix with every target is a row of its own."""
    table = torch.empty(len(prefixes), len(targets))
    for row, prefix in enumerate(prefixes):
        for column, (key, value) in enumerate(targets):
            tokens = [*prefix, *key, *value]
            span = (len(tokens) - len(value), len(tokens))
            table[row, column] = token_log_probs(lm, [tokens], spans=[[span]])[0].mean()
    return table


@pytest.mark.parametrize("max_tokens", [8_192, 1])
def test_one_pass_equals_a_row_for_each(max_tokens: int) -> None:
    lm = language_model()
    found = target_log_probs(lm, PREFIXES, TARGETS, max_tokens=max_tokens)
    # float32 sums in another order.
    torch.testing.assert_close(found, one_by_one(lm, PREFIXES, TARGETS), atol=1e-5, rtol=1e-5)


def test_a_target_that_sees_another_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: with a plain causal mask the second target reads the first."""
    lm = language_model()
    original = lm.chosen_log_probs

    def leaky(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        width = tokens.shape[1]
        options["attention_mask"] = torch.ones(len(tokens), width, width, dtype=torch.bool).tril()
        return original(tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lm, "chosen_log_probs", leaky)
    found = target_log_probs(lm, PREFIXES, TARGETS)
    assert (found - one_by_one(language_model(), PREFIXES, TARGETS)).abs().max() > 1e-3


def test_empty_parts_and_long_readings_are_refused() -> None:
    lm = language_model()
    for prefixes, targets in (
        ([], TARGETS),
        ([[]], TARGETS),
        (PREFIXES, []),
        (PREFIXES, [([], [1])]),
        (PREFIXES, [([1], [])]),
    ):
        with pytest.raises(ShapeError, match="at least one token"):
            target_log_probs(lm, prefixes, targets)
    with pytest.raises(ModelError, match=r"lower episode\.budget"):
        target_log_probs(lm, [[0] * 255], TARGETS)


@pytest.mark.parametrize("case", [Case(pool(), "asked", 1, (0, 2)), Case(pool(), "seed", 0, (1, 2), seed=0)])
def test_the_table_is_a_reading_of_one(case: Case) -> None:
    """A candidate's gain in the table, the mean over targets, is what a reading of it alone is worth."""
    scorer = Scorer(language_model())
    table = scorer.candidate_gains(case)
    assert table.shape == (4, 2)
    readings = scorer.reading_gains(case, [[0], [1], [2], [3], []])
    torch.testing.assert_close(readings[:4], table.mean(1), atol=1e-5, rtol=1e-5)
    assert readings[4] == 0.0, "reading nothing is what gains are over"


def test_a_reading_by_hand() -> None:
    """asked: begin token, values in order, key, value; less the same without the values."""
    lm = language_model()
    case, scorer = Case(pool(), "asked", 0, (1,)), Scorer(lm)
    chosen, target = case.pool.candidates, case.pool.held_out[0][1]
    read = [token for index in (2, 0) for token in lm.encode(" " + chosen[index].value)]
    key, value = lm.encode(" " + target.key), lm.encode(" " + target.value)

    def mean(prefix: list[int]) -> float:
        tokens = [lm.begin_token, *prefix, *key, *value]
        return float(token_log_probs(lm, [tokens], spans=[[(len(tokens) - len(value), len(tokens))]])[0].mean())

    assert scorer.reading_gains(case, [[2, 0]]).item() == pytest.approx(mean(read) - mean([]), abs=1e-5)


def test_scores_are_remembered_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(pool(), "asked", 0, (0,))
    first = Scorer(language_model(), tmp_path / "scores")
    table, readings = first.candidate_gains(case), first.reading_gains(case, [[0, 1], [2]])
    assert first.num_readings == 5 + 3

    other_model = Scorer(language_model(seed=1), tmp_path / "scores")
    assert not torch.equal(other_model.candidate_gains(case), table), "another model's scores are its own"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a remembered score was computed again")

    monkeypatch.setattr(scores, "target_log_probs", never)
    again = Scorer(language_model(), tmp_path / "scores")
    assert torch.equal(again.candidate_gains(case), table)
    assert torch.equal(again.reading_gains(case, [[2], [0, 1]]), readings.flip(0))
    assert again.num_readings == 0
