from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from preceptor.lm.edit_targets import Layout, Target, attention_targets, layer_targets
from preceptor.systems.surgery.config import DAMAGES
from preceptor.systems.surgery.damage import KEPT, PRUNED, add_damage, rows_of_outputs, write_rows_of_outputs
from tests.systems.surgery.small import small_model


def outputs(model: PreTrainedModel) -> list[Target]:
    return attention_targets(model, roles=["output"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target_of(rows: list[list[float]], *, num_heads: int = 1, role: str | None = None) -> Target:
    """A matrix by itself; ``rows`` are what the target shows."""
    layout = Layout(heads_per_group=num_heads)
    return Target("made.weight", torch.nn.Parameter(torch.tensor(rows)), role, layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "merging"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_inverse_is_exact(kind: str, architecture: str) -> None:
    model = small_model(architecture=architecture)
    targets = layer_targets(model)
    clean = [target.matrix() for target in targets]
    undo = add_damage(kind, targets, strength=6.0, generator=generator())
    changed = [not torch.equal(target.matrix(), matrix) for target, matrix in zip(targets, clean, strict=True)]
    of_heads = DAMAGES[kind].startswith("planted") or kind == "head_pruning"
    assert changed == [target.role == "output" or not of_heads for target in targets]
    undo()
    for target, matrix in zip(targets, clean, strict=True):
        if DAMAGES[kind].startswith("planted"):
            torch.testing.assert_close(target.matrix(), matrix, rtol=1e-5, atol=1e-7)  # float32, scaled there and back
        else:
            assert torch.equal(target.matrix(), matrix)


def test_rows_of_outputs_are_what_a_layer_puts_out() -> None:
    """Under both layouts: inputs times these rows, transposed, plus the bias are the layer's output."""
    for architecture in ("gpt2", "llama"):
        model = small_model(architecture=architecture)
        inputs = torch.randn(5, 16, generator=generator())
        wide = torch.randn(5, 64, generator=generator())
        targets = {target.name: target for target in layer_targets(model) if target.role in (None, "output")}
        assert len(targets) == {"gpt2": 6, "llama": 8}[architecture]
        for name, target in targets.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            rows = rows_of_outputs(target)
            x = inputs if rows.shape[1] == 16 else wide[:, : rows.shape[1]]
            bias = layer.bias if getattr(layer, "bias", None) is not None else 0.0
            torch.testing.assert_close(x @ rows.T + bias, layer(x))
            write_rows_of_outputs(target, 2 * rows)
            assert torch.equal(rows_of_outputs(target), 2 * rows)


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


def test_three_bits_are_seven_levels_an_output() -> None:
    (first, *_) = outputs(small_model())
    add_damage("round_3", [first], strength=6.0, generator=generator())
    assert max(len(row.unique()) for row in rows_of_outputs(first)) <= 7  # −3 … 3 times the scale of an output


def test_rounding_by_hand() -> None:
    # 2 bits: one step either side, as large as the largest weight of the row. 1.2/2 = 0.6 rounds to 1, 0.9/2 to 0.
    target = target_of([[2.0, 1.2, 0.9, -1.1], [0.0, 0.0, 0.0, 0.0]])
    add_damage("round_2", [target], strength=6.0, generator=generator())
    assert target.matrix().tolist() == [[2.0, 2.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]]
    # 3 bits: steps of 3/3 = 1.
    target = target_of([[3.0, 1.4, 0.6, -0.4]])
    add_damage("round_3", [target], strength=6.0, generator=generator())
    assert target.matrix().tolist() == [[3.0, 1.0, 1.0, 0.0]]
    # 4 bits: steps of 7/7 = 1, so what 3 bits round to 0 stays.
    target = target_of([[7.0, 1.4, 0.6, -0.4]])
    add_damage("round_4", [target], strength=6.0, generator=generator())
    assert target.matrix().tolist() == [[7.0, 1.0, 1.0, 0.0]]
    # What the output projection shows as rows are inputs: its columns are rounded, with steps 4 and 2.
    target = target_of([[4.0, 2.0], [1.0, 1.2]], role="output")
    add_damage("round_2", [target], strength=6.0, generator=generator())
    assert target.matrix().tolist() == [[4.0, 2.0], [0.0, 2.0]]


def test_the_smallest_weights_are_pruned_in_every_matrix_alike() -> None:
    draw = float(torch.rand((), generator=generator(3)))
    num_pruned = int((PRUNED[0] + (PRUNED[1] - PRUNED[0]) * draw) * 8)
    targets = [target_of([[1.0, -2.0, 3.0, -4.0], [8.0, -7.0, 6.0, -5.0]]), target_of([[1.0] * 4, [1.0] * 4])]
    add_damage("magnitude_pruning", targets, strength=6.0, generator=generator(3))
    kept = list((1.0, -2.0, 3.0, -4.0, -5.0, 6.0, -7.0, 8.0)[num_pruned:])
    assert sorted(targets[0].matrix().flatten().tolist()) == sorted([0.0] * num_pruned + kept)
    assert int((targets[1].matrix() == 0).sum()) == num_pruned  # ties too: by order, never all or none of them
    assert 4 <= num_pruned <= 6


def test_the_smallest_quarter_of_the_heads_is_pruned() -> None:
    target = target_of([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [5.0, 5.0]], num_heads=4, role="output")
    mlp = target_of([[1.0, 2.0]])
    add_damage("head_pruning", [target, mlp], strength=6.0, generator=generator())
    assert target.matrix().tolist() == [[3.0, 0.0], [0.0, 2.0], [0.0, 0.0], [5.0, 5.0]]
    assert mlp.matrix().tolist() == [[1.0, 2.0]]
    eight = target_of([[float(8 - row)] for row in range(8)], num_heads=8, role="output")
    add_damage("head_pruning", [eight], strength=6.0, generator=generator())
    assert eight.matrix().flatten().tolist() == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 0.0, 0.0]  # a quarter of 8


def test_the_largest_singular_values_are_kept() -> None:
    targets = outputs(small_model())
    clean = [torch.linalg.svdvals(target.matrix()) for target in targets]
    draw = float(torch.rand((), generator=generator(1)))
    kept = int((KEPT[0] + (KEPT[1] - KEPT[0]) * draw) * 16)
    assert 2 <= kept <= 5
    add_damage("truncation", targets, strength=6.0, generator=generator(1))
    for target, values in zip(targets, clean, strict=True):
        left = torch.linalg.svdvals(target.matrix())
        torch.testing.assert_close(left[:kept], values[:kept], rtol=1e-4, atol=1e-6)
        assert float(left[kept:].abs().max()) < 1e-6
    diagonal = target_of([[4.0, 0.0], [0.0, 3.0]])  # at least one is kept
    add_damage("truncation", [diagonal], strength=6.0, generator=generator())
    torch.testing.assert_close(diagonal.matrix(), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))


def test_the_strength_of_a_compression_is_drawn_for_each_model() -> None:
    shares = []
    for seed in range(6):
        targets = layer_targets(small_model())
        add_damage("magnitude_pruning", targets, strength=6.0, generator=generator(seed))
        of_model = [float((target.matrix() == 0).float().mean()) for target in targets]
        assert max(of_model) - min(of_model) < 0.01  # whole weights of at least 256
        shares.append(of_model[0])
    assert len({round(share, 2) for share in shares}) > 3
    assert all(PRUNED[0] - 0.01 <= share <= PRUNED[1] + 0.01 for share in shares)
