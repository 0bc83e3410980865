from __future__ import annotations

import pytest
import torch

from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.evaluate import (
    explanations,
    option_probabilities,
    own_context_records,
    transfer_records,
)
from preceptor.systems.bandit.policy import Vocabulary
from preceptor.systems.bandit.prompts import prompts_for

BANDITS = (
    Bandit("beans", ("bean", "chickpea"), "bernoulli", 10.0, (0.75, 0.25)),
    Bandit("grains", ("lentil", "rice"), "bernoulli", 1.0, (0.75, 0.25)),
)
STEADY = torch.full((3, 2), 0.9, dtype=torch.float64)
TURNING = torch.tensor([[0.9, 0.1]] * 3, dtype=torch.float64)
EVEN = torch.full((3, 2), 0.5, dtype=torch.float64)

# The predecessor's four pairs, with the explanation that fits what it saw.
CASES = [
    # chickpea (2.5, loses) against lentil (0.75, wins): the pair that tells value from winner
    (STEADY, (2.5, 0.75), (False, True), {"value": 1, "winner": 0, "prompt": 0}),
    (1 - STEADY, (2.5, 0.75), (False, True), {"value": 0, "winner": 1, "prompt": 0}),
    # bean (7.5, wins) against rice (0.25, loses): both explain the bean
    (STEADY, (7.5, 0.25), (True, False), {"value": 1, "winner": 1, "prompt": 0}),
    # bean against lentil, both winners: value says bean, winner says neither
    (EVEN, (7.5, 0.75), (True, True), {"value": 0, "winner": 1, "prompt": 0}),
    (1 - STEADY, (7.5, 0.75), (True, True), {"value": 0, "winner": 0, "prompt": 0}),
    # whatever is named first is chosen
    (TURNING, (7.5, 0.75), (True, True), {"value": 0, "winner": 1, "prompt": 1}),
    (TURNING.T, (2.0, 2.0), (True, False), {"value": 1, "winner": 0, "prompt": 1}),
]


@pytest.mark.parametrize(("p_first", "values", "wins", "expected"), CASES)
def test_which_explanation_fits(
    p_first: torch.Tensor, values: tuple[float, float], wins: tuple[bool, bool], expected: dict[str, float]
) -> None:
    assert explanations(p_first, values=values, wins=wins) == expected
    mirrored = explanations(1 - p_first, values=values[::-1], wins=wins[::-1])
    assert mirrored == expected  # which word is called the first does not matter


def test_transfer_records_hold_the_probabilities_of_their_prompts(lm: LanguageModel) -> None:
    words = [word for bandit in BANDITS for word in bandit.words]
    vocabulary = Vocabulary(lm, words)
    templates = ["Pick {options}:", "{options}?"]
    records = transfer_records(
        lm, vocabulary, BANDITS, templates=templates, held_out=["Say {options}:"], method="learned", seed=3
    )
    assert len(records) == 2 * 4
    record = next(r for r in records if (r["item"], r["split"]) == ("chickpea / lentil", "train"))
    rows = [row[0] for row, _ in option_probabilities(lm, vocabulary, prompts_for(("chickpea", "lentil"), templates))]
    assert record["first_word"] == pytest.approx(sum(rows) / 4)
    assert record["first_word_named_first"] == pytest.approx((rows[0] + rows[2]) / 2)
    assert record["first_word_named_second"] == pytest.approx((rows[1] + rows[3]) / 2)
    assert record["named_first"] == pytest.approx((rows[0] + 1 - rows[1] + rows[2] + 1 - rows[3]) / 4)
    means = [(rows[0] + rows[1]) / 2, (rows[2] + rows[3]) / 2]
    assert record["template_spread"] == pytest.approx(abs(means[0] - means[1]) / 2)


def test_records_of_own_contexts(lm: LanguageModel) -> None:
    vocabulary = Vocabulary(lm, [word for bandit in BANDITS for word in bandit.words])
    prompts = {
        bandit.name: prompts_for(bandit.words, ["Pick {options}:"])
        + prompts_for(bandit.words, ["Say {options}:"], held_out=True)
        for bandit in BANDITS
    }
    records = own_context_records(lm, vocabulary, BANDITS, prompts, method="pretrained", seed=0)
    assert [(r["item"], r["split"]) for r in records] == [
        ("beans", "train"), ("beans", "held_out"), ("grains", "train"), ("grains", "held_out")
    ]  # fmt: skip
    rows = option_probabilities(lm, vocabulary, prompts["beans"][:2])
    assert records[0]["best_word"] == pytest.approx(sum(row[0] for row, _ in rows) / 2)
    assert all(sum(row) == pytest.approx(1) for row, _ in rows)
    assert 0 < records[0]["named_mass"] < 1
