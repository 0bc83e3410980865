from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from preceptor.errors import ConfigError
from preceptor.objectives import avatarl_loss, expected_reward_loss, next_token_rewards, sampled_reward_loss

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, *, batch=2, time=3, vocab=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, time, vocab))
    targets = rng.integers(vocab, size=(batch, time))
    referee = rng.dirichlet(np.ones(vocab), size=(batch, time))
    return logits, targets, referee


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


# --- rewards --------------------------------------------------------------------------------------------------------


def test_rewards_by_hand():
    # Caught by planting: the penalty without (1 + c).
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    referee = torch.tensor([[[0.1, 0.8, 0.1]]])
    rewards = next_token_rewards(
        logits, torch.tensor([[2]]), referee_probs=referee, partial_reward=0.5, confidence_penalty=1.0
    )
    # 0 + 0.5·0.1 − 1.5·0.5; 0 + 0.5·0.8 − 1.5·0.3; 1 + 0.5·0.1 − 1.5·0.2
    np.testing.assert_allclose(rewards[0, 0], [-0.7, -0.05, 0.75], atol=1e-6)


@given(SEEDS, st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_rewards_equal_a_slow_reference(seed, partial, penalty):
    logits, targets, referee = drawn(seed)
    expected = np.zeros_like(logits)
    for place in np.ndindex(targets.shape):
        for token in range(logits.shape[-1]):
            expected[(*place, token)] = (
                float(token == targets[place])
                + partial * referee[(*place, token)]
                - penalty * (1 + partial) * softmax(logits)[(*place, token)]
            )
    rewards = next_token_rewards(
        torch.tensor(logits),
        torch.tensor(targets),
        referee_probs=torch.tensor(referee),
        partial_reward=partial,
        confidence_penalty=penalty,
    )
    np.testing.assert_allclose(rewards, expected, atol=1e-12)


def ascend(truth, referee, *, partial, penalty, steps=4000):
    """The policy that gradient ascent on the expected reward ends at, the true token drawn from ``truth`` each time."""
    vocab = len(truth)
    logits = torch.zeros(1, vocab, vocab, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(vocab)[None]  # one position for each true token, weighted below by its chance
    optimiser = torch.optim.SGD([logits], lr=1.0)
    for _ in range(steps):
        tied = logits[:, :1].expand(1, vocab, vocab)
        rewards = next_token_rewards(
            tied,
            targets,
            referee_probs=torch.tensor(referee).expand(1, vocab, vocab),
            partial_reward=partial,
            confidence_penalty=penalty,
        )
        weighted = (rewards * torch.tensor(truth)[None, :, None]).sum(1, keepdim=True)
        optimiser.zero_grad()
        expected_reward_loss(logits[:, :1], weighted).backward()
        optimiser.step()
    return softmax(logits.detach().numpy())[0, 0]


def test_the_penalised_reward_is_maximised_by_the_true_distribution():
    # Caught by planting: half the penalty, whose optimum is sharper than the truth.
    truth, referee = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    np.testing.assert_allclose(ascend(truth, referee, partial=0.0, penalty=1.0), truth, atol=1e-4)


def test_with_a_referee_it_is_maximised_by_the_mixture():
    truth, referee = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    mixture = (truth + 0.5 * referee) / 1.5
    np.testing.assert_allclose(ascend(truth, referee, partial=0.5, penalty=1.0), mixture, atol=1e-4)


def test_without_the_penalty_it_is_maximised_by_one_token():
    found = ascend(np.array([0.5, 0.3, 0.2]), np.full(3, 1 / 3), partial=0.0, penalty=0.0)
    assert found[0] > 0.99


def test_rewards_carry_no_gradient():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    assert not next_token_rewards(logits, torch.tensor([[0]])).requires_grad


def test_losses_carry_no_gradient_into_the_rewards():
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rewards = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    samples = torch.tensor([[[0, 1, 2], [2, 2, 0]]])
    for loss in (expected_reward_loss(logits, rewards), sampled_reward_loss(logits, rewards, samples=samples)):
        loss.backward()
    assert rewards.grad is None
    assert logits.grad is not None


def test_a_partial_reward_needs_a_referee():
    with pytest.raises(ConfigError, match="needs the referee"):
        next_token_rewards(torch.zeros(1, 1, 3), torch.tensor([[0]]), partial_reward=0.1)


# --- expected and sampled -------------------------------------------------------------------------------------------


@given(SEEDS)
def test_expected_gradient_is_the_policy_gradient(seed):
    # Caught by planting: the sign, and gradient into the rewards.
    logits, targets, _ = drawn(seed)
    tensor = torch.tensor(logits, requires_grad=True)
    rewards = next_token_rewards(tensor, torch.tensor(targets))
    expected_reward_loss(tensor, rewards).backward()
    probs, values = softmax(logits), rewards.numpy()
    baseline = (probs * values).sum(-1, keepdims=True)
    np.testing.assert_allclose(tensor.grad, -probs * (values - baseline) / targets.size, atol=1e-12)


def test_expected_gradient_against_finite_differences():
    logits, _, _ = drawn(3)
    rewards = torch.tensor(drawn(4)[0])
    tensor = torch.tensor(logits, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: expected_reward_loss(z, rewards), [tensor])


def test_the_penalised_gradient_is_that_of_the_quadratic_score():
    logits, targets, _ = drawn(5)
    ours = torch.tensor(logits, requires_grad=True)
    expected_reward_loss(ours, next_token_rewards(ours, torch.tensor(targets))).backward()
    brier = torch.tensor(logits, requires_grad=True)
    probs = brier.softmax(-1)
    hit = F.one_hot(torch.tensor(targets), logits.shape[-1])
    (0.5 * (probs - hit).square().sum(-1).mean()).backward()  # ½‖π − e_y‖² = ½ + ½‖π‖² − π(y)
    np.testing.assert_allclose(ours.grad, brier.grad, atol=1e-12)


def test_leave_one_out_samples_estimate_the_expectation():
    # Caught by planting: the log-probabilities of another position's samples.
    logits, targets, _ = drawn(6, batch=1, time=2, vocab=3)
    tensor = torch.tensor(logits, requires_grad=True)
    rewards = next_token_rewards(tensor, torch.tensor(targets))
    expected_reward_loss(tensor, rewards).backward()
    exact = tensor.grad.clone()
    tensor.grad = None
    generator = torch.Generator().manual_seed(0)
    probs = tensor.detach().softmax(-1)[0]
    samples = torch.multinomial(probs, 200_000, replacement=True, generator=generator)[None]
    groups = samples.view(1, 2, 50_000, 4)
    for_each_group = tensor.expand(50_000, 2, 3)
    loss = sampled_reward_loss(
        for_each_group, rewards.expand(50_000, 2, 3), samples=groups[0].transpose(0, 1), advantage="leave_one_out"
    )
    loss.backward()
    # The standard error of 200,000 samples of numbers below 1 is 0.002 at most.
    np.testing.assert_allclose(tensor.grad, exact, atol=0.008)


def test_sampled_loss_by_hand():
    logits = torch.zeros(1, 1, 4)
    rewards, samples = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[0, 1, 2]]])
    # advantages 1, −½, −½ sum to 0, and every log-probability is −ln 4
    assert sampled_reward_loss(logits, rewards, samples=samples).item() == pytest.approx(0.0, abs=1e-7)
    logits = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    # ln π = 1 − ln(e + 3), −ln(e + 3) twice: −(1·1) / 3
    assert sampled_reward_loss(logits, rewards, samples=samples).item() == pytest.approx(-1 / 3, abs=1e-6)


