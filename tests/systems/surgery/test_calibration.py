"""Scales in closed form, by hand and against a slow search, and what they do to a damaged model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preceptor.systems.surgery.calibration import calibrate, nearest_scales, norm_scales, output_scales
from preceptor.systems.surgery.damage import rows_of_outputs, write_rows_of_outputs
from preceptor.systems.surgery.patient import Patient
from tests.systems.surgery.small import small_model

TOKENS = torch.randint(7, (400,), generator=torch.Generator().manual_seed(1))
METHODS = ("calibration", "calibration_norms", "calibration_outputs")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patient_of(architecture: str = "gpt2") -> Patient:
    model = small_model(architecture=architecture)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # so that the loss depends on the layers
    return Patient(
        "small", model, train=TOKENS, held_out=TOKENS, block_size=15, roles=("query", "output"), mlp=True,
        scope="layers", kind="head_scale", rank=1, max_factor=2.0,
    )  # fmt: skip


def test_by_hand() -> None:
    w = torch.tensor([[3.0, 1.0], [1.0, -1.0], [2.0, 2.0]])
    q = torch.tensor([[2.0, 0.0], [2.0, -2.0], [0.0, 0.0]])
    # (3·2 + 1·0)/4 = 3/2; (2 + 2)/8 = 1/2; nothing is left of the third row, which stays
    torch.testing.assert_close(nearest_scales(q, w), torch.tensor([1.5, 0.5, 1.0]))
    # √10/2; √2/√8 = 1/2
    torch.testing.assert_close(norm_scales(q, w), torch.tensor([10**0.5 / 2, 0.5, 1.0]))
    # C = [[1, ½], [½, 1]]: C q = (2, 1), (1, −1), 0. wᵀCq = 7, 2; qᵀCq = 4, 4
    covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    torch.testing.assert_close(output_scales(q, w, covariance), torch.tensor([7 / 4, 1 / 2, 1.0]))


def test_no_other_scale_is_nearer() -> None:
    draws = np.random.default_rng(0)
    w, q = draws.normal(size=(2, 3, 5))
    inputs = draws.normal(size=(40, 5))
    covariance = inputs.T @ inputs / 40
    as_tensors = [torch.tensor(each, dtype=torch.float32) for each in (q, w, covariance)]
    grid = np.linspace(-3, 3, 60_001)
    for row in range(3):
        in_weights = ((w[row] - grid[:, None] * q[row]) ** 2).sum(1)
        assert float(nearest_scales(*as_tensors[:2])[row]) == pytest.approx(grid[in_weights.argmin()], abs=2e-4)
        outputs, damaged = inputs @ w[row], inputs @ q[row]
        in_outputs = [((outputs - scale * damaged) ** 2).mean() for scale in grid[::20]]
        assert float(output_scales(*as_tensors)[row]) == pytest.approx(grid[::20][np.argmin(in_outputs)], abs=2e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_were_scaled_are_scaled_back(method: str, architecture: str) -> None:
    """A damage that calibration can undo exactly: every output of every matrix times a factor of its own."""
    patient = patient_of(architecture)
    windows = patient.windows(4, generator())
    clean, matrices = patient.loss(windows), [target.matrix() for target in patient.targets]
    for target in patient.targets:
        rows = rows_of_outputs(target)
        write_rows_of_outputs(target, rows * (0.5 + torch.rand(len(rows), 1, generator=generator(1))))
    assert abs(patient.loss(windows) - clean) > 0.01
    assert list(calibrate(patient, method, "round_2", windows)) == [1]
    for target, matrix in zip(patient.targets, matrices, strict=True):
        torch.testing.assert_close(target.matrix(), matrix, rtol=1e-3, atol=1e-5)
    assert patient.loss(windows) == pytest.approx(clean, abs=1e-4)


@pytest.mark.parametrize("kind", ["magnitude_pruning", "truncation"])
def test_a_projection_is_left_alone_by_the_nearest_scales_and_not_by_norms(kind: str) -> None:
    patient = patient_of()
    windows = patient.windows(2, generator())
    patient.damage(kind, strength=6.0, generator=generator())
    damaged = [target.matrix() for target in patient.targets]
    list(calibrate(patient, "calibration", kind, windows))
    for target, matrix in zip(patient.targets, damaged, strict=True):
        torch.testing.assert_close(target.matrix(), matrix, rtol=1e-3, atol=1e-5)
    list(calibrate(patient, "calibration_norms", kind, windows))
    for target, original in zip(patient.targets, _originals(patient), strict=True):
        norms, whole = rows_of_outputs(target).norm(dim=1), original.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], whole[norms > 0])
        assert bool((norms > 0).any())


def _originals(patient: Patient) -> list[torch.Tensor]:
    damaged = patient.snapshot()
    patient.restore()
    originals = [rows_of_outputs(target) for target in patient.targets]
    patient.put(damaged)
    return originals


def test_inputs_are_those_of_the_original_and_no_hook_stays() -> None:
    """The second layer's inputs depend on the first, so those of the damaged model would give other scales."""
    patient = patient_of()
    windows = patient.windows(2, generator())
    inputs: list[torch.Tensor] = []
    last = patient.model.transformer.h[1].mlp.c_fc  # type: ignore[union-attr, index]
    handle = last.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1).detach()))
    patient.loss(windows)
    handle.remove()
    w = last.weight.detach().T.clone()  # [out, in]
    patient.damage("round_2", strength=6.0, generator=generator())
    q = last.weight.detach().T.clone()
    list(calibrate(patient, "calibration_outputs", "round_2", windows))
    wanted, damaged = inputs[0] @ w.T, inputs[0] @ q.T  # [position, out]
    scales = (wanted * damaged).sum(0) / damaged.square().sum(0)
    torch.testing.assert_close(last.weight.detach().T, scales[:, None] * q, rtol=1e-3, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in patient.model.modules())
