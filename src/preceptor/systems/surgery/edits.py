"""From an action, a short vector in [−1, 1], to an edit of weights: zero is exactly no edit, and its size is bounded.

Every kind keeps ‖ΔW‖ ≤ c ‖W‖ (Frobenius) for each matrix, where c is the largest relative norm:

* ``singular_values``: W = Σ σ_i u_i v_iᵀ becomes W + c Σ_{i ≤ r} a_i σ_i u_i v_iᵀ, so each of the leading r singular
  values is scaled by 1 + c a_i (Transformer², arXiv 2501.06252, scales all of them).
* ``head_scale``: the rows of head h are scaled by 1 + c a_h; in an output projection that scales the head's output.
* ``low_rank``: W + (c ‖W‖ / r) U_r A V_rᵀ with the leading r singular vectors and the action as the r × r matrix A
  (the form of LoRA-XS, arXiv 2405.17604).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import ConfigError, ShapeError, did_you_mean
from preceptor.systems.surgery.targets import Target
from preceptor.systems.surgery.theatre import checksum

EditKind = Literal["singular_values", "head_scale", "low_rank"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)

# Rounding moves a weight by up to half an epsilon of its dtype; a smaller edit would be mostly rounding.
MIN_NORM_IN_EPSILONS = 10


class EditSize(NamedTuple):
    """How large an edit was, measured after rounding: ‖ΔW‖ / ‖W‖ for each target, their mean and their maximum."""

    relative_norms: list[float]
    mean: float
    max: float


class Edit:
    """An action space over ``targets``: which edits there are and how many numbers name one.

    Args:
        kind: see the module.
        targets: the matrices, edited by consecutive parts of the action.
        rank: r, how many leading singular values or vectors; no more than a matrix has are used. ``head_scale``
            has no use for it.
        max_relative_norm: c in (0, 1).

    Attributes:
        action_dim: numbers in an action.

    Raises:
        ConfigError: no targets, or a value out of range, c too small for the weights' dtype included.
    """

    def __init__(
        self, kind: EditKind, targets: Sequence[Target], *, rank: int = 4, max_relative_norm: float = 0.1
    ) -> None:
        faults = []
        if kind not in EDIT_KINDS:
            faults.append(f"edits are {', '.join(EDIT_KINDS)}, got {kind!r}{did_you_mean(kind, EDIT_KINDS)}")
        if not targets:
            faults.append("an edit needs at least one target, got none")
        if rank < 1:
            faults.append(f"rank must be at least 1, got {rank}")
        coarsest = max((torch.finfo(target.parameter.dtype).eps for target in targets), default=0.0)
        if not MIN_NORM_IN_EPSILONS * coarsest <= max_relative_norm < 1:
            least = f"{MIN_NORM_IN_EPSILONS * coarsest:.2g}"
            faults.append(
                f"max_relative_norm must lie in [{least}, 1), well above the rounding of the weights, "
                f"got {max_relative_norm}"
            )
        if faults:
            raise ConfigError(*faults)
        self.kind = kind
        self.targets = tuple(targets)
        self.max_relative_norm = max_relative_norm
        self._rank = rank
        self._dims = [self._num_numbers(target) for target in self.targets]
        self.action_dim = sum(self._dims)
        self._factors: dict[int, tuple[str, _Factors]] = {}  # per target: checksum of its weights, their SVD

    @torch.no_grad()
    def apply_(self, action: Float[Tensor, " action"]) -> EditSize:
        """Edits the live weights in place and says by how much; a part of ``action`` that is all 0 changes no bit.

        The arithmetic is float32, rounded once into the weights' dtype.

        Args:
            action: in [−1, 1].

        Raises:
            ShapeError: ``action`` has another length.
            ConfigError: a number of ``action`` is beyond [−1, 1], or no number at all.
        """
        if action.shape != (self.action_dim,):
            raise ShapeError(f"an action of this edit has shape ({self.action_dim},), got {tuple(action.shape)}")
        if not (action.abs() <= 1).all():
            raise ConfigError(f"an action must lie in [-1, 1], got {action.abs().max():.6g}; squash it")
        parts = action.to(torch.float32).split(self._dims)
        norms = [self._edit(index, part) if part.any() else 0.0 for index, part in enumerate(parts)]
        return EditSize(norms, sum(norms) / len(norms), max(norms))

    def _num_numbers(self, target: Target) -> int:
        if self.kind == "head_scale":
            return target.num_heads
        rank: int = min(self._rank, *target.matrix().shape)
        return rank if self.kind == "singular_values" else rank * rank

    def _edit(self, index: int, numbers: Float[Tensor, " numbers"]) -> float:
        target = self.targets[index]
        matrix = target.matrix()
        target.write(matrix + self.max_relative_norm * self._direction(index, matrix, numbers.to(matrix.device)))
        change = target.matrix() - matrix
        norm = float(matrix.norm())
        return float(change.norm()) / norm if norm else 0.0

    def _direction(
        self, index: int, matrix: Float[Tensor, "rows width"], numbers: Float[Tensor, " numbers"]
    ) -> Float[Tensor, "rows width"]:
        """ΔW / c, of norm ‖W‖ at most."""
        if self.kind == "head_scale":
            return (matrix.view(len(numbers), -1) * numbers[:, None]).view_as(matrix)
        left, values, right = self._leading_factors(index, matrix)
        rank = len(values)
        if self.kind == "singular_values":
            return (left * (numbers * values)) @ right
        return left @ numbers.view(rank, rank) @ right * (float(matrix.norm()) / rank)

    def _leading_factors(self, index: int, matrix: Float[Tensor, "rows width"]) -> _Factors:
        """The leading singular triples of target ``index``, computed anew only when its weights have changed."""
        digest = checksum(matrix)
        kept = self._factors.get(index)
        if kept is None or kept[0] != digest:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            rank = min(self._rank, len(values))
            left, values, right = left[:, :rank].clone(), values[:rank].clone(), right[:rank].clone()
            # A decomposition is free to flip any pair of vectors; an action must mean the same every time.
            signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
            kept = digest, _Factors(left * signs, values, right * signs.T)
            self._factors[index] = kept
        return kept[1]


class _Factors(NamedTuple):
    left: Float[Tensor, "rows rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank width"]
