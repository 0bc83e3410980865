from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from preceptor.systems.surgery.config import OBJECTIVES, LearningOptions
from preceptor.systems.surgery.objective import judge, needs_referee


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    targets = torch.randint(5, (2, 3), generator=generator)
    return logits, targets, torch.rand(2, 3, 5, generator=generator).softmax(-1)


def judged(objective: str, logits: torch.Tensor, **options: float) -> tuple[torch.Tensor, float]:
    _, targets, referee = batch()
    learning = LearningOptions(**{"partial_reward": 0.0, "objective": objective, **options})
    given = referee if needs_referee(learning) else None
    return judge(logits, targets, referee_probs=given, learning=learning, generator=torch.Generator().manual_seed(1))


def test_who_asks_the_referee() -> None:
    asks = {name: needs_referee(LearningOptions(objective=name, partial_reward=0.0)) for name in OBJECTIVES}
    assert asks == {"sampled": False, "expected": False, "avatarl": True, "cross_entropy": False, "distil": True}
    partial = {name: needs_referee(LearningOptions(objective=name, partial_reward=0.1)) for name in OBJECTIVES}
    assert partial == asks | {"sampled": True, "expected": True}


def test_controls_are_their_textbook_losses() -> None:
    logits, targets, referee = batch()
    cross_entropy, _ = judged("cross_entropy", logits)
    assert cross_entropy.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    distil, _ = judged("distil", logits)
    expected = F.kl_div(logits.log_softmax(-1), referee, reduction="none").sum(-1).mean()  # KL(referee ‖ student)
    assert distil.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_reward_is_what_the_policy_earns_without_the_tax() -> None:
    # To catch: the penalty counted into the reported reward.
    logits, targets, referee = batch()
    probs = logits.softmax(-1)
    hit = probs.gather(-1, targets[..., None]).mean().item()
    partial = (probs * referee).sum(-1).mean().item()
    assert judged("cross_entropy", logits)[1] == pytest.approx(hit, rel=1e-5)
    assert judged("expected", logits, partial_reward=0.5)[1] == pytest.approx(hit + 0.5 * partial, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_position_of_every_sequence_teaches(objective: str) -> None:
    logits = batch()[0].requires_grad_()
    loss, _ = judged(objective, logits)
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_teaches_what_follows_what(objective: str) -> None:
    """After token t comes t + 1: every objective, with a referee who knows it too, finds that within 150 steps."""
    table = torch.zeros(5, 5, requires_grad=True)
    learning = LearningOptions(objective=objective, partial_reward=0.0, group_size=8)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam([table], lr=0.1)
    inputs = torch.arange(5).repeat(4)[None]
    targets = (inputs + 1) % 5
    referee = torch.full((1, 20, 5), 0.02).scatter(-1, targets[..., None], 0.92)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimiser.zero_grad()
        judge(table[inputs], targets, referee_probs=referee, learning=learning, generator=generator).loss.backward()
        optimiser.step()
    assert (table.softmax(-1).gather(1, targets[0, :5, None]) > 0.9).all()
