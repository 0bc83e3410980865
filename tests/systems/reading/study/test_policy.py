"""The policy by hand and by loops: what it is before training, message passing, adaptivity, probabilities."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from preceptor.systems.reading.study.evaluate import nearest_chain
from preceptor.systems.reading.study.features import CaseBatch
from preceptor.systems.reading.study.policy import PoolPolicy, calibrate, read, topk_readings
from tests.systems.reading.study.small import planted_cases


def policy(batch: CaseBatch, *, num_rounds: int = 2) -> PoolPolicy:
    return PoolPolicy(
        batch.queries.shape[-1], num_channels=2, num_rounds=num_rounds, cosine_scale=torch.tensor([0.1, 0.5])
    )


def perturbed(batch: CaseBatch) -> PoolPolicy:
    """Every parameter away from where it starts."""
    each = policy(batch)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in each.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return each


def test_before_training_it_is_the_cosine() -> None:
    batch = planted_cases(3, seed=0)
    scores = policy(batch).scores(batch)
    for case in range(3):
        for candidate in range(scores.shape[1]):
            cosine = cosine_similarity(batch.queries[case], batch.keys[case, candidate], dim=0)
            assert scores[case, candidate].item() == pytest.approx((cosine.item() - 0.1) / 0.5, abs=1e-4)


@torch.no_grad()
def test_scores_by_loops() -> None:
    batch = planted_cases(2, seed=1, num_candidates=6)
    each = perturbed(batch)
    found = each.scores(batch).detach()
    for case in range(2):
        query = each.query_projection @ batch.queries[case]
        scores = []
        for i in range(6):
            cosine = cosine_similarity(query, each.key_projection @ batch.keys[case, i], dim=0)
            standard = (float(cosine) - 0.1) / (0.5 + 1e-6)
            scores.append(
                float(each.weights[0]) * standard + float(each.weights[1]) * float(batch.query_channels[case, i, 1])
            )
        for weights, gates in zip(each.round_weights.tolist(), each.gates.tolist(), strict=True):
            total = sum(math.exp(score) for score in scores)
            beliefs = [6 * math.exp(score) / total for score in scores]
            new = []
            for i in range(6):
                alike = {
                    j: math.exp(sum(w * float(c) for w, c in zip(weights, batch.key_channels[case, i, j], strict=True)))
                    for j in range(6)
                    if j != i
                }
                share = {j: a / sum(alike.values()) for j, a in alike.items()}
                new.append(
                    scores[i]
                    + math.tanh(gates[0]) * sum(p * scores[j] for j, p in share.items())
                    + gates[1] * sum(p * beliefs[j] for j, p in share.items())
                )
            scores = new
        assert found[case].tolist() == pytest.approx(scores, abs=1e-3)


def test_probabilities_of_all_orders_sum_to_one() -> None:
    batch = planted_cases(1, seed=2, num_candidates=4)
    orders = torch.tensor(list(itertools.permutations(range(4), 2)))[None]  # 1 12 2
    found = read(perturbed(batch), batch, budget=2, num_readings=12, generator=None, imposed=orders)
    assert torch.equal(found.picks, orders)
    assert found.log_probs.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_readings_are_drawn_as_their_probabilities_say() -> None:
    batch = planted_cases(1, seed=2, num_candidates=4)
    found = read(perturbed(batch), batch, budget=2, num_readings=4_000, generator=torch.Generator().manual_seed(0))
    for order in itertools.permutations(range(4), 2):
        drawn = (found.picks[0] == torch.tensor(order)).all(-1)
        if drawn.any():
            probability = found.log_probs[0][drawn][0].sum().exp().item()
            # Five standard errors of a share over 4,000 draws.
            error = 5 * math.sqrt(probability * (1 - probability) / 4_000)
            assert drawn.double().mean().item() == pytest.approx(probability, abs=error)


def test_what_was_read_changes_what_is_read_next() -> None:
    """Candidate 1 is best at first; after 0 was read, a value like candidate 2's key makes 2 the best."""
    batch = planted_cases(1, seed=0, num_candidates=3)
    read_channels = torch.zeros(1, 3, 3, 2)
    read_channels[0, 2, 0, 1] = 3.0
    first = torch.tensor([[[0.0, 9.0], [0.0, 5.0], [0.0, 4.0]]])
    batch = replace(batch, query_channels=first, read_channels=read_channels)
    each = policy(batch, num_rounds=0)
    with torch.no_grad():
        each.weights.copy_(torch.tensor([0.0, 1.0]))
    assert read(each, batch, budget=3, num_readings=1, generator=None).picks.tolist() == [[[0, 1, 2]]]
    with torch.no_grad():
        each.read_weights.copy_(torch.tensor([0.0, 1.0]))
    assert read(each, batch, budget=3, num_readings=1, generator=None).picks.tolist() == [[[0, 2, 1]]]


def test_what_was_read_counts_by_its_mean() -> None:
    """After candidates 0 and 1: candidate 2 gains (1 + 3) / 2, candidate 3 gains (0 + 2) / 2."""
    batch = planted_cases(1, seed=0, num_candidates=4)
    read_channels = torch.zeros(1, 4, 4, 2)
    read_channels[0, 2, :2, 1] = torch.tensor([1.0, 3.0])
    read_channels[0, 3, :2, 1] = torch.tensor([0.0, 2.0])
    batch = replace(batch, query_channels=torch.zeros(1, 4, 2), read_channels=read_channels)
    each = policy(batch, num_rounds=0)
    with torch.no_grad():
        each.weights.zero_()
        each.read_weights.copy_(torch.tensor([0.0, 1.0]))
    imposed = torch.tensor([[[0, 1, 2]]])
    found = read(each, batch, budget=3, num_readings=1, generator=None, imposed=imposed).log_probs[0, 0]
    assert found[0].item() == pytest.approx(math.log(1 / 4), abs=1e-5)
    assert found[2].item() == pytest.approx(2 - math.log(math.exp(2) + math.exp(1)), abs=1e-5)


def test_calibration_reaches_the_entropy() -> None:
    batch = planted_cases(20, seed=4)
    each = policy(batch)
    calibrate(each, batch, entropy_fraction=0.9)
    log_probs = (each.scores(batch) / each.temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1) / math.log(12)
    assert entropy.mean().item() == pytest.approx(0.9, abs=1e-4)


def test_ties_go_to_the_first() -> None:
    assert topk_readings(torch.tensor([[1.0, 3.0, 3.0, 1.0, 1.0]]), 4).tolist() == [[[1, 2, 0, 3]]]


def test_nearest_chain_by_hand() -> None:
    likeness = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])  # [key, value read]
    assert nearest_chain(torch.tensor([[5.0, 1.0, 2.0]]), likeness, 3).tolist() == [[0, 1, 2]]
    assert nearest_chain(torch.tensor([[1.0, 1.0, 2.0]]), likeness, 2).tolist() == [[2, 0]]
