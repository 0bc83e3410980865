"""Damages of a model's attention: planted ones with a known inverse, and those that compression does.

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

    Damages of compression are of all targets: ``round_3`` and ``round_4`` (to the nearest of 2^bits levels a row),
    ``magnitude_pruning`` (the smaller half of the weights is set to 0) and ``truncation`` (the larger half of the
    singular values stays). Their inverse is a copy of what was there.

    Args:
        kind: a key of ``DAMAGES``.
        targets: attention matrices.
        strength: largest factor, above 1; the last three planted kinds and compression have no use for it.
        generator: draws the damage.
    """
    assert kind in DAMAGES, kind
    damage = _DAMAGES[kind]
    planted = kind in _PLANTED
    undos = [
        damage(target, math.log(strength), generator) for target in targets if not planted or target.role == "output"
    ]

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


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


def _rounding(bits: int) -> Callable[[Target, float, torch.Generator], Undo]:
    def round_to_nearest(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
        matrix = target.matrix()
        steps = 2 ** (bits - 1) - 1  # on either side of 0
        scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / steps  # [rows, 1]
        target.write((matrix / scale).round() * scale)
        return lambda: target.write(matrix)

    return round_to_nearest


def _prune(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    matrix = target.matrix()
    target.write(torch.where(matrix.abs() < matrix.abs().median(), 0.0, matrix))
    return lambda: target.write(matrix)


def _truncate(target: Target, log_strength: float, generator: torch.Generator) -> Undo:
    matrix = target.matrix()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = len(values) // 2
    target.write((left[:, :kept] * values[:kept]) @ right[:kept])
    return lambda: target.write(matrix)


_PLANTED = {
    "head_scale": _scale_heads,
    "singular_values": _shrink_singular_values,
    "low_rank_noise": _add_noise,
    "permuted_heads": _permute_heads,
    "wiped_head": _wipe_head,
}
_DAMAGES = {
    **_PLANTED,
    "round_3": _rounding(3),
    "round_4": _rounding(4),
    "magnitude_pruning": _prune,
    "truncation": _truncate,
}
