"""REINFORCE on words: by hand, against the enumerated gradient, and what the baselines subtract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import draw
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.policy import Vocabulary, decide
from preceptor.systems.bandit.prompts import prompts_for
from preceptor.systems.bandit.rewards import RewardBaseline, policy_gradient_loss


def test_the_loss_by_hand() -> None:
    """Two draws: −(2·ln 0.25 − 1·ln 0.75)/2 = 1.2425; its gradient in the chosen log-probabilities is −A/2."""
    log_probs = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log().requires_grad_()
    loss, metrics = policy_gradient_loss(log_probs, torch.tensor([0, 1]), torch.tensor([2.0, -1.0]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(-(2 * math.log(0.25) - math.log(0.75)) / 2)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 0.0], [0.0, 0.5]]
    assert metrics.entropy == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert metrics.kl is None


def test_bonus_and_penalty_by_hand() -> None:
    log_probs, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    loss, metrics = policy_gradient_loss(
        log_probs,
        torch.tensor([0]),
        torch.tensor([0.0]),
        entropy_coefficient=0.1,
        kl_coefficient=2.0,
        reference_log_probs=reference,
    )
    assert loss.item() == pytest.approx(-0.1 * entropy + 2 * kl, abs=1e-6)
    assert metrics.kl == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("words", [("red", "blue"), ("green", "brown")], ids=["one token", "several tokens"])
@pytest.mark.parametrize("kind", ["none", "leave_one_out"])
def test_the_mean_gradient_is_the_enumerated_one(lm: LanguageModel, words: tuple[str, str], kind: str) -> None:
    """20,000 draws through the policy, the bandit, the baseline and the loss, against ∇ Σ_a π(a) E[r | a].

    The difference must lie within three standard errors, in the direction of the exact gradient (one number, so that
    three standard errors mean what they say) and in norm (over all parameters, against its expectation).
    """
    bandit = Bandit("b", words, "bernoulli", 10.0, (0.75, 0.25))
    context = Vocabulary(lm, words).context(lm, prompts_for(words, ["Pick {options}:"])[0])
    parameters = list(lm.model.parameters())
    log_probs = decide(lm, [context]).log_probs
    expected_reward = (log_probs.exp() * bandit.expected.float()).sum()
    exact = flat(torch.autograd.grad(expected_reward, parameters, retain_graph=True))

    num_draws = 20_000
    generator = torch.Generator().manual_seed(2)
    batch = log_probs.expand(num_draws, 2)
    actions = draw(batch, generator)
    rewards = bandit.rewards(num_draws, generator).gather(1, actions[:, None])[:, 0]
    advantages = RewardBaseline(kind, ["b"]).advantages(rewards, "b")
    loss, _ = policy_gradient_loss(batch, actions, advantages)
    sampled = -flat(torch.autograd.grad(loss, parameters, retain_graph=True))

    # Every draw's own gradient is A·∇ln π(a), one of two vectors times a number.
    scores = torch.stack(
        [flat(torch.autograd.grad(log_probs[0, arm], parameters, retain_graph=True)) for arm in (0, 1)]
    )
    own = advantages[:, None] * torch.nn.functional.one_hot(actions, 2)  # coefficients of the two vectors
    covariance = torch.cov(own.T) / num_draws
    error = sampled - exact
    direction = exact / exact.norm()
    along = scores.double() @ direction.double()
    assert abs(float(error.double() @ direction.double())) < 3 * float((along @ covariance @ along).sqrt())
    expected_square = float((covariance * (scores.double() @ scores.double().T)).sum())
    assert float(error.norm()) < 3 * math.sqrt(expected_square)
    assert float(exact.norm()) > 10 * math.sqrt(expected_square)  # the test could tell a wrong sign or a wrong word


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_baselines_by_hand() -> None:
    first, second = torch.tensor([10.0, 0.0]), torch.tensor([1.0, 1.0])
    raw = RewardBaseline("none", ["a", "b"])
    assert raw.advantages(first, "a").tolist() == [10.0, 0.0]
    others = RewardBaseline("leave_one_out", ["a", "b"])
    assert others.advantages(first, "a").tolist() == [10.0, -10.0]
    assert others.advantages(second, "b").tolist() == [0.0, 0.0]
    everything = RewardBaseline("running_mean", ["a", "b"])
    assert everything.advantages(first, "a").tolist() == [10.0, 0.0]  # nothing was seen before
    assert everything.advantages(second, "b").tolist() == [-4.0, -4.0]  # the mean of 10 and 0
    own = RewardBaseline("bandit_mean", ["a", "b"])
    own.advantages(first, "a")
    assert own.advantages(second, "b").tolist() == [1.0, 1.0]
    assert own.advantages(first, "a").tolist() == [5.0, -5.0]


def test_a_baseline_goes_on_where_it_was() -> None:
    one, other = RewardBaseline("bandit_mean", ["a"]), RewardBaseline("bandit_mean", ["a"])
    one.advantages(torch.tensor([3.0, 4.0]), "a")
    other.load_state_dict(one.state_dict())
    assert other.advantages(torch.tensor([3.5]), "a").tolist() == [0.0]
