"""Each rule against a case worked by hand and a slow reference written from its formula."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from preceptor.objectives import (
    Ado,
    Difficulty,
    Exp3,
    LearningProgress,
    Mixture,
    SecondOrder,
    counted_loss,
    document_difficulty,
)
from preceptor.objectives.mixture_controls import forecast_fall


def difficulty(mean, *, variance=None, mean_error=None, variance_error=None) -> Difficulty:
    zeros = [0.0] * len(mean)
    values = (mean, variance or zeros, mean_error or zeros, variance_error or zeros)
    return Difficulty(*(torch.tensor(x, dtype=torch.float64) for x in values))


def script(num_updates: int, num_datasets: int, seed: int) -> list[Difficulty]:
    random = np.random.default_rng(seed)
    falling = 4 * np.exp(-np.outer(np.arange(num_updates), random.uniform(0, 0.3, num_datasets)))
    return [
        Difficulty(
            torch.from_numpy(falling[t] + 0.1 * random.standard_normal(num_datasets) + 1),
            torch.from_numpy(random.uniform(0.1, 0.5, num_datasets)),
            torch.from_numpy(random.uniform(0.0, 0.1, num_datasets)),
            torch.from_numpy(random.uniform(0.0, 0.05, num_datasets)),
        )
        for t in range(num_updates)
    ]


def array(difficulties: list[Difficulty], name: str) -> np.ndarray:
    return np.array([getattr(d, name).numpy() for d in difficulties])


def follow(rule, difficulties, *, exploration=0.1, tokens=None) -> np.ndarray:
    num_datasets = len(difficulties[0].mean)
    mixture = Mixture(rule, num_datasets=num_datasets, exploration=exploration)
    zeros = torch.zeros(num_datasets)
    return np.array(
        [mixture.update(d, tokens=zeros if tokens is None else tokens[i]).numpy() for i, d in enumerate(difficulties)]
    )


def counted(losses: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """The counted loss of every dataset from its whole history, one number at a time."""
    result = losses.copy()
    for column, history in enumerate(losses.T):
        for now in range(1, len(history)):
            new_ground = max(min(history[:now]) - history[now], 0.0)
            rise = max(history[now] - history[now - 1] - margin[now, column], 0.0)
            result[now, column] = result[now - 1, column] - new_ground + rise
    return result


# --- counted_loss -----------------------------------------------------------------------------------------------------


def test_relearning_earns_nothing():
    # 5 → 3 → 4 → 3 → 2, no margin: −2; then +1; then a fall to the best, 0; then 1 below it, −1.
    losses = torch.tensor([[5.0], [3.0], [4.0], [3.0], [2.0]], dtype=torch.float64)
    now, best, history = losses[0], losses[0], []
    for before, loss in itertools.pairwise(losses):
        now = counted_loss(loss, previous=before, best=best, counted=now, margin=torch.zeros(1))
        best = torch.minimum(best, loss)
        history.append(now.item())
    assert history == [3, 4, 4, 3]
    np.testing.assert_allclose(counted(losses.numpy(), np.zeros((5, 1)))[1:, 0], history)


def test_a_rise_within_the_margin_is_chance():
    one, half = torch.ones(1), torch.full((1,), 0.5)
    arguments = {"previous": one, "best": one, "counted": one}
    assert counted_loss(one + 0.5, margin=half, **arguments).item() == 1
    assert counted_loss(one + 0.75, margin=half, **arguments).item() == 1.25


@pytest.mark.parametrize("rule", [LearningProgress(doubt=0.0), SecondOrder(doubt=0.0)])
def test_forgetting_and_relearning_is_not_progress(rule):
    """The first is learned slowly; the second is forgotten and learned again by ten times as much, forever."""
    mixture = Mixture(rule, num_datasets=2)
    weights = []
    for update in range(40):
        swinging = [3.0, 4.0, 5.0, 4.0][update % 4]
        weights.append(mixture.update(difficulty([5 - 0.05 * update, swinging]), tokens=torch.zeros(2))[1].item())
    assert max(weights[8:]) < 0.1


def test_without_the_guard_relearning_was_paid():
    """The planted fault: what the guard of second_order takes away."""
    mixture = Mixture(SecondOrder(doubt=0.0, guard=0.0), num_datasets=2)
    weights = []
    for update in range(40):
        swinging = [3.0, 4.0, 5.0, 4.0][update % 4]
        weights.append(mixture.update(difficulty([5 - 0.05 * update, swinging]), tokens=torch.zeros(2))[1].item())
    assert max(weights[8:]) > 0.3


# --- second_order -----------------------------------------------------------------------------------------------------


def test_second_order_by_hand():
    # μ = 0.5, z = 1, d = 0, c = 2, metric m = mean + 2·variance.
    # First: m = (2 + 2·1, 3) = (4, 3), the average starts there, error 0. Weights (0.5, 0.5).
    # Then: m = (1 + 2·0.5, 3.4) = (2, 3.4), error (0.1 + 2·0.2, 0.2) = (0.5, 0.2).
    # v = 0.5·(4 − 2, 3 − 3.4) = (1, −0.2), σ_v = 0.5·(0.5, 0.2) = (0.25, 0.1), ṽ = (0.75, −0.1), u/Σ|u| = ṽ/0.85.
    # η = 1: (0.5 + 0.75/0.85, 0.5 − 0.1/0.85) = (1.382353, 0.382353), which sum to 1.764706.
    rule = SecondOrder(
        step_size=1.0, momentum=0.5, warm_up=0.0, variance_weight=2.0, threshold=1.0, doubt=0.0, guard=0.0
    )
    history = follow(
        rule,
        [
            difficulty([2.0, 3.0], variance=[1.0, 0.0]),
            difficulty([1.0, 3.4], variance=[0.5, 0.0], mean_error=[0.1, 0.2], variance_error=[0.2, 0.0]),
        ],
        exploration=0.0,
    )
    np.testing.assert_allclose(history, [[0.5, 0.5], [1.382353 / 1.764706, 0.382353 / 1.764706]], atol=1e-6)


def test_second_order_follows_its_sums():
    """The average and the velocity as sums over all measurements, the error from their coefficients."""
    mu, step, c, z, d, warm_up = 0.7, 0.4, 0.5, 1.3, 0.2, 1.5
    difficulties = script(12, 4, seed=0)
    metric = array(difficulties, "mean") + c * array(difficulties, "variance")
    error = array(difficulties, "mean_error") + c * array(difficulties, "variance_error")
    weights, expected = np.full(4, 0.25), [np.full(4, 0.25)]
    average = np.eye(12)[0]  # the coefficient of each measurement
    for now in range(1, 12):
        rate = max(0.3, 1.5 / (now + 1.5))
        coefficients = rate * (average - np.eye(12)[now])
        average = average - coefficients
        velocity, sigma = coefficients @ metric, np.sqrt(coefficients**2 @ error**2)
        beyond = np.sign(velocity) * np.maximum(np.abs(velocity) - z * sigma, 0)
        force = beyond + d * sigma.mean()
        weights = np.maximum(weights + step * force / np.abs(force).sum(), 0)
        weights /= weights.sum()
        expected.append(0.9 * weights + 0.1 / 4)
    rule = SecondOrder(step_size=step, momentum=mu, warm_up=warm_up, variance_weight=c, threshold=z, doubt=d, guard=0.0)
    np.testing.assert_allclose(follow(rule, difficulties), expected, atol=1e-12)


def test_second_order_velocity_is_a_smoothed_difference():
    """Without warm-up: v ← μ·v + (1 − μ)·(m_before − m_now), the formula of momentum."""
    mu, difficulties = 0.6, script(10, 3, seed=5)
    metric = array(difficulties, "mean")
    velocity, weights, expected = np.zeros(3), np.full(3, 1 / 3), [np.full(3, 1 / 3)]
    for before, now in itertools.pairwise(metric):
        velocity = mu * velocity + (1 - mu) * (before - now)
        weights = np.maximum(weights + 0.5 * velocity / np.abs(velocity).sum(), 0)
        weights /= weights.sum()
        expected.append(weights)
    rule = SecondOrder(momentum=mu, warm_up=0.0, variance_weight=0.0, threshold=0.0, doubt=0.0, guard=0.0)
    np.testing.assert_allclose(follow(rule, difficulties, exploration=0.0), expected, atol=1e-12)


def test_second_order_falls_back_when_all_is_clipped():
    mixture = Mixture(SecondOrder(step_size=5.0, guard=0.0), num_datasets=2)
    mixture.update(difficulty([1.0, 1.0]), tokens=torch.zeros(2))
    assert not mixture.fell_back
    # Both get worse: both are pushed below 0.
    assert mixture.update(difficulty([2.0, 2.0]), tokens=torch.zeros(2)).tolist() == [0.5, 0.5]
    assert mixture.fell_back
    mixture.update(difficulty([1.0, 2.0]), tokens=torch.zeros(2))
    assert not mixture.fell_back


def test_second_order_drifts_back_to_uniform_when_nothing_moves():
    mixture = Mixture(SecondOrder(), num_datasets=2, exploration=0.0)
    for mean in [3.0, 2.0, 1.0]:
        mixture.update(difficulty([mean, 5.0]), tokens=torch.zeros(2))
    favoured = mixture.weights[0]
    for _ in range(60):  # the velocity, too, needs time to fade
        mixture.update(difficulty([1.0, 5.0], mean_error=[0.1, 0.1]), tokens=torch.zeros(2))
    assert favoured > 0.6
    assert mixture.weights[0].item() == pytest.approx(0.5, abs=0.01)


# --- learning_progress ------------------------------------------------------------------------------------------------


def test_learning_progress_by_hand():
    # fast 0.5, slow 0.25, z = 1, d = 0, no share. First: both averages (4, 3), both variances and the covariance 0.04
    # (error 0.2), so the progress is 0 and its error √(0.04 + 0.04 − 0.08) = 0: nothing is preferred, weights uniform.
    # Then mean (2, 3), error (0.4, 0): fast (3, 3), slow (3.5, 3), progress (0.5, 0).
    # Error of the first: fast variance 0.25·0.04 + 0.25·0.16 = 0.05, slow 0.5625·0.04 + 0.0625·0.16 = 0.0325,
    # covariance 0.375·0.04 + 0.125·0.16 = 0.035, √(0.05 + 0.0325 − 0.07) = 0.111803. Beyond: 0.388197.
    # Third mean (2, 2), error 0: fast (2.5, 2.5), slow (3.125, 2.75), progress (0.625, 0.25); errors, first: fast
    # 0.25·0.05 = 0.0125, slow 0.5625·0.0325 = 0.018281, covariance 0.375·0.035 = 0.013125, √0.004531 = 0.067315;
    # second: 0.25·0.25·0.04 = 0.0025, 0.5625²·0.04 = 0.012656, 0.375²·0.04 = 0.005625, √0.003906 = 0.0625.
    # Beyond (0.557685, 0.1875), over their sum 0.745185.
    rule = LearningProgress(fast=0.5, slow=0.25, warm_up=0.0, threshold=1.0, doubt=0.0, share_exponent=0.0)
    history = follow(
        rule,
        [
            difficulty([4.0, 3.0], mean_error=[0.2, 0.2]),
            difficulty([2.0, 3.0], mean_error=[0.4, 0.0]),
            difficulty([2.0, 2.0]),
        ],
        exploration=0.0,
    )
    np.testing.assert_allclose(history, [[0.5, 0.5], [1, 0], [0.557685 / 0.745185, 0.1875 / 0.745185]], atol=1e-6)


def test_learning_progress_follows_its_sums():
    """Each average as a sum over all measurements, the error of their difference from its coefficients."""
    z, d, exponent, warm_up = 0.8, 0.15, 0.4, 2.0
    difficulties = script(12, 4, seed=1)
    error = array(difficulties, "mean_error")
    mean = counted(array(difficulties, "mean"), 2 * z * error)

    def coefficients(rates: list[float]) -> np.ndarray:
        """Of each measurement in the average that begins with the first and moves towards the others by ``rates``."""
        later = [rate * np.prod([1 - r for r in rates[place + 1 :]]) for place, rate in enumerate(rates)]
        return np.array([np.prod([1 - rate for rate in rates]), *later])

    slow = [max(0.2, warm_up / (now + warm_up)) for now in range(1, 12)]
    fast = [min(1.0, max(0.6, 2 * warm_up / (now + warm_up))) for now in range(1, 12)]
    assert slow[0] > 0.2 == slow[-1]
    assert fast[0] == 1.0 > fast[4] == 0.6
    weights, share, expected = np.full(4, 0.25), np.full(4, 0.25), [np.full(4, 0.25)]
    for now in range(1, 12):
        difference = coefficients(slow[:now]) - coefficients(fast[:now])
        progress = difference @ mean[: now + 1]
        sigma = np.sqrt(difference**2 @ error[: now + 1] ** 2)
        share = share + slow[now - 1] * (weights - share)
        preference = (np.maximum(progress - z * sigma, 0) + d * sigma.mean()) / share**exponent
        weights = 0.9 * preference / preference.sum() + 0.1 / 4
        expected.append(weights)
    rule = LearningProgress(fast=0.6, slow=0.2, warm_up=warm_up, threshold=z, doubt=d, share_exponent=exponent)
    np.testing.assert_allclose(follow(rule, difficulties), expected, atol=1e-12)


def test_second_order_starts_from_shares_of_the_mixture():
    assert SecondOrder().initial_state(4)["position"].tolist() == [0.25] * 4


def test_learning_progress_says_that_nothing_is_learnt():
    mixture = Mixture(LearningProgress(), num_datasets=2)
    for _ in range(3):
        mixture.update(difficulty([2.0, 5.0]), tokens=torch.zeros(2))
    assert mixture.fell_back
    assert mixture.weights.tolist() == [0.5, 0.5]


# --- exp3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "low", "high"), [("fresh", 0.01, 0.04), ("same", 0.01, 0.05), ("walk", 0.30, 0.40)])
def test_how_often_learning_progress_sees_what_is_not_there(noise: str, low: float, high: float) -> None:
    """The three figures of its docstring, over 40 runs of 40 measurements of four datasets of 32 documents."""
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(40):
        rule = LearningProgress(doubt=0.0, share_exponent=0.0)
        state, previous, walk = rule.initial_state(4), None, np.zeros((4, 32))
        level = rng.normal(3, 1, size=(4, 32))
        for n in range(40):
            step = rng.normal(0, 0.1, size=(4, 32))
            walk = walk + step
            drawn = {"fresh": rng.normal(3, 1, size=(4, 32)), "same": level + step, "walk": level + walk}[noise]
            losses = [torch.tensor(values) for values in drawn]
            measured = document_difficulty(losses, previous=None if noise == "fresh" else previous or losses)
            found, state = rule.preferences(
                measured, state, tokens=torch.ones(4), weights=torch.full((4,), 0.25), num_updates=n
            )
            previous = losses
            seen += (found > 0).tolist() if n >= 20 else []
    assert low < sum(seen) / len(seen) < high


def test_exp3_by_hand():
    # K = 2, α = 0.5. E_t = min(1/2, √(ln 2 / 2t)): 0.5 for t = 1, √(0.346574/2) = 0.416277 for t = 2.
    # t = 1, both trained on: R = 0.5·(3/0.5, 1/0.5) = (3, 1); w = (1 − 2·0.5)·… + 0.5 = 0.5 each.
    # t = 2, only the second trained on: R = (3, 0.5·1 + 0.5·2/0.5) = (3, 2.5);
    # w = (1 − 0.832555)·softmax(0.5·R) + 0.416277, softmax = 1/(1 + e^(−0.25)) = 0.562177.
    rule = Exp3(smoothing=0.5)
    tokens = torch.tensor([[8.0, 8.0], [0.0, 8.0]])
    history = follow(rule, [difficulty([3.0, 1.0]), difficulty([9.0, 2.0])], exploration=0.0, tokens=tokens)
    first = 0.167445 * 0.562177 + 0.416277
    np.testing.assert_allclose(history, [[0.5, 0.5], [first, 1 - first]], atol=1e-6)


def test_exp3_is_uniform_until_k_ln_k():
    history = follow(Exp3(), [difficulty([5.0, 1.0, 1.0, 1.0])] * 12, tokens=torch.ones(12, 4), exploration=0.0)
    moved = np.abs(history - 0.25).max(1) > 1e-9
    assert moved.tolist() == [update > 4 * math.log(4) for update in range(1, 13)]


# --- ado --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(1.0, 3.0, 0.3), (0.0, 5.0, 0.75), (2.0, 0.5, 0.1)])
def test_forecast_recovers_a_law(floor, scale, exponent):
    tokens = torch.arange(1, 30, dtype=torch.float64) * 700
    losses = floor + scale * tokens**-exponent
    expected = exponent * scale * tokens[-1] ** -exponent
    assert forecast_fall(losses[:, None], tokens).item() == pytest.approx(expected.item(), rel=1e-6)


def test_forecast_is_least_squares():
    random = np.random.default_rng(0)
    tokens = np.arange(1, 21) * 100.0
    losses = 1.5 + 2 * tokens**-0.4 + 0.05 * random.standard_normal(20)
    best = None
    for exponent in np.arange(0.05, 0.801, 0.01):
        design = np.stack([np.ones(20), tokens**-exponent], axis=1)
        solution, *_ = np.linalg.lstsq(design, losses, rcond=None)
        error = ((design @ solution - losses) ** 2).sum()
        if solution.min() >= 0 and (best is None or error < best[0]):
            best = error, exponent * solution[1] * tokens[-1] ** -exponent
    fitted = forecast_fall(torch.from_numpy(losses)[:, None], torch.from_numpy(tokens))
    assert fitted.item() == pytest.approx(best[1], rel=1e-9)


def test_forecast_of_what_does_not_fall_is_nothing():
    tokens = torch.arange(1, 11, dtype=torch.float64)
    flat, rising = torch.full((10,), 3.0, dtype=torch.float64), 1 + tokens / 10
    fall = forecast_fall(torch.stack([flat, rising], dim=1), tokens)
    assert fall[1] == 0
    assert fall[0] < 1e-12


def test_forecast_keeps_the_floor_at_zero():
    # A straight fall: the law that fits it best would have a floor below 0, where no loss can end.
    tokens = np.arange(1.0, 11.0)
    losses = 3 - 0.2 * tokens
    fits = []
    for exponent in np.arange(0.05, 0.801, 0.01):
        (floor, scale), residual = nnls(np.stack([np.ones(10), tokens**-exponent], axis=1), losses)
        fits.append((residual, floor, exponent * scale * tokens[-1] ** -exponent))
    _, floor, expected = min(fits)
    assert floor == 0
    forecast = forecast_fall(torch.from_numpy(losses)[:, None], torch.from_numpy(tokens))
    assert forecast.item() == pytest.approx(expected, rel=1e-9)


def test_ado_by_hand():
    # Laws 1 + 2·n^(−0.5) and 3 + 4·n^(−0.25) at n = 64, 128, 192 in all; at the last the forecast falls are
    # 0.5·2·192^(−0.5) = 0.0721688 and 0.25·4·192^(−0.25) = 0.2686423.
    # Shares: prior (0.75, 0.25), and with rate 0.5 towards tokens (0.5, 0.5): (0.625, 0.375), (0.5625, 0.4375),
    # (0.53125, 0.46875). Preference: 0.75·√0.53125·0.0721688 = 0.0394511 and 0.25·√0.46875·0.2686423 = 0.0459817;
    # over their sum: ρ = (0.461780, 0.538220); w = 0.4·ρ + 0.6·prior.
    totals = torch.tensor([64.0, 128.0, 192.0], dtype=torch.float64)
    losses = torch.stack([1 + 2 * totals**-0.5, 3 + 4 * totals**-0.25], dim=1)
    rule = Ado(prior=(0.75, 0.25), mixing=0.4, history_rate=0.5, min_points=3)
    tokens = torch.full((3, 2), 32.0)
    history = follow(rule, [difficulty(row.tolist()) for row in losses], exploration=0.0, tokens=tokens)
    np.testing.assert_allclose(history[:2], 0.5)  # too few points for a fit: as they were
    np.testing.assert_allclose(history[2], [0.4 * 0.461780 + 0.6 * 0.75, 0.4 * 0.538220 + 0.6 * 0.25], atol=1e-6)


def test_ado_waits_for_training():
    history = follow(Ado(min_points=3), [difficulty([3.0, 1.0])] * 8)
    np.testing.assert_allclose(history, 0.5)
