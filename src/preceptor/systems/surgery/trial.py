"""Trials: an action becomes an edit of weights, which is measured in the theater, and committed if it passes a test.

An action is a short vector in [−1, 1]; zero is exactly no edit. Every kind of edit keeps ‖ΔW‖ ≤ c ‖W‖ (Frobenius) for
each matrix W, where c is the largest relative norm:

* ``singular_values``: W = Σ σ_i u_i v_iᵀ becomes W + c Σ_{i ≤ r} a_i σ_i u_i v_iᵀ, so each of the leading r singular
  values is scaled by 1 + c a_i (Transformer², arXiv 2501.06252, scales all of them).
* ``head_scale``: the rows of head h are scaled by 1 + c a_h; in an output projection that scales the head's output.
* ``low_rank``: W + (c ‖W‖ / r) U_r A V_rᵀ with the leading r singular vectors and the action as the r × r matrix A
  (the form of LoRA-XS, arXiv 2405.17604).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from preceptor.errors import ConfigError, ModelError, ShapeError, did_you_mean
from preceptor.lm.edit_targets import Target
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery.environment import Student
from preceptor.systems.surgery.rewards import Acceptance, Draws, Examiner, Quality, acceptance, shared_window_losses
from preceptor.systems.surgery.theater import SurgicalTheater

EditKind = Literal["singular_values", "head_scale", "low_rank"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)

# Rounding moves a weight by up to half an epsilon of its dtype; a smaller edit would be mostly rounding.
MIN_NORM_IN_EPSILONS = 10

MOMENT_SCALES = {"keep": 1.0, "zero": 0.0, "scale": 0.5}
"""What Adam's memory of gradients at the old weights is multiplied by after a commit."""
# What Adam and SGD remember of a parameter's gradients, and the power of the gradient that it is.
_MOMENT_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


# ---- from an action to an edit --------------------------------------------------------------------------------------


class ActionSpace(Protocol):
    """Edits that an action can name: :class:`Edit`, or the sites of a surgeon that knows many models.

    Attributes:
        targets: the matrices that are edited.
        action_dim: numbers in an action.
    """

    targets: tuple[Target, ...]
    action_dim: int

    def apply_(self, action: Float[Tensor, " action"]) -> EditSize:
        """Edits the live weights in place; an action of zeros changes no bit."""
        ...


class EditSize(NamedTuple):
    """Size of an edit after rounding: ‖ΔW‖ / ‖W‖ for each target, their mean and their maximum."""

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
        """Edits the live weights in place and gives the size; a part of ``action`` that is all 0 changes no bit.

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
        parts = action.to(torch.float32).split(self._dims)  # consecutive parts, one a target
        # Adding zeros would turn −0 into 0, so a part of zeros leaves its target untouched.
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
        change = target.matrix() - matrix  # what rounding to the weights' dtype left of it
        norm = float(matrix.norm())
        return float(change.norm()) / norm if norm else 0.0

    def _direction(
        self, index: int, matrix: Float[Tensor, "rows width"], numbers: Float[Tensor, " numbers"]
    ) -> Float[Tensor, "rows width"]:
        """ΔW / c, of norm ‖W‖ at most."""
        if self.kind == "head_scale":
            return (matrix.reshape(len(numbers), -1) * numbers[:, None]).view_as(matrix)  # [head, head_dim · width]
        left, values, right = self._leading_factors(index, matrix)
        rank = len(values)
        if self.kind == "singular_values":
            return (left * (numbers * values)) @ right  # [rows, rank] @ [rank, width]
        # ‖U A Vᵀ‖ = ‖A‖ ≤ r for numbers in [−1, 1], hence the division by r.
        return left @ numbers.view(rank, rank) @ right * (float(matrix.norm()) / rank)

    def _leading_factors(self, index: int, matrix: Float[Tensor, "rows width"]) -> _Factors:
        """The leading singular triples of target ``index``, computed anew only when its weights have changed."""
        digest = checksum(matrix)
        kept = self._factors.get(index)
        if kept is None or kept[0] != digest:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)  # values in descending order
            rank = min(self._rank, len(values))
            # Clones, for views would keep the whole decomposition in memory.
            left, values, right = left[:, :rank].clone(), values[:rank].clone(), right[:rank].clone()
            # A decomposition may flip the sign of any pair of vectors; an action must mean the same every time.
            signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
            kept = digest, _Factors(left * signs, values, right * signs.T)
            self._factors[index] = kept
        return kept[1]


class _Factors(NamedTuple):
    left: Float[Tensor, "rows rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank width"]


def checksum(tensor: Tensor) -> str:
    """A digest of the values' bytes: equal for tensors that are the same bit for bit, NaN and −0 included."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()


