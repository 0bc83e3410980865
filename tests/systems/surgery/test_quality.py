from __future__ import annotations

import math

import pytest
import torch

from preceptor.systems.surgery.quality import Draws, Examiner, acceptance, distinct_share, repeated_share
from preceptor.systems.surgery.student import next_token_logits, write
from tests.systems.surgery.small import small_student

WEIGHTS = {"loss": 1.0, "referee": 0.5, "repetition": 0.25, "distinct": 2.0}


class ByParity:
    """A referee who knows one thing: after an even token comes the same one with ½, after an odd one anything."""

    flops_per_token = 10
    training_flops = 0

    def probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        probs = torch.full((*tokens.shape, 7), 1 / 7)
        even = tokens % 2 == 0
        probs[even] = 1 / 12
        return probs.scatter(-1, tokens[..., None], torch.where(even, 0.5, 1 / 7)[..., None])


TOKENS = torch.randint(7, (50,), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(1))


def examiner() -> Examiner:
    return Examiner(
        ByParity(),
        tokens=TOKENS,
        num_prompts=5,
        prompt_tokens=3,
        continuation_tokens=6,
        windows=WINDOWS,
        weights=WEIGHTS,
    )


def draws(seed: int = 2) -> Draws:
    return examiner().draw(torch.Generator().manual_seed(seed))


def test_quality_is_the_weighted_sum_of_its_parts() -> None:
    # To catch: the referee asked one position too early, and the sign of repetition.
    student, common = small_student(), draws()
    found = examiner().examine(student, common)
    continuations = write(student, *common)
    referee = []
    for prompt, continuation in zip(common.prompts.tolist(), continuations.tolist(), strict=True):
        previous = prompt[-1]
        for token in continuation:
            likely = 0.5 if token == previous else 1 / 12
            referee.append(math.log(likely if previous % 2 == 0 else 1 / 7))
            previous = token
    log_probs = next_token_logits(student, WINDOWS[:, :-1]).log_softmax(-1)
    log_prob = log_probs.gather(-1, WINDOWS[:, 1:, None]).mean().item()
    assert found.log_prob == pytest.approx(log_prob, rel=1e-5)
    assert found.referee_log_prob == pytest.approx(sum(referee) / len(referee), rel=1e-5)
    assert found.repetition == repeated_share(continuations, length=4)
    assert found.distinct == distinct_share(continuations, length=2)
    assert found.total == pytest.approx(
        found.log_prob + 0.5 * found.referee_log_prob - 0.25 * found.repetition + 2 * found.distinct, rel=1e-9
    )


def test_repetition_counts_against_a_student() -> None:
    """Noise of 0 draws the first token of the vocabulary every time: of nine runs of four, eight were there before."""
    student, prompts = small_student(), draws().prompts
    found = examiner().examine(student, Draws(prompts, torch.zeros(len(prompts), 12, dtype=torch.float64)))
    assert found.repetition == pytest.approx(8 / 9)
    assert found.distinct == pytest.approx(1 / (11 * len(prompts)))
    rest = found.log_prob + 0.5 * found.referee_log_prob + 2 * found.distinct
    assert found.total == pytest.approx(rest - 0.25 * 8 / 9, rel=1e-9)


def test_the_same_draws_give_the_same_quality_bit_for_bit() -> None:
    student, exam = small_student(), examiner()
    assert exam.examine(student, draws()) == exam.examine(student, draws())
    assert exam.examine(student, draws(3)) != exam.examine(student, draws())
    assert exam.examine(student, draws(3)).log_prob == exam.examine(student, draws()).log_prob


def test_prompts_are_cut_from_the_text() -> None:
    found = draws()
    assert found.noise.shape == (5, 6)
    text = TOKENS.unfold(0, 3, 1).tolist()
    assert all(prompt in text for prompt in found.prompts.tolist())


def test_positions_are_counted_for_the_cost() -> None:
    # 5 · (3 + 6) written or read, 4 · 8 predicted
    assert examiner().num_tokens == (5 * 9 + 4 * 8, 5 * 9)


def test_acceptance_is_a_paired_z() -> None:
    before = torch.tensor([2.0, 3.0, 4.0, 5.0])
    gains = torch.tensor([0.1, 0.3, 0.1, 0.3])
    found = acceptance(before, before - gains, required_z=2.0)
    # mean 0.2; standard deviation √(4 · 0.01 / 3) = 0.11547, over √4
    assert found.gain == pytest.approx(0.2, abs=1e-6)
    assert found.z == pytest.approx(0.2 / (0.11547 / 2), rel=1e-4)
    assert found.passed
    assert not acceptance(before, before - gains, required_z=4.0).passed
    assert not acceptance(before, before + gains, required_z=0.0).passed


def test_an_edit_that_changes_nothing_never_passes() -> None:
    losses = torch.tensor([2.0, 3.0])
    assert acceptance(losses, losses, required_z=0.0) == (0.0, 0.0, False)


def test_shares_of_rows_that_are_too_short_are_zero() -> None:
    rows = torch.tensor([[1, 2]])
    assert repeated_share(rows, length=4) == 0.0
    assert distinct_share(rows, length=3) == 0.0
