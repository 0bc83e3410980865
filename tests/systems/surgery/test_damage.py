from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from preceptor.lm.edit_targets import Target, attention_targets
from preceptor.systems.surgery.config import DAMAGES
from preceptor.systems.surgery.damage import add_damage
from tests.systems.surgery.small import small_model


def outputs(model: PreTrainedModel) -> list[Target]:
    return attention_targets(model, roles=["output"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_inverse_is_exact(kind: str, architecture: str) -> None:
    model = small_model(architecture=architecture)
    targets = attention_targets(model)
    clean = [target.matrix() for target in targets]
    undo = add_damage(kind, targets, strength=6.0, generator=generator())
    changed = [not torch.equal(target.matrix(), matrix) for target, matrix in zip(targets, clean, strict=True)]
    planted = DAMAGES[kind].startswith("planted")
    assert changed == [target.role == "output" or not planted for target in targets]
    undo()
    for target, matrix in zip(targets, clean, strict=True):
        torch.testing.assert_close(target.matrix(), matrix, rtol=1e-5, atol=1e-7)  # float32, scaled there and back


def test_heads_are_scaled_by_at_most_the_strength_and_each_by_its_own_factor() -> None:
    model = small_model()
    (first, *_) = outputs(model)
    clean = first.matrix().reshape(2, -1)
    add_damage("head_scale", [first], strength=6.0, generator=generator())
    ratios = first.matrix().reshape(2, -1) / clean  # [head, number]
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    draws = 2 * torch.rand(2, generator=generator()) - 1  # by hand: exp(ln 6 · u)
    torch.testing.assert_close(ratios[:, 0], 6.0**draws)


def test_singular_values_shrink_and_vectors_stay() -> None:
    (first, *_) = outputs(small_model())
    left, values, right = torch.linalg.svd(first.matrix())
    add_damage("singular_values", [first], strength=6.0, generator=generator())
    diagonal = left.T @ first.matrix() @ right.T
    ratios = diagonal.diagonal() / values
    assert (ratios <= 1 + 1e-5).all()
    assert (ratios >= 1 / 6 - 1e-5).all()
    assert float((diagonal - torch.diag(diagonal.diagonal())).abs().max()) < 1e-6


def test_noise_has_rank_two_and_the_size_that_was_asked_for() -> None:
    (first, *_) = outputs(small_model())
    clean = first.matrix()
    add_damage("low_rank_noise", [first], strength=math.e, generator=generator())
    noise = first.matrix() - clean
    assert int(torch.linalg.matrix_rank(noise, rtol=1e-4)) == 2
    assert float(noise.norm() / clean.norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_head_stays_where_it_was(seed: int) -> None:
    (first, *_) = outputs(small_model(num_heads=4))
    clean = first.matrix().reshape(4, -1)
    add_damage("permuted_heads", [first], strength=6.0, generator=generator(seed))
    moved = first.matrix().reshape(4, -1)
    assert not any(torch.equal(a, b) for a, b in zip(moved, clean, strict=True))
    assert {tuple(row.tolist()) for row in moved} == {tuple(row.tolist()) for row in clean}


def test_rounding_leaves_as_many_levels_as_bits_allow() -> None:
    (first, *_) = outputs(small_model())
    add_damage("round_3", [first], strength=6.0, generator=generator())
    assert max(len(row.unique()) for row in first.matrix()) <= 7  # −3 … 3 times the row's scale


def test_half_is_pruned_and_half_truncated() -> None:
    (first, second) = outputs(small_model())
    add_damage("magnitude_pruning", [first], strength=6.0, generator=generator())
    assert float((first.matrix() == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    add_damage("truncation", [second], strength=6.0, generator=generator())
    assert int(torch.linalg.matrix_rank(second.matrix(), rtol=1e-4)) == 8  # of 16
