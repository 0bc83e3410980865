"""Simple calibration: every output of every matrix scaled in closed form, by whoever has the original weights.

A compressor has them, so this is what it can do without a search. All three scale the rows of
:func:`~preceptor.systems.surgery.damage.rows_of_outputs`, q of the damaged matrix and w of the original.

A projection is left alone by the first: where weights are pruned, or singular values truncated, w − q is orthogonal to
q, so ⟨w, q⟩ = ⟨q, q⟩ and every scale is 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preceptor.lm.edit_targets import Target
from preceptor.systems.surgery.damage import rows_of_outputs, write_rows_of_outputs
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.rewards import next_token_logits


def nearest_scales(damaged: Float[Tensor, "out in"], original: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """⟨w, q⟩ / ⟨q, q⟩ of every row, which minimises ‖w − s q‖; 1 where q is 0.

    >>> nearest_scales(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    tensor([1.5000, 1.0000])
    """
    return _ratio((original * damaged).sum(1), damaged.square().sum(1))


def norm_scales(damaged: Float[Tensor, "out in"], original: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """‖w‖ / ‖q‖ of every row; 1 where q is 0.

    >>> norm_scales(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    tensor([2.5000, 1.0000])
    """
    return _ratio(original.norm(dim=1), damaged.norm(dim=1))


def output_scales(
    damaged: Float[Tensor, "out in"], original: Float[Tensor, "out in"], covariance: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    """wᵀ C q / qᵀ C q of every row, which minimises the mean of (w·x − s q·x)² over inputs x; 1 where that is 0.

    ``covariance`` is C = mean of x xᵀ, not centred. With C = 1 these are the :func:`nearest_scales`.

    >>> rows = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    >>> output_scales(*rows, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    tensor([1.7500])
    """
    seen = damaged @ covariance  # [out, in]
    return _ratio((original * seen).sum(1), (damaged * seen).sum(1))


def _ratio(numerator: Float[Tensor, " out"], denominator: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 1.0)


def calibrate(patient: Patient, method: str, kind: str, windows: Int[Tensor, "window time"]) -> Iterator[int]:
    """Scales every row of the damaged ``patient``, once.

    Args:
        patient: under a damage of ``kind``.
        method: ``calibration`` (:func:`nearest_scales`), ``calibration_norms`` or ``calibration_outputs``.
        kind: of damage, which says what the original is.
        windows: whose inputs count for ``calibration_outputs``; the others look at no text.
    """
    damaged = patient.snapshot()
    patient.restore(kind)
    originals = [rows_of_outputs(target) for target in patient.targets]
    covariances = _covariances(patient, windows) if method == "calibration_outputs" else []
    patient.put(damaged)
    for index, target in enumerate(patient.targets):
        rows = rows_of_outputs(target)
        if method == "calibration_outputs":
            scales = output_scales(rows, originals[index], covariances[index])
        else:
            scales = (nearest_scales if method == "calibration" else norm_scales)(rows, originals[index])
        write_rows_of_outputs(target, scales[:, None] * rows)
    yield 1


@torch.no_grad()
def _covariances(patient: Patient, windows: Int[Tensor, "window time"]) -> list[Float[Tensor, "in in"]]:
    """Mean of x xᵀ over what goes into every target of the model as it is now, in one forward pass."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in dict.fromkeys(_module_name(target) for target in patient.targets):

        def see(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            flat = inputs[0].float().flatten(0, -2)  # [position, in]
            found[name] = flat.T @ flat / len(flat)

        handles.append(patient.model.get_submodule(name).register_forward_pre_hook(see))
    try:
        next_token_logits(patient.model, windows[:, :-1])
    finally:
        for handle in handles:
            handle.remove()
    return [found[_module_name(target)] for target in patient.targets]


def _module_name(target: Target) -> str:
    return target.name.removesuffix(".weight")
