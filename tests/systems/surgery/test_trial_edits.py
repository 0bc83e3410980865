from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from preceptor.errors import ConfigError, ShapeError
from preceptor.lm.edit_targets import Layout, Target
from preceptor.systems.surgery.theater import SurgicalTheater
from preceptor.systems.surgery.trial import EDIT_KINDS, Edit, EditKind

SEEDS = st.integers(0, 2**31 - 1)


def target(
    rows: int = 6, width: int = 5, *, heads: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Target:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Target(f"weight {seed}", nn.Parameter(weight), "query", Layout(heads_per_group=heads))


def weight(some: Target) -> Tensor:
    return some.parameter.detach().clone()


def test_singular_values_by_hand() -> None:
    # diag(3, 2, 1): the first value by 1 + 0.1, the second by 1 − 0.05, the third is beyond the rank
    some = target()
    some.parameter.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    size = Edit("singular_values", [some], rank=2, max_relative_norm=0.1).apply_(torch.tensor([1.0, -0.5]))
    assert torch.allclose(weight(some), torch.diag(torch.tensor([3.3, 1.9, 1.0])), atol=1e-6)
    assert size.max == pytest.approx(math.hypot(0.3, 0.1) / math.sqrt(14), rel=1e-5)


def test_head_scale_by_hand() -> None:
    some = target()
    before = weight(some)
    Edit("head_scale", [some], max_relative_norm=0.5).apply_(torch.tensor([1.0, 0.0, -1.0]))
    factors = torch.tensor([1.5, 1.5, 1.0, 1.0, 0.5, 0.5])  # three heads of two rows
    assert torch.equal(weight(some), before * factors[:, None])


def test_low_rank_by_hand() -> None:
    # diag(3, 2, 1): A adds its entry (0, 1) to the first row's second column, times c ‖W‖ / r = 0.1 √14 / 2
    some = target()
    some.parameter.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    Edit("low_rank", [some], rank=2, max_relative_norm=0.1).apply_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    expected = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    expected[0, 1] = 0.1 * math.sqrt(14) / 2
    assert torch.allclose(weight(some), expected, atol=1e-6)


@pytest.mark.parametrize("kind", EDIT_KINDS)
@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_norm_is_bounded_also_at_the_corners(kind: EditKind, seed: int) -> None:
    targets = [target(seed=seed), target(8, 3, heads=4, seed=seed + 1)]
    edit = Edit(kind, targets, rank=4, max_relative_norm=0.2)
    before = [weight(some) for some in targets]
    generator = torch.Generator().manual_seed(seed)
    action = 2 * torch.rand(edit.action_dim, generator=generator) - 1
    size = edit.apply_(action.sign() if seed % 2 else action)
    for old, some, norm in zip(before, targets, size.relative_norms, strict=True):
        assert norm == pytest.approx(float((weight(some) - old).norm() / old.norm()), rel=1e-5)
        assert 0 < norm <= 0.2 * (1 + 1e-5)
    assert size.mean == pytest.approx(sum(size.relative_norms) / 2)
    assert size.max == max(size.relative_norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_zero_changes_no_bit(kind: EditKind, dtype: torch.dtype) -> None:
    some, other = target(dtype=dtype), target(seed=1, dtype=dtype)
    edit = Edit(kind, [some, other], max_relative_norm=0.1)
    before = [weight(some), weight(other)]
    assert edit.apply_(torch.zeros(edit.action_dim)).relative_norms == [0.0, 0.0]
    assert torch.equal(weight(some), before[0])
    action = torch.zeros(edit.action_dim)
    action[-1] = 1.0
    assert edit.apply_(action).relative_norms[0] == 0.0
    assert torch.equal(weight(some), before[0])
    assert not torch.equal(weight(other), before[1])


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_bfloat16_edits_are_edits_and_not_rounding(kind: EditKind) -> None:
    """The bound holds up to rounding, and the edit of the rounded weights is close to that of the exact ones."""
    rough, exact = target(32, 32, heads=4, dtype=torch.bfloat16), target(32, 32, heads=4)
    exact.parameter.data = rough.parameter.data.float()
    before = weight(exact)
    action = torch.ones(Edit(kind, [exact]).action_dim)
    sizes = [Edit(kind, [some], max_relative_norm=0.1).apply_(action) for some in (rough, exact)]
    rounding = 2.0**-9  # half an epsilon of bfloat16 per weight at most
    assert sizes[0].max == pytest.approx(sizes[1].max, abs=rounding)
    assert (weight(rough).float() - weight(exact)).norm() < rounding * before.norm()
    assert sizes[1].max > 10 * rounding


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_is_of_the_weights_as_they_are(kind: EditKind) -> None:
    """What an edit keeps between two actions belongs to one set of weights: the same again in a theater, new after."""
    some, fresh = target(16, 12, heads=4), target(16, 12, heads=4, seed=9)
    module = nn.Module()
    module.weight = some.parameter
    edit = Edit(kind, [some], rank=3)
    action = 2 * torch.rand(edit.action_dim, generator=torch.Generator().manual_seed(3)) - 1
    results = []
    for _ in range(2):
        with SurgicalTheater(module, [some]):
            edit.apply_(action)
            results.append(weight(some))
    assert torch.equal(*results)
    some.write(fresh.matrix())
    edit.apply_(action)
    Edit(kind, [fresh], rank=3).apply_(action)
    assert torch.equal(weight(some), weight(fresh))


def test_the_signs_of_a_decomposition_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    some, other = target(16, 12, heads=4), target(16, 12, heads=4)
    action = 2 * torch.rand(9, generator=torch.Generator().manual_seed(3)) - 1
    Edit("low_rank", [some], rank=3).apply_(action)
    left, values, right = torch.linalg.svd(other.matrix(), full_matrices=False)
    flips = torch.ones(12)
    flips[1] = -1
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: (left * flips, values, right * flips[:, None]))
    Edit("low_rank", [other], rank=3).apply_(action)
    assert torch.equal(weight(some), weight(other))


def test_matrices_smaller_than_the_rank_and_matrices_of_zeros() -> None:
    small, empty = target(2, 1, heads=1), target(4, 4, heads=2, seed=1)
    with torch.no_grad():
        empty.parameter.zero_()
    edit = Edit("low_rank", [small, empty], rank=3)
    assert edit.action_dim == 1 + 9
    assert edit.apply_(torch.ones(10)).relative_norms == [pytest.approx(0.1), 0.0]
    assert not empty.parameter.any()


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_number_of_actions(kind: EditKind) -> None:
    edit = Edit(kind, [target(), target(seed=1)], rank=2)
    assert edit.action_dim == {"singular_values": 4, "head_scale": 6, "low_rank": 8}[kind]
    with pytest.raises(ShapeError, match=rf"shape \({edit.action_dim},\), got \(1,\)"):
        edit.apply_(torch.zeros(1))
    for bad in (1.01, float("nan")):
        with pytest.raises(ConfigError, match="must lie in"):
            edit.apply_(torch.full((edit.action_dim,), bad))


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Edit("head_scales", [], rank=0, max_relative_norm=1.0)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 4
    assert "did you mean 'head_scale'?" in caught.value.faults[0]
    with pytest.raises(ConfigError, match=r"must lie in \[0.078, 1\), well above the rounding"):
        Edit("head_scale", [target(dtype=torch.bfloat16)], max_relative_norm=0.05)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_no_edit_leaves_every_bit_also_a_negative_zero(kind: EditKind) -> None:
    """−0 + 0 is +0: a zero that is added, not left out, would change the bit."""
    some = target()
    some.parameter.data[1, 2] = -0.0
    before = weight(some).view(torch.int32)
    edit = Edit(kind, [some, target(seed=1)], rank=2)
    action = torch.cat([torch.zeros(edit._dims[0]), torch.ones(edit._dims[1])])
    assert edit.apply_(action).relative_norms[0] == 0.0
    assert torch.equal(weight(some).view(torch.int32), before)
