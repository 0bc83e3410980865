"""Damages of a model: planted ones of its attention with a known inverse, and what compression does to its layers.

A surgeon that is to repair models it has never seen is trained on many of them, and judged where the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.lm.edit_targets import Target
from preceptor.systems.surgery.config import DAMAGES

Undo = Callable[[], None]
"""Takes a damage back, to within rounding."""

MERGING = "merging"
"""The one kind of damage that is no function of the weights: a patient holds the fine-tunes that it averages."""

PRUNED = (0.5, 0.75)
"""Share of the weights that ``magnitude_pruning`` sets to 0, uniform."""
KEPT = (1 / 8, 1 / 3)
"""Share of the singular values that ``truncation`` keeps, uniform."""

NOISE_RANK = 2
"""Rank of the noise of ``low_rank_noise``."""


def add_damage(kind: str, targets: Sequence[Target], *, strength: float, generator: torch.Generator) -> Undo:
    """Damages the live weights of ``targets`` in place; gives the exact inverse.

    Planted damages are of output projections alone, and a head there is a block of rows:

    * ``head_scale``: the rows of a head are multiplied by exp(u), u uniform in ± ln ``strength``.
    * ``singular_values``: every singular value is divided by exp(u), u uniform in [0, ln ``strength``].
    * ``low_rank_noise``: a random matrix of rank 2 is added whose norm is ln ``strength`` / 2 of the matrix's own.
    * ``permuted_heads``: the heads of a layer change places, none stays.
    * ``wiped_head``: one head of a layer is set to 0.

    Damages of compression are of all targets. Their inverse is a copy of what was there.

    * ``round_2``, ``round_3`` and ``round_4``: to the nearest of 2^bits − 1 levels, as far apart as the largest weight
      of an output needs. Two bits are −1, 0 and 1 times that weight.
    * ``magnitude_pruning``: the smallest weights of every matrix are set to 0, one share (``PRUNED``) in all of them.
    * ``head_pruning``: a quarter of a layer's heads (at least one), those whose rows of the output projection have the
      smallest norm, are set to 0 there. Nothing else is touched.
    * ``truncation``: every matrix keeps its largest singular values, one share (``KEPT``) in all of them.

    Args:
        kind: a key of ``DAMAGES`` but ``merging``.
        targets: attention matrices, for compression those of the MLPs as well.
        strength: largest factor, above 1; the last three planted kinds and compression have no use for it.
        generator: draws the damage.
    """
    assert kind in DAMAGES, kind
    assert kind != MERGING, "merging is the patient's"
    if kind in _PLANTED:
        outputs = [target for target in targets if target.role == "output"]
        undos = [_PLANTED[kind](target, math.log(strength), generator) for target in outputs]
    else:
        undos = [_putting_back(target) for target in targets]
        _COMPRESSION[kind](targets, generator)

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


def _putting_back(target: Target) -> Undo:
    matrix = target.matrix()
    return lambda: target.write(matrix)


def rows_of_outputs(target: Target) -> Float[Tensor, "out in"]:
    """A copy of a target with what one output is made of in a row; the output projection shows its inputs as rows."""
    return target.matrix().T if target.role == "output" else target.matrix()


def write_rows_of_outputs(target: Target, rows: Float[Tensor, "out in"]) -> None:
    """Writes what :func:`rows_of_outputs` gave."""
    target.write(rows.T if target.role == "output" else rows)


# ---- planted --------------------------------------------------------------------------------------------------------


def _scale_heads(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    draws = 2 * torch.rand(target.num_heads, generator=generator) - 1
    factors = (log_strength * draws).exp()
    _scale_rows(target, factors)
    return lambda: _scale_rows(target, 1 / factors)


def _scale_rows(target: Target, factors: Float[Tensor, " head"]) -> None:
    matrix = target.matrix()
    heads = matrix.reshape(len(factors), -1) * factors.to(matrix.device)[:, None]  # [head, head_dim · width]
    target.write(heads.view_as(matrix))


def _shrink_singular_values(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    left, values, right = torch.linalg.svd(target.matrix(), full_matrices=False)
    draws = torch.rand(len(values), generator=generator).to(values.device)
    target.write((left * (values * (-log_strength * draws).exp())) @ right)
    return lambda: target.write((left * values) @ right)


def _add_noise(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    matrix = target.matrix()
    rows, width = matrix.shape
    noise = torch.randn(rows, NOISE_RANK, generator=generator) @ torch.randn(NOISE_RANK, width, generator=generator)
    noise = noise.to(matrix.device) * (0.5 * log_strength * matrix.norm() / noise.norm())
    target.write(matrix + noise)
    return lambda: target.write(target.matrix() - noise)


def _permute_heads(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    matrix = target.matrix()
    # A rotation of a random order moves every head, where a plain permutation may leave some in place.
    order = torch.randperm(target.num_heads, generator=generator)
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    target.write(matrix.reshape(target.num_heads, -1)[moved].view_as(matrix))
    return lambda: target.write(target.matrix().reshape(target.num_heads, -1)[moved.argsort()].view_as(matrix))


def _wipe_head(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    head = int(torch.randint(target.num_heads, (), generator=generator))
    matrix = target.matrix()
    wiped = matrix.reshape(target.num_heads, -1).clone()
    wiped[head] = 0
    target.write(wiped.view_as(matrix))
    return lambda: target.write(matrix)


# ---- compression ----------------------------------------------------------------------------------------------------


def _rounding(bits: int) -> Callable[[Sequence[Target], torch.Generator], None]:
    steps = 2 ** (bits - 1) - 1  # on either side of 0

    def round_to_nearest(targets: Sequence[Target], generator: torch.Generator) -> None:
        for target in targets:
            rows = rows_of_outputs(target)
            scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / steps  # [out, 1]
            write_rows_of_outputs(target, (rows / scales).round() * scales)

    return round_to_nearest


def _prune_weights(targets: Sequence[Target], generator: torch.Generator) -> None:
    share = _uniform(*PRUNED, generator)
    for target in targets:
        matrix = target.matrix()
        num_pruned = int(share * matrix.numel())
        smallest = matrix.abs().flatten().argsort(stable=True)[:num_pruned]
        target.write(matrix.flatten().index_fill(0, smallest, 0.0).view_as(matrix))


def _prune_heads(targets: Sequence[Target], generator: torch.Generator) -> None:
    for target in targets:
        if target.role == "output":
            heads = target.matrix().reshape(target.num_heads, -1)  # [head, head_dim · width]
            smallest = heads.norm(dim=1).argsort(stable=True)[: max(1, target.num_heads // 4)]
            target.write(heads.index_fill(0, smallest, 0.0))


def _truncate(targets: Sequence[Target], generator: torch.Generator) -> None:
    share = _uniform(*KEPT, generator)
    for target in targets:
        left, values, right = torch.linalg.svd(target.matrix(), full_matrices=False)
        kept = max(1, int(share * len(values)))
        target.write((left[:, :kept] * values[:kept]) @ right[:kept])


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


_PLANTED = {
    "head_scale": _scale_heads,
    "singular_values": _shrink_singular_values,
    "low_rank_noise": _add_noise,
    "permuted_heads": _permute_heads,
    "wiped_head": _wipe_head,
}
_COMPRESSION = {
    "round_2": _rounding(2),
    "round_3": _rounding(3),
    "round_4": _rounding(4),
    "magnitude_pruning": _prune_weights,
    "head_pruning": _prune_heads,
    "truncation": _truncate,
}
