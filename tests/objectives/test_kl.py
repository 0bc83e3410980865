from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck

from preceptor.errors import CheckpointError, ConfigError, NumericError
from preceptor.objectives import AdaptiveKLController, kl_exact, kl_k1, kl_k2, kl_k3

INF = float("inf")
SEEDS = st.integers(0, 2**32 - 1)
VOCAB = 8


def random_logits(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- exact ----------------------------------------------------------------------------------------------------------


def test_exact_by_hand_names_its_direction():
    # Caught by planting: weights of q for those of p, in value and in direction.
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    # ½ ln(½ / ¼) + ½ ln(½ / ¾) and ¼ ln(¼ / ½) + ¾ ln(¾ / ½)
    assert kl_exact(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-14)
    assert kl_exact(q.log(), p.log()).item() == pytest.approx(-0.25 * math.log(2) + 0.75 * math.log(1.5), rel=1e-14)


@given(SEEDS, st.integers(1, 3), st.integers(1, 6))
def test_exact_equals_slow_reference_and_is_never_negative(seed, time, vocab):
    p_logits, q_logits = random_logits(seed, 2, time, vocab), random_logits(seed + 1, 2, time, vocab)
    result = kl_exact(p_logits, q_logits)
    for position in np.ndindex(2, time):
        p = np.exp(p_logits[position].numpy()) / np.exp(p_logits[position].numpy()).sum()
        q = np.exp(q_logits[position].numpy()) / np.exp(q_logits[position].numpy()).sum()
        slow = sum(p[v] * math.log(p[v] / q[v]) for v in range(vocab))
        assert result[position].item() == pytest.approx(slow, abs=1e-13)
    assert (result > -1e-14).all()
    assert kl_exact(p_logits, p_logits + 3.0).abs().max() < 1e-14  # one distribution, other logits


def test_exact_with_impossible_outcomes():
    p = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, -INF]], dtype=torch.float64)
    result = kl_exact(p, q)
    assert result.tolist() == [0.0, INF]  # excluded by both; excluded by the reference alone
    reversed_result = kl_exact(q, p)
    assert reversed_result[1].item() == pytest.approx(math.log(1.5), rel=1e-14)  # uniform over 2 against over 3
    alone = p.detach()[:1].requires_grad_()
    (gradient,) = grad(kl_exact(alone, q[:1] + torch.tensor([1.0, 0.0, 0.0])).sum(), alone)
    assert gradient.isfinite().all()
    assert gradient[0, 1] == 0.0
    assert gradient.abs().max() > 0.1


def test_mask_leaves_out_what_it_does_not_count():
    p, q = random_logits(0, 2, 3, 4), random_logits(1, 2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = kl_exact(p, q).masked_fill(~mask, 0.0)
    p[0, 1], q[1, 0] = float("nan"), INF
    p.requires_grad_()
    result = kl_exact(p, q, mask=mask)
    torch.testing.assert_close(result.detach(), expected, rtol=0, atol=0)
    (gradient,) = grad(result.sum(), p)
    assert gradient.isfinite().all()
    assert gradient[~mask].abs().max() == 0.0
    nothing = kl_exact(p, q, mask=torch.zeros_like(mask))
    assert nothing.abs().max() == 0.0
    assert grad(nothing.sum(), p)[0].abs().max() == 0.0


def test_what_q_alone_excludes_is_infinitely_far_however_unlikely():
    """exp(−200) is 0 in float32, and 0 · ∞ would be NaN."""
    p = torch.tensor([[0.0, -200.0], [0.0, -1.0], [0.0, -INF], [0.0, -1.0]], requires_grad=True)
    q = torch.tensor([[0.0, -INF], [0.0, -INF], [0.0, -INF], [0.0, 0.0]])
    found = kl_exact(p, q)
    assert found[:2].tolist() == [INF, INF]
    assert found[2].item() == 0.0
    assert found[3].item() == pytest.approx(0.1110, abs=1e-4)
    (gradient,) = grad(found[2:].sum(), p)
    assert gradient.isfinite().all()
    assert not gradient[:3].any()


def test_gradients_in_float64():
    p, q = random_logits(0, 2, 3, 4).requires_grad_(), random_logits(1, 2, 3, 4).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert gradcheck(lambda p, q: kl_exact(p, q, mask=mask), (p, q))
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert gradcheck(estimator, (p, q))


# --- estimators -----------------------------------------------------------------------------------------------------


def test_estimators_by_hand():
    # Caught by planting: q − p for p − q, k3 of the inverse ratio, k2 without its half.
    p, q = torch.tensor([0.5, 0.2], dtype=torch.float64), torch.tensor([0.25, 0.4], dtype=torch.float64)
    # ln 2 and −ln 2; ½ (ln 2)² twice; ½ − 1 + ln 2 and 2 − 1 − ln 2
    ln2 = math.log(2)
    np.testing.assert_allclose(kl_k1(p.log(), q.log()), [ln2, -ln2], rtol=1e-14)
    np.testing.assert_allclose(kl_k2(p.log(), q.log()), [ln2**2 / 2] * 2, rtol=1e-14)
    np.testing.assert_allclose(kl_k3(p.log(), q.log()), [ln2 - 0.5, 1 - ln2], rtol=1e-14)


def test_k3_keeps_its_digits_near_zero():
    # exp(x) − 1 − x is x²/2 for small x; written with exp it is 0 or rounding noise in float32.
    assert kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-12])).item() == pytest.approx(2**-25, rel=1e-3)