def test_equal_rewards_of_a_group_teach_nothing():
    for advantage in ("leave_one_out", "group_normalised"):
        logits = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        samples = torch.tensor([[[1, 2, 3]]])
        loss = sampled_reward_loss(logits, torch.tensor([[[1.0, 0, 0, 0]]]), samples=samples, advantage=advantage)
        loss.backward()
        assert logits.grad.abs().max() == 0


def test_another_advantage_is_refused():
    with pytest.raises(ConfigError, match="leave_one_out, group_normalised, got 'gae'"):
        sampled_reward_loss(
            torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), samples=torch.zeros(1, 1, 2, dtype=torch.long), advantage="gae"
        )


# --- avatarl --------------------------------------------------------------------------------------------------------


def test_avatarl_by_hand():
    # Reality (0.9, 0.05, 0.05), referee (0.25, 0.5, 0.25), w = ½: √0.225 = 0.4743, √0.025 = 0.1581, √0.0125 = 0.1118;
    # the mean is 0.24809, so only the first stays, scaled to 1.5.
    logits = torch.tensor([[[1.0, 0.0, 0.0]]])
    loss = avatarl_loss(
        logits,
        torch.tensor([[0]]),
        referee_probs=torch.tensor([[[0.25, 0.5, 0.25]]]),
        reality_exponent=0.5,
    )
    assert loss.item() == pytest.approx(-1.5 * (1 - np.log(np.e + 2)), abs=1e-5)


@given(SEEDS)
def test_avatarl_equals_a_slow_reference(seed):
    # Caught by planting: exponents swapped, and the threshold left out.
    logits, targets, referee = drawn(seed)
    total = 0.0
    for place in np.ndindex(targets.shape):
        vocab = logits.shape[-1]
        reality = [0.9 if token == targets[place] else 0.1 / (vocab - 1) for token in range(vocab)]
        mixed = [reality[token] ** 0.7 * referee[(*place, token)] ** 0.3 for token in range(vocab)]
        kept = [value if value > sum(mixed) / vocab else 0.0 for value in mixed]
        log_probs = np.log(softmax(logits)[place])
        total -= sum(1.5 * value / max(kept) * log_probs[token] for token, value in enumerate(kept))
    loss = avatarl_loss(torch.tensor(logits), torch.tensor(targets), referee_probs=torch.tensor(referee))
    assert loss.item() == pytest.approx(total / targets.size, rel=1e-9)
