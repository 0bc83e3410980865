from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from preceptor.systems.surgery.config import OBJECTIVES, LearningOptions
from preceptor.systems.surgery.rewards import (
    Draws,
    Examiner,
    acceptance,
    distinct_share,
    draw_windows,
    needs_reference,
    next_token_logits,
    objective_loss,
    repeated_share,
    sample_continuations,
    window_losses,
)
from tests.systems.surgery.small import small_model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    targets = torch.randint(5, (2, 3), generator=generator)
    return logits, targets, torch.rand(2, 3, 5, generator=generator).softmax(-1)


def loss_and_reward(objective: str, logits: torch.Tensor, **options: float) -> tuple[torch.Tensor, float]:
    _, targets, reference = batch()
    learning = LearningOptions(**{"partial_reward": 0.0, **options})
    return objective_loss(
        logits,
        targets,
        objective=objective,
        reference_probs=reference if needs_reference(learning, objective) else None,
        learning=learning,
        generator=torch.Generator().manual_seed(1),
    )


def test_which_objectives_use_the_reference_model() -> None:
    asks = {name: needs_reference(LearningOptions(partial_reward=0.0), name) for name in OBJECTIVES}
    assert asks == {"sampled": False, "expected": False, "avatarl": True, "cross_entropy": False, "distil": True}
    partial = {name: needs_reference(LearningOptions(partial_reward=0.1), name) for name in OBJECTIVES}
    assert partial == asks | {"sampled": True, "expected": True}


def test_controls_are_their_textbook_losses() -> None:
    logits, targets, reference = batch()
    cross_entropy, _ = loss_and_reward("cross_entropy", logits)
    assert cross_entropy.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    distil, _ = loss_and_reward("distil", logits)
    expected = F.kl_div(logits.log_softmax(-1), reference, reduction="none").sum(-1).mean()  # KL(reference ‖ student)
    assert distil.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_reward_is_what_the_policy_earns_without_the_tax() -> None:
    # To catch: the penalty counted into the reported reward.
    logits, targets, reference = batch()
    probs = logits.softmax(-1)
    hit = probs.gather(-1, targets[..., None]).mean().item()
    partial = (probs * reference).sum(-1).mean().item()
    assert loss_and_reward("cross_entropy", logits)[1] == pytest.approx(hit, rel=1e-5)
    assert loss_and_reward("expected", logits, partial_reward=0.5)[1] == pytest.approx(hit + 0.5 * partial, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_position_of_every_sequence_teaches(objective: str) -> None:
    logits = batch()[0].requires_grad_()
    loss, _ = loss_and_reward(objective, logits)
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_teaches_what_follows_what(objective: str) -> None:
    """After token t comes t + 1: every objective finds that in 150 steps, with a reference model that knows it too."""
    table = torch.zeros(5, 5, requires_grad=True)
    learning = LearningOptions(partial_reward=0.0, group_size=8)
    optimizer = torch.optim.Adam([table], lr=0.1)
    inputs = torch.arange(5).repeat(4)[None]
    targets = (inputs + 1) % 5
    reference = torch.full((1, 20, 5), 0.02).scatter(-1, targets[..., None], 0.92)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = objective_loss(
            table[inputs],
            targets,
            objective=objective,
            reference_probs=reference,
            learning=learning,
            generator=generator,
        )
        loss.backward()
        optimizer.step()
    assert (table.softmax(-1).gather(1, targets[0, :5, None]) > 0.9).all()


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
    student, common = small_model(), draws()
    found = examiner().examine(student, common)
    continuations = sample_continuations(student, *common)
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
    student, prompts = small_model(), draws().prompts
    found = examiner().examine(student, Draws(prompts, torch.zeros(len(prompts), 12, dtype=torch.float64)))
    assert found.repetition == pytest.approx(8 / 9)
    assert found.distinct == pytest.approx(1 / (11 * len(prompts)))
    rest = found.log_prob + 0.5 * found.referee_log_prob + 2 * found.distinct
    assert found.total == pytest.approx(rest - 0.25 * 8 / 9, rel=1e-9)


def test_the_same_draws_give_the_same_quality_bit_for_bit() -> None:
    student, exam = small_model(), examiner()
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


def test_window_losses_are_the_means_of_each_row() -> None:
    student = small_model()
    windows = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = [F.cross_entropy(next_token_logits(student, row[None, :-1])[0], row[1:]).item() for row in windows]
    assert window_losses(student, windows).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_writing_draws_by_inversion_without_a_cache(architecture: str) -> None:
    # To catch: the distribution of the position before, and a strict inequality the wrong way round.
    student = small_model(architecture=architecture)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(7, (3, 4), generator=generator)
    noise = torch.rand(3, 8, dtype=torch.float64, generator=generator)
    written = sample_continuations(student, prompts, noise)
    for row in range(3):
        text = prompts[row].tolist()
        for step in range(8):
            probs = next_token_logits(student, torch.tensor([text]))[0, -1].detach().double().softmax(-1).tolist()
            cumulative, token = probs[0], 0
            while cumulative <= noise[row, step] and token < 6:
                token += 1
                cumulative += probs[token]
            text.append(token)
        assert written[row].tolist() == text[4:]


def test_written_tokens_follow_the_distribution() -> None:
    student = small_model()
    prompts = torch.full((4000, 1), 3)
    noise = torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(sample_continuations(student, prompts, noise)[:, 0], minlength=7) / 4000
    probs = next_token_logits(student, prompts[:1])[0, -1].softmax(-1).detach()
    assert (shares - probs).abs().max() < 4 * math.sqrt(0.25 / 4000)  # four standard errors


def test_windows_lie_anywhere_and_within_the_text() -> None:
    # To catch: the last window left out, and one beyond the end.
    windows = draw_windows(torch.arange(10), num_windows=500, length=8, generator=torch.Generator().manual_seed(0))
    assert windows.shape == (500, 8)
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    assert (windows.diff(dim=1) == 1).all()
