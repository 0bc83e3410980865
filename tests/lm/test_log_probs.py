"""Chosen log-probabilities in blocks, against the definition written out, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preceptor.errors import ShapeError
from preceptor.lm import log_probs as lm_log_probs
from preceptor.lm.log_probs import chosen_log_probs
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow(states: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None) -> list[float]:
    """The definition, one row and one number at a time."""
    found = []
    for row, token in zip(states.tolist(), tokens.tolist(), strict=True):
        logits = [math.fsum(a * b for a, b in zip(row, column, strict=True)) for column in weight.tolist()]
        if bias is not None:
            logits = [logit + b for logit, b in zip(logits, bias.tolist(), strict=True)]
        found.append(logits[token] - math.log(math.fsum(math.exp(logit) for logit in logits)))
    return found


def test_a_case_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4, 3/4. d ln p₁ / d logit₁ = 1 − 3/4; the state is 1, the weight ln 3."""
    states = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    log_probs = chosen_log_probs(states, weight, torch.tensor([1]))
    log_probs.backward()
    assert log_probs.item() == pytest.approx(math.log(3 / 4))
    assert weight.grad is not None
    assert states.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-1 / 4, 1 / 4])
    assert states.grad.item() == pytest.approx(math.log(3) / 4)


@pytest.mark.parametrize("chunk_logits", [1, 7, 40, 10_000])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1_024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_blocking_gives_the_definition(
    chunk_logits: int, chunk_rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_log_probs, "_CHUNK_ROWS", chunk_rows)
    states, weight = random(9, 5), random(13, 5, seed=1)
    bias = random(13, seed=2) if with_bias else None
    tokens = torch.tensor([0, 12, 5, 5, 1, 11, 3, 0, 7])
    log_probs = chosen_log_probs(states, weight, tokens, bias=bias, chunk_logits=chunk_logits)
    np.testing.assert_allclose(log_probs.numpy(), slow(states, weight, tokens, bias), atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [4, 1_024])
