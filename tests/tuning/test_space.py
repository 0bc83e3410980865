"""What a search ranges over, as it is typed."""

from __future__ import annotations

import pytest

from preceptor.errors import ConfigError
from preceptor.systems import find_system
from preceptor.tuning.space import Dimension, parsed_search

CONFIG = find_system("bandit").Config


def test_ranges_and_choices_are_read_and_written_back() -> None:
    words = ["update.learning_rate=1e-5:0.01:log", "history.steps=10:90", "update.baseline=none, bandit_mean,none"]
    space = parsed_search(words, CONFIG)
    assert space == (
        Dimension("update.learning_rate", 1e-5, 0.01, log=True),
        Dimension("history.steps", 10, 90, whole=True),
        Dimension("update.baseline", choices=("none", "bandit_mean")),
    )
    assert [dimension.corners() for dimension in space] == [(1e-5, 0.01), (10, 90), ("none", "bandit_mean")]
    assert parsed_search([dimension.text() for dimension in space], CONFIG) == space


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("update.learning_rat=1:2", r"no key 'update.learning_rat' \(did you mean 'update.learning_rate'\?\)"),
        ("update.learning_rate", "give KEY=LOW:HIGH"),
        ("update.learning_rate=1:0.5", "the lower bound must be below the upper one"),
        ("update.learning_rate=0:1:log", "a logarithmic range must begin above 0"),
        ("update.learning_rate=1:2:lag", r"only `log` may follow a range \(did you mean 'log'\?\)"),
        ("update.learning_rate=1:2:log:3", "only `log` may follow a range"),
        ("update.learning_rate=a:2", "'a' is no number"),
        ("update.learning_rate=nan:2", "'nan' is no number"),
        ("update.learning_rate=1", "leaves nothing to choose"),
        ("history.steps=1.5:3", "history.steps is a whole number"),
        ("update.baseline=1:3", "update.baseline is no number, so that it has no range"),
        ("seed=0:9", "cannot range over the seed"),
    ],
)
def test_what_is_no_range_is_said(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed_search([word], CONFIG)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed_search(["x=1:2", "history.steps=9:1", "history.rounds=1:2", "history.rounds=1:3"], CONFIG)
    assert len(caught.value.faults) == 3
    with pytest.raises(ConfigError, match="needs what to vary"):
        parsed_search([], CONFIG)
