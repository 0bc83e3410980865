"""Every reward term by hand, user-defined terms, and advantages against plain loops over one sequence at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.errors import ConfigError, DataError
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum import config, rewards
from preceptor.systems.curriculum.config import ADVANTAGES, RewardOptions
from preceptor.systems.curriculum.rewards import (
    RewardTerm,
    load_function,
    reward_terms,
    score_rollouts,
    token_advantages,
)
from tests.systems.curriculum.made import rollouts_from

SEEDS = st.integers(0, 10_000)
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def test_repetition_blames_the_repeating_token() -> None:
    # Row 0: 5 repeats the prompt's last token, 5 repeats itself, 6 and 5 do not. Row 1 ends after two tokens; the
    # tokens drawn behind its end repeat each other and do not count.
    made = rollouts_from([[5, 5, 6, 5], [7, 7]], prompts=[[1, 5], [1]])
    assert rewards.repetition(made).tolist() == [[-0.25, -0.25, 0, 0], [0, -0.25, 0, 0]]


def test_repeated_bigrams_blames_the_token_that_completes_one() -> None:
    # (5 6) (6 5) (5 6): the third pair was there before. (7 7) (7 7): the second was.
    made = rollouts_from([[5, 6, 5, 6], [7, 7, 7]])
    assert rewards.repeated_bigrams(made).tolist() == [[0, 0, 0, -0.25], [0, 0, -0.25, 0]]


def test_distinct_stands_at_the_last_counted_token() -> None:
    # Pairs (5 6) (6 5) (5 6): two of three differ. One token has no pair, and nothing is repeated.
    made = rollouts_from([[5, 6, 5, 6], [7]])
    expected = torch.tensor([[0, 0, 0, 2 / 3], [1, 0, 0, 0]])
    torch.testing.assert_close(rewards.distinct(made), expected)


def test_overlap_is_f1_with_multiplicity() -> None:
    # Shared are one 5 and one 6: F1 = 2 · 2 / (3 + 4).
    made = rollouts_from([[5, 5, 6], [8]], references=[[5, 6, 7, 7], [7]])
    torch.testing.assert_close(rewards.overlap(made), torch.tensor([[0, 0, 4 / 7], [0, 0, 0]]))


def test_length_is_the_share_of_the_tokens_allowed() -> None:
    assert rewards.length(rollouts_from([[5, 5], [6]], num_tokens=4)).sum(1).tolist() == [0.5, 0.25]


def test_log_likelihood_is_the_mean_under_the_frozen_model(tiny: LanguageModel) -> None:
    made = rollouts_from([[5, 6, 7], [8]], prompts=[[0, 20, 21], [0, 22]])
    values = rewards.log_likelihood(tiny)(made)
    for row, (prompt, tokens) in enumerate((([0, 20, 21], [5, 6, 7]), ([0, 22], [8]))):
        logits = tiny.model(torch.tensor([[*prompt, *tokens]])).logits[0].detach().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens)]
        assert float(values[row].sum()) == pytest.approx(sum(expected) / len(tokens), abs=1e-5)
        assert values[row, : len(tokens)].tolist() == pytest.approx([x / len(tokens) for x in expected], abs=1e-5)


def test_score_weighs_and_adds() -> None:
    made = rollouts_from([[5, 5, 6], [7, 8, 9]])
    terms = [RewardTerm("repetition", 3.0, rewards.repetition), RewardTerm("length", 0.5, rewards.length)]
    scored = score_rollouts(made, terms)
    # Row 0: 3 · (−1/3) + 0.5 · 1; row 1: 0.5.
    assert scored.total.tolist() == pytest.approx([-0.5, 0.5])
    assert scored.terms["repetition"].tolist() == pytest.approx([-1 / 3, 0.0])


def test_what_is_not_counted_earns_nothing() -> None:
    scored = score_rollouts(
        rollouts_from([[5, 5], [7]]), [RewardTerm("n", 1.0, lambda made: torch.ones(made.tokens.shape))]
    )
    assert scored.total.tolist() == [2.0, 1.0]


def test_every_name_of_the_configuration_is_a_term(tiny: LanguageModel) -> None:
    options = [RewardOptions(name=name) for name in config.REWARDS]
    terms = reward_terms(options, tiny, likelihood=tiny)
    made = rollouts_from([[5, 5, 6]], prompts=[[0, 4]], references=[[5]])
    assert [term.name for term in terms] == list(config.REWARDS)
    assert score_rollouts(made, terms).tokens.isfinite().all()


def test_the_users_own_function(tiny: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def count(prompts, continuations, references):\n    return [len(c) for c in continuations]\n")
    (term,) = reward_terms([RewardOptions(name=f"{file}:count", weight=2.0)], tiny, likelihood=tiny)
    made = rollouts_from([tiny.encode("How much"), tiny.encode("Yes")])
    assert score_rollouts(made, [term]).total.tolist() == [16.0, 6.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such", "math has no function 'no_such'"),
        ("math:pi", "has no function 'pi'"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ],
)
def test_a_function_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_function(name)


def test_a_function_that_gives_too_few_numbers(tiny: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def one(prompts, continuations, references):\n    return [1.0]\n")
    (term,) = reward_terms([RewardOptions(name=f"{file}:one")], tiny, likelihood=tiny)
    with pytest.raises(DataError, match="returned 1 numbers for 2 continuations"):
        score_rollouts(rollouts_from([[5], [6]]), [term])


def test_a_reward_that_is_not_finite_makes_its_row_unusable() -> None:
    made = rollouts_from([[5], [6], [7]])
    values = torch.tensor([[1.0], [math.nan], [math.inf]])
    scored = score_rollouts(made, [RewardTerm("n", 1.0, lambda _: values)])
    assert scored.finite_rows.tolist() == [True, False, False]


# --- advantages -------------------------------------------------------------------------------------------------------


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and values, and continuations that end at different places."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6, size=4)
    mask = np.arange(5) < lengths[:, None]
    return (
        torch.tensor(random.normal(size=(4, 5))),
        torch.tensor(random.normal(size=(4, 5))),
        torch.tensor(mask),
    )


@repeatable
@given(SEEDS)
def test_gae_runs_over_the_tokens_of_one_sequence(seed: int) -> None:
    # The predecessor ran it across the batch, so that unrelated texts were each other's future.
    rewards, values, mask = draw(seed)
    advantages, returns = token_advantages(
        rewards, mask, kind="gae", values=values, discount=0.9, gae_lambda=0.8, whiten_advantages=False
    )
    expected = np.zeros((4, 5))
    for row in range(4):
        following_value = following = 0.0
        for token in reversed(range(int(mask[row].sum()))):
            error = float(rewards[row, token]) + 0.9 * following_value - float(values[row, token])
            following = error + 0.9 * 0.8 * following
            following_value = float(values[row, token])
            expected[row, token] = following
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    assert returns is not None
    np.testing.assert_allclose(returns, expected + np.where(mask, values, 0), atol=1e-12)


@repeatable
@given(SEEDS)
def test_whitened_gae_has_mean_0_and_deviation_1_over_what_counts(seed: int) -> None:
    rewards, values, mask = draw(seed)
    counted = token_advantages(rewards, mask, kind="gae", values=values)[0][mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-9)
    if len(counted) > 1:
        assert float(counted.std()) == pytest.approx(1, abs=1e-3)


def test_groups_by_hand() -> None:
    # Two prompts with two continuations each; totals 1, 3 and 10, 10.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 2.0], [10.0, 99.0], [4.0, 6.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    rloo = token_advantages(rewards, mask, kind="rloo", group_size=2)[0]
    assert rloo.tolist() == [[-2, -2], [2, 2], [0, 0], [0, 0]]
    dr_grpo = token_advantages(rewards, mask, kind="dr_grpo", group_size=2)[0]
    assert dr_grpo.tolist() == [[-1, -1], [1, 1], [0, 0], [0, 0]]
    grpo = token_advantages(rewards, mask, kind="grpo", group_size=2)[0]
    torch.testing.assert_close(grpo, dr_grpo / (2**0.5 + 1e-4))  # sample deviation of 1 and 3 is √2


@pytest.mark.parametrize("kind", ADVANTAGES)
@repeatable
@given(seed=SEEDS)
def test_what_does_not_count_has_no_advantage_and_changes_nothing(kind: str, seed: int) -> None:
    rewards, values, mask = draw(seed)
    advantages = token_advantages(rewards, mask, kind=kind, values=values, group_size=2)[0]
    junk = rewards.masked_fill(~mask, float("nan"))
    again = token_advantages(junk, mask, kind=kind, values=values, group_size=2)[0]
    assert (advantages[~mask] == 0).all()
    assert torch.equal(advantages, again)


def test_equal_rewards_teach_nothing_in_groups() -> None:
    rewards, mask = torch.full((4, 3), 0.7), torch.ones(4, 3, dtype=torch.bool)
    for kind in ("rloo", "grpo", "dr_grpo"):
        assert (token_advantages(rewards, mask, kind=kind, group_size=4)[0] == 0).all()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rloo", [0.75, -0.75, 0.0, 0.0]),  # of -2, -3 and -2.5: less the mean of the other two
        ("dr_grpo", [0.5, -0.5, 0.0, 0.0]),  # less the mean of the three, -2.5
        ("grpo", [0.9998, -0.9998, 0.0, 0.0]),  # over their standard deviation 0.5 and 1e-4
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_a_continuation_without_a_finite_reward_leaves_its_group(
    kind: str, expected: list[float], masked: bool
) -> None:
    rewards = torch.tensor([[-2.0, 0.0], [-1.0, -2.0], [0.0, math.nan], [-2.5, 0.0]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[2] = not masked
    found, _ = token_advantages(rewards, mask, kind=kind, group_size=4)
    torch.testing.assert_close(found, torch.tensor(expected)[:, None].expand(4, 2) + 0.0, rtol=0, atol=1e-4)
    nobody, _ = token_advantages(rewards, torch.zeros_like(mask), kind=kind, group_size=4)
    assert not nobody.any()