@pytest.mark.parametrize("chunk_logits", [3, 10_000])
@pytest.mark.parametrize("max_saved_logits", [65, 66])
def test_gradients(chunk_logits: int, max_saved_logits: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 × 11 logits, made again for the backward pass or kept for it."""
    monkeypatch.setattr(lm_log_probs, "_CHUNK_ROWS", chunk_rows)
    leaves = [
        random(6, 4).requires_grad_(),
        random(11, 4, seed=1).requires_grad_(),
        random(11, seed=2).requires_grad_(),
    ]
    tokens = torch.tensor([0, 10, 4, 4, 9, 2])
    assert torch.autograd.gradcheck(
        lambda states, weight, bias: chosen_log_probs(
            states, weight, tokens, bias=bias, chunk_logits=chunk_logits, max_saved_logits=max_saved_logits
        ).square(),
        leaves,
    )


def test_what_is_kept_survives_a_second_backward_pass() -> None:
    weight = random(11, 4, seed=1).requires_grad_()
    log_probs = chosen_log_probs(random(6, 4), weight, torch.tensor([0, 10, 4, 4, 9, 2])).sum()
    first, second = (torch.autograd.grad(log_probs, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_needs_no_gradient_gets_none() -> None:
    states, weight = random(3, 4), random(5, 4, seed=1).requires_grad_()
    chosen_log_probs(states, weight, torch.tensor([0, 1, 2])).sum().backward()
    assert states.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not chosen_log_probs(states, weight, torch.tensor([0, 1, 2])).requires_grad


def test_a_token_that_a_bias_rules_out_has_no_probability() -> None:
    """Also where a whole block of the vocabulary is ruled out."""
    states, weight = random(4, 3), random(6, 3, seed=1).requires_grad_()
    bias = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    tokens = torch.tensor([3, 4, 5, 3])
    log_probs = chosen_log_probs(states, weight, tokens, bias=bias, chunk_logits=4)
    expected = (states @ weight[3:].T).log_softmax(-1).gather(-1, tokens[:, None] - 3)[:, 0]
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert weight.grad is not None
    assert (weight.grad[:3] == 0).all()
    assert weight.grad.isfinite().all()


def test_no_row_and_large_logits_are_fine() -> None:
    weight = random(5, 3)
    assert chosen_log_probs(random(0, 3), weight, torch.zeros(0, dtype=torch.long)).shape == (0,)
    large = chosen_log_probs(torch.tensor([[1e4]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1]))
    assert large.item() == pytest.approx(-1e4)
    with pytest.raises(ShapeError, match="one token for each of 2 rows"):
        chosen_log_probs(random(2, 3), weight, torch.tensor([1]))


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    states, weight = random(8, 16, dtype=torch.float32).requires_grad_(), random(40, 16, seed=1, dtype=torch.float32)
    weight.requires_grad_()
    tokens = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = chosen_log_probs(states, weight, tokens, chunk_logits=50)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    rounded = (states.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs, rounded, atol=1e-5, rtol=1e-5)


def test_gradients_of_bfloat16_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 blocks add ½ and −½ to the weights: a sum in bfloat16 would stand still at 128, where ½ is rounded away."""
    monkeypatch.setattr(lm_log_probs, "_CHUNK_ROWS", 1)
    states = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chosen_log_probs(states, weight, torch.zeros(600, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [300.0, -300.0]


@pytest.mark.parametrize(("max_saved_logits", "times"), [(0, 2), (63_999, 2), (64_000, 1)])
def test_memory_does_not_follow_the_vocabulary(
    max_saved_logits: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of rows × vocabulary is ever made, and logits are made once only where they are few."""
    sizes: list[int] = []
    logits = lm_log_probs._logits
    monkeypatch.setattr(
        lm_log_probs, "_logits", lambda *given: sizes.append((found := logits(*given)).numel()) or found
    )
    states, weight = random(64, 4).requires_grad_(), random(1_000, 4, seed=1).requires_grad_()
    tokens = torch.zeros(64, dtype=torch.long)
    log_probs = chosen_log_probs(states, weight, tokens, chunk_logits=4_096, max_saved_logits=max_saved_logits)
    log_probs.sum().backward()
    assert max(sizes) <= 4_096
    assert sum(sizes) == times * 64 * 1_000


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    states, weight = random(6, 4), random(11, 4, seed=1)
    context = SimpleNamespace(needs_input_grad=(False,) * 6, save_for_backward=lambda *saved: kept.extend(saved))
    kept: list[Tensor | None] = []
    lm_log_probs._ChosenLogProbs.forward(context, states, weight, None, torch.zeros(6, dtype=torch.long), 2**20, 2**24)
    assert len(kept) == 5  # the inputs and the normalisers
    context.needs_input_grad = (True, *(False,) * 5)
    kept.clear()
    lm_log_probs._ChosenLogProbs.forward(context, states, weight, None, torch.zeros(6, dtype=torch.long), 2**20, 2**24)
    assert len(kept) == 7


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.7, suppressed=(0, 2)), Sampling(top_k=3)])
def test_the_model_scores_chosen_tokens_under_the_distribution_asked_for(
    family: str, sampling: Sampling | None, make_lm: Callable[..., LanguageModel], random_tokens: Any
) -> None:
    lm = make_lm(family)
    tokens = torch.tensor([[0, *random_tokens(9)], [0, *random_tokens(9)]])
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, -1] = False
    chosen = tokens[:, 1:].flatten()
    found = lm.chosen_log_probs(tokens, keep=keep, chosen=chosen, sampling=sampling)
    logits = lm.model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    expected = (sampling or Sampling()).log_probs(logits, drawn=chosen).gather(-1, chosen[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    found.mean().backward()
    found_gradients = {name: parameter.grad.clone() for name, parameter in lm.trainable_parameters().items()}
    lm.model.zero_grad()
    expected.mean().backward()
    for name, parameter in lm.trainable_parameters().items():
        torch.testing.assert_close(found_gradients[name], parameter.grad, atol=2e-5, rtol=1e-3)