# ---- trying, testing and committing ---------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What an edit is worth.

    Attributes:
        reward: quality after minus before.
        before: quality of the unedited student.
        after: quality of the edited student.
        relative_norm: largest ‖ΔW‖ / ‖W‖ of a target.
        bytes_held: memory for the copies of the targets.
        seconds: for edit, examination and restore.
    """

    reward: float
    before: Quality
    after: Quality
    relative_norm: float
    bytes_held: int
    seconds: float


class Surgery:
    """Tries, tests and commits edits of one student; their cost is added to the student's.

    Args:
        student: whose weights are edited.
        edit: the action space.
        examiner: measures quality.
        required_z: of the acceptance test, standard errors.
        moments: a key of ``MOMENT_SCALES``.
        world: the processes that share the windows of a test.
    """

    def __init__(
        self,
        student: Student,
        edit: ActionSpace,
        examiner: Examiner,
        *,
        required_z: float,
        moments: str,
        world: World = ALONE,
    ) -> None:
        self.edit = edit
        self._student = student
        self._examiner = examiner
        self._required_z = required_z
        self._moment_scale = MOMENT_SCALES[moments]
        self._world = world

    def examine(self, draws: Draws) -> Quality:
        """The quality of the student as it is now."""
        self._student.costs.flops += examination_flops(self._student, self._examiner)
        return self._examiner.examine(self._student.model, draws)

    def try_edit(self, action: Float[Tensor, " action"], *, before: Quality, draws: Draws) -> Trial:
        """Examines the student under ``action``; afterwards its weights are bit for bit what they were.

        Args:
            action: in [−1, 1].
            before: of the unedited student, on the same ``draws``.
            draws: prompts and noise.
        """
        began = time.perf_counter()
        with SurgicalTheater(self._student.model, self.edit.targets):
            size = self.edit.apply_(action)
            after = self.examine(draws)
        seconds = time.perf_counter() - began
        self._student.costs.evaluations += 1
        bytes_held = sum(target.view.nbytes for target in self.edit.targets)
        return Trial(after.total - before.total, before, after, size.max, bytes_held, seconds)

    def test(self, action: Float[Tensor, " action"], windows: Int[Tensor, "window time"]) -> Acceptance:
        """Compares losses on ``windows``, which no reward has seen, with and without the edit; commits what passes."""
        model = self._student.model
        losses = shared_window_losses(model, windows, self._world)  # [window]
        with SurgicalTheater(model, self.edit.targets) as theater:
            self.edit.apply_(action)
            after = shared_window_losses(model, windows, self._world)
            result = acceptance(losses, after, required_z=self._required_z)
            if result.passed:
                self._keep(theater)
        self._student.costs.flops += 2 * windows[:, 1:].numel() * self._student.flops_per_token
        return result

    def commit(self, action: Float[Tensor, " action"]) -> None:
        """Makes an edit for good without a test, as the verification of a recorded run does."""
        with SurgicalTheater(self._student.model, self.edit.targets) as theater:
            self.edit.apply_(action)
            self._keep(theater)

    def _keep(self, theater: SurgicalTheater) -> None:
        rescale_moments(self._student.optimizer, (t.parameter for t in self.edit.targets), self._moment_scale)
        theater.commit()


def rescale_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Rescales what ``optimizer`` remembers of ``parameters``, as if all gradients so far were ``scale`` times larger.

    Where a target is a part of a parameter (one role of a fused matrix), the whole parameter is meant. At 0 the step
    count goes too, as if the parameter were new: Adam's bias correction belongs to its moments.

    Args:
        optimizer: any Adam, or SGD.
        parameters: each counts once, however often it is named.
        scale: in [0, 1], dimensionless; 1 changes nothing.

    Raises:
        ModelError: the optimizer remembers something else than moments; nothing has changed then.
    """
    if scale == 1.0:
        return
    states = [optimizer.state.get(parameter, {}) for parameter in dict.fromkeys(parameters)]
    for state in states:
        memory = {name for name, value in state.items() if name != "step" and value is not None}
        memory = {name for name, value in state.items() if name != "step" and value is not None}
        if unknown := sorted(memory - _MOMENT_POWERS.keys()):
            raise ModelError(
                f"{type(optimizer).__name__} remembers {unknown[0]!r}, which is no moment; set `edit.moments` to keep"
            )
    for state in states:
        for name, value in state.items():
            if name in _MOMENT_POWERS and value is not None:
                value.mul_(scale ** _MOMENT_POWERS[name])  # a mean of squared gradients scales by the square
        if scale == 0 and "step" in state:
            state["step"] *= 0


def examination_flops(student: Student, examiner: Examiner) -> int:
    """Operations of one examination: the student reads windows and writes, the reference model reads what it wrote."""
    student_tokens, reference_tokens = examiner.num_tokens
    return student_tokens * student.flops_per_token + reference_tokens * student.reference_flops_per_token


def gradient_steps(
    student: Student, examiner: Examiner, *, num_edits: int, acceptance_tokens: int, step_flops: int
) -> int:
    """Gradient steps that cost as much as ``num_edits`` edits if every edit is tested, rounded up; at least 1."""
    edit_flops = 2 * examination_flops(student, examiner) + 2 * acceptance_tokens * student.flops_per_token
    return max(1, -(-num_edits * edit_flops // step_flops))