@given(SEEDS)
def test_means_over_all_outcomes(seed):
    p, q = torch.log_softmax(random_logits(seed, VOCAB), -1), torch.log_softmax(random_logits(seed + 1, VOCAB), -1)
    exact = kl_exact(p, q).item()
    assert (p.exp() * kl_k1(p, q)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (kl_k3(p, q) >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_the_estimators_by_enumeration(seed):
    """The table in the module's docstring: mean over p's samples, held fixed, of the gradient with respect to p."""
    logits = random_logits(seed, VOCAB).requires_grad_()
    q = torch.log_softmax(random_logits(seed + 100, VOCAB), -1)
    p = torch.log_softmax(logits, -1)
    sampled = p.detach().exp()  # the distribution of the samples, which carries no gradient

    def mean_gradient(per_outcome):
        return grad((sampled * per_outcome).sum(), logits, retain_graph=True)[0]

    reverse = grad(kl_exact(p, q), logits, retain_graph=True)[0]  # ∇KL(p‖q)
    forward = grad(kl_exact(q, p), logits, retain_graph=True)[0]  # ∇KL(q‖p)
    assert (reverse - forward).abs().max() > 1e-2  # the test can tell them apart

    assert mean_gradient(kl_k1(p, q)).abs().max() < 1e-14
    torch.testing.assert_close(mean_gradient(kl_k2(p, q)), reverse, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(mean_gradient(kl_k3(p, q)), forward, rtol=1e-10, atol=1e-14)
    # k1 in the reward: a score-function gradient with reward −k1 climbs, so it is −∇KL.
    torch.testing.assert_close(mean_gradient(-kl_k1(p, q).detach() * p), -reverse, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_kl_to_the_present_weights_has_no_gradient(seed):
    logits = random_logits(seed, VOCAB).requires_grad_()
    present = logits.detach().clone()
    assert kl_exact(logits, present).item() == pytest.approx(0.0, abs=1e-15)
    assert grad(kl_exact(logits, present), logits)[0].abs().max() < 1e-15


@pytest.mark.parametrize("seed", range(3))
def test_two_tokens_only_k1_in_the_reward_keeps_the_later_divergence(seed):
    """Two autoregressive choices of 4: per-token losses, even exact ones, miss how the first changes the second."""
    first, second = random_logits(seed, 4).requires_grad_(), random_logits(seed + 10, 4, 4).requires_grad_()
    q_first = torch.log_softmax(random_logits(seed + 20, 4), -1)
    q_second = torch.log_softmax(random_logits(seed + 30, 4, 4), -1)
    p_first, p_second = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    joint_p, joint_q = (p_first[:, None] + p_second).flatten(), (q_first[:, None] + q_second).flatten()
    sampled = joint_p.detach().exp()
    truth = grad((joint_p.exp() * (joint_p - joint_q)).sum(), (first, second), retain_graph=True)

    def errors(surrogate):
        gradients = grad(surrogate, (first, second), retain_graph=True)
        return [(g - t).abs().max().item() for g, t in zip(gradients, truth, strict=True)]

    reward_to_go = kl_k1(joint_p, joint_q).detach()
    assert max(errors((sampled * reward_to_go * joint_p).sum())) < 1e-14
    assert max(errors((sampled * kl_k2(joint_p, joint_q)).sum())) < 1e-14  # of the summed log-ratio
    per_token = kl_exact(p_first, q_first) + (p_first.detach().exp() * kl_exact(p_second, q_second)).sum()
    assert errors(per_token)[0] > 1e-2  # the first token's gradient is wrong
    assert errors(per_token)[1] < 1e-14  # the last token's is right


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (0.1, {"k1": (0.0, 20.0), "k2": (0.002, 1.42), "k3": (0.0, 1.42)}),
        (1.0, {"k1": (0.0, 2.0), "k2": (0.25, 1.73), "k3": (0.0, 1.7)}),
    ],
)
def test_schulmans_table(shift, expected):
    """Bias and deviation over the true KL, samples of N(0, 1) against N(shift, 1), joschu.net/blog/kl-approx."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = -x.square() / 2, -(x - shift).square() / 2  # one normaliser, which cancels
    weights = p.exp() / p.exp().sum()  # the integral over all samples, in place of so many draws
    true_kl = shift**2 / 2
    for name, estimator in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        estimates = estimator(p, q)
        mean = (weights * estimates).sum()
        deviation = (weights * (estimates - mean).square()).sum().sqrt()
        bias_expected, deviation_expected = expected[name]
        assert (mean.item() - true_kl) / true_kl == pytest.approx(bias_expected, abs=6e-4)  # as printed, rounded
        assert deviation.item() / true_kl == pytest.approx(deviation_expected, abs=6e-3)


# --- controller -----------------------------------------------------------------------------------------------------


def test_controller_by_hand():
    controller = AdaptiveKLController(coefficient=0.1, target=6.0, horizon=1000.0)
    controller.update(6.0, num_samples=100)  # on target
    assert controller.coefficient == 0.1
    controller.update(6.6, num_samples=100)  # 0.1 above: times 1 + 0.1 · 0.1
    assert controller.coefficient == pytest.approx(0.101, rel=1e-14)
    controller.update(600.0, num_samples=100)  # clipped to 0.2: times 1.02
    assert controller.coefficient == pytest.approx(0.101 * 1.02, rel=1e-14)
    controller.update(0.0, num_samples=500)  # clipped to −0.2: times 0.9
    assert controller.coefficient == pytest.approx(0.101 * 1.02 * 0.9, rel=1e-14)


def test_controller_holds_a_target():
    # A policy whose divergence is 1 / β: β must go to 1 / target.
    controller = AdaptiveKLController(coefficient=10.0, target=0.5, horizon=100.0)
    for _ in range(200):
        controller.update(1 / controller.coefficient, num_samples=20)
    assert controller.coefficient == pytest.approx(2.0, rel=1e-3)


def test_controller_stays_positive_however_many_samples_come_at_once():
    controller = AdaptiveKLController(coefficient=0.1, target=6.0, horizon=100.0)
    controller.update(0.0, num_samples=650)  # six horizons of −20 %, and half of one
    assert controller.coefficient == pytest.approx(0.1 * 0.8**6 * 0.9, rel=1e-14)
    controller.update(600.0, num_samples=200)
    assert controller.coefficient == pytest.approx(0.1 * 0.8**6 * 0.9 * 1.2**2, rel=1e-14)


def test_controller_state_and_errors():
    controller = AdaptiveKLController(coefficient=0.1, target=6.0, horizon=1000.0)
    controller.update(7.0, num_samples=64)
    resumed = AdaptiveKLController(coefficient=9.0, target=6.0, horizon=1000.0)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.coefficient == controller.coefficient
    with pytest.raises(CheckpointError, match="expected"):
        resumed.load_state_dict({})
    with pytest.raises(NumericError, match="divergence of nan"):
        resumed.update(float("nan"), num_samples=1)
    assert resumed.coefficient == controller.coefficient
    with pytest.raises(ConfigError) as caught:
        AdaptiveKLController(coefficient=0.0, target=-1.0, horizon=INF)
    assert len(caught.value.faults) == 3
