"""What is recorded is what is sampled, against a slow reference that sorts and adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from preceptor.errors import ConfigError, NumericError
from preceptor.lm.sampling import Sampling, draw


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(
    logits: Sequence[float], sampling: Sampling, *, on_edge: Callable[[], object] | None = None
) -> list[float]:
    """Probabilities of one row, in Python floats."""
    live = [index for index in range(len(logits)) if index not in sampling.suppressed]
    if sampling.temperature == 0:
        best = max(live, key=lambda index: (logits[index], -index))
        return [float(index == best) for index in range(len(logits))]
    if sampling.top_k:
        edge = sorted((logits[index] for index in live), reverse=True)[: sampling.top_k][-1]
        live = [index for index in live if logits[index] >= edge]
    highest = max(logits[index] for index in live)
    weights = {index: math.exp((logits[index] - highest) / sampling.temperature) for index in live}
    total, before, kept = sum(weights.values()), 0.0, []
    for index in sorted(live, key=lambda index: (-logits[index], index)):
        # Sums in float32 may fall on either side of an edge that lies within their rounding.
        if on_edge is not None and abs(before / total - sampling.top_p) < 1e-5:
            on_edge()
        if before / total < sampling.top_p:
            kept.append(index)
        before += weights[index]
    total = sum(weights[index] for index in kept)
    return [weights[index] / total if index in kept else 0.0 for index in range(len(logits))]


logits_rows = st.lists(st.integers(-8, 8).map(lambda number: number / 2), min_size=3, max_size=12)  # many ties
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.77, 0.999, 1.0]),
    suppressed=st.sampled_from([(), (0,), (0, 2)]),
)


@given(logits_rows, samplings)
def test_log_probs_equal_the_slow_reference(logits: list[float], sampling: Sampling) -> None:
    expected = torch.tensor(reference(logits, sampling, on_edge=reject), dtype=torch.float64)
    actual = sampling.log_probs(torch.tensor([logits])).double()[0]
    # float32 log-softmax of a dozen numbers of magnitude 30
    torch.testing.assert_close(actual.exp(), expected, atol=1e-6, rtol=1e-5)
    assert (actual == -math.inf).tolist() == (expected == 0).tolist()
    assert float(actual.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_a_case_by_hand() -> None:
    """Logits ln 8, ln 4, ln 2, ln 1, ln 1: probabilities 8, 4, 2, 1, 1 sixteenths."""
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log()

    def probabilities(**settings: float) -> list[float]:
        return Sampling(**settings).log_probs(logits).exp().tolist()

    def shares(*weights: float) -> object:
        return pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6)

    assert probabilities() == shares(8, 4, 2, 1, 1)
    assert probabilities(top_k=2) == shares(8, 4, 0, 0, 0)
    assert probabilities(top_k=4) == shares(8, 4, 2, 1, 1)  # the fourth and fifth tie
    assert probabilities(top_p=0.4) == shares(8, 0, 0, 0, 0)  # the first alone reaches it
    assert probabilities(top_p=0.6) == shares(8, 4, 0, 0, 0)
    assert probabilities(top_p=0.9) == shares(8, 4, 2, 1, 0)  # of two that tie, the first
    assert probabilities(top_k=2, top_p=0.66) == shares(8, 0, 0, 0, 0)  # two thirds of what top-k left
    assert probabilities(temperature=0.5) == shares(64, 16, 4, 1, 1)  # half the temperature squares
    assert Sampling(suppressed=(0,)).log_probs(logits).exp().tolist() == shares(0, 4, 2, 1, 1)


def test_top_p_stops_where_it_is_reached_exactly() -> None:
    """Four tokens of probability 1/4: two of them reach one half, and the third is not needed."""
    log_probs = Sampling(top_p=0.5).log_probs(torch.zeros(4))
    assert log_probs.isfinite().tolist() == [True, True, False, False]


def test_top_p_keeps_at_least_the_most_probable_token() -> None:
    log_probs = Sampling(top_p=1e-9).log_probs(torch.zeros(2, 7))
    assert log_probs.exp().tolist() == [[1, 0, 0, 0, 0, 0, 0]] * 2


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[1.0, 30.0, 29.0]])
    assert Sampling(temperature=1e-38).log_probs(logits).exp().tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, suppressed=(1,)),
        Sampling(top_k=3),
        Sampling(temperature=1.5, top_k=5, top_p=0.8, suppressed=(0, 3)),
    ],
    ids=str,
)
def test_draws_follow_the_recorded_distribution(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws; the seed is fixed, so the p-value is the same every time."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.9, 0.0, -0.5, 1.0, -3.0])
    expected = torch.tensor(reference(logits.tolist(), sampling), dtype=torch.float64)
    log_probs = sampling.log_probs(logits).expand(20_000, -1)
    counts = draw(log_probs, seeded()).bincount(minlength=8).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], 20_000 * expected[possible]).pvalue > 0.01


def test_draws_invert_the_cumulative_distribution() -> None:
    """The uniform numbers of the generator, drawn again, name the tokens by hand: edges 0.2, 0.2, 0.7, 1."""
    log_probs = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(1_000, -1)
    uniform = torch.rand(1_000, 1, dtype=torch.float64, generator=seeded(4))[:, 0].tolist()
    expected = [0 if number < 0.2 else 2 if number < 0.7 else 3 for number in uniform]
    assert draw(log_probs, seeded(4)).tolist() == expected
    assert draw(log_probs, seeded(5)).tolist() != expected


def test_a_broken_distribution_is_refused() -> None:
    for row in ([math.nan, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(NumericError, match="NaN or empty"):
            draw(torch.tensor([[0.0, -1.0], row]), seeded())


def test_a_drawn_token_keeps_its_probability() -> None:
    """A rounding error has moved the drawn token just below the edge of the truncation."""
    moved = torch.tensor([[2.0, 1.0, 1.0 - 1e-6, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.7), Sampling(temperature=0.0)):
        assert sampling.log_probs(moved)[0, 2] == -math.inf
        kept = sampling.log_probs(moved, drawn=torch.tensor([2]))
        assert kept[0, 2] > -3
        assert float(kept.exp().sum()) == pytest.approx(1)
    # A drawn token inside the truncation changes nothing.
    sampling = Sampling(top_k=2)
    assert torch.equal(sampling.log_probs(moved, drawn=torch.tensor([0])), sampling.log_probs(moved))


def test_gradient_is_that_of_the_truncated_softmax() -> None:
    """∂ ln p(i) / ∂ logits = (1[i] − p) / temperature over what is kept, and 0 elsewhere; in float64."""
    sampling = Sampling(temperature=0.5, top_k=3, suppressed=(1,))
    logits = torch.tensor([0.3, 9.0, 1.0, -0.2, 0.7, -1.0], dtype=torch.float64, requires_grad=True)
    log_probs = sampling.log_probs(logits)
    log_probs[4].backward()
    expected = (torch.eye(6, dtype=torch.float64)[4] - log_probs.detach().exp()) / 0.5
    torch.testing.assert_close(logits.grad, expected)
    assert logits.grad[[1, 3, 5]].tolist() == [0, 0, 0]


def test_leading_axes_are_free() -> None:
    logits = torch.randn(2, 3, 9, generator=seeded())
    sampling = Sampling(top_k=4, top_p=0.9, suppressed=(2,))
    together = sampling.log_probs(logits)
    apart: list[Tensor] = [sampling.log_probs(row) for row in logits.flatten(0, 1)]
    assert torch.equal(together.flatten(0, 1), torch.stack(apart))


def test_values_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1.0, top_k=-2, top_p=0.0)
    assert len(caught.value.faults) == 3
    for settings in ({"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 1.01}, {"top_p": math.nan}):
        with pytest.raises(ConfigError, match=f"`{next(iter(settings))}`"):
            Sampling(**settings)


def test_top_k_alone_keeps_tokens_that_are_nearly_impossible() -> None:
    """In float32 the first token has all the probability; a top-p of 1 must not look."""
    log_probs = Sampling(top_k=2).log_probs(torch.tensor([0.0, -40.0, -50.0]))
    assert log_probs.tolist() == [0.0, -40.0, -math.inf]
