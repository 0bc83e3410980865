"""Ways to repair one damaged model, each a generator that yields the number of evaluations spent so far.

After every yield the model's weights are what the method recommends. An evaluation is a forward pass over the search's
windows; one of ``amortised``, ``shuffled``, ``gradient`` and ``tuning`` has a backward pass too, and so costs three
forward passes. A surgeon that sees no gradient (``amortised.gradients=false``) has none, and costs one. What is known
before the first edit (the damaged model's own loss) is free to everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from preceptor.errors import MissingExtraError
from preceptor.systems.surgery.baselines import make_surgeon
from preceptor.systems.surgery.config import AgentOptions
from preceptor.systems.surgery.damage import Undo
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.sites import FEATURE_DIM, mean_loss, only_gradients_of

EVALUATIONS = (1, 2, 3, 10, 50, 100)
"""Numbers of evaluations at which a repair is judged."""

LEAPS = {"cma_es": 8}
"""Evaluations between two recommendations, where they are more than one."""

EDITS = 3
"""Edits that a trained surgeon makes."""
GRADIENT_STEPS = 50
GRADIENT_RATE = 0.2
"""Learning rate of Adam on the logarithms of scales."""
TUNING_RATE = 1e-3
"""Learning rate of Adam on weights."""

GROWTH = 1.5
STEP_LIMITS = (0.01, 1.0)
CMA_STEP = 0.4


def trained(
    patient: Patient, act: Callable[[Tensor], Tensor], *, windows: Callable[[int], Tensor], gradients: bool
) -> Iterator[int]:
    """Edits of a trained policy, one an evaluation: what it sees is fresh text every time, and nothing is tested."""
    for edit in range(1, EDITS + 1):
        features, _ = patient.sites.features(windows(edit), gradients=gradients)  # [site, feature]
        patient.sites.apply_(act(features))
        yield edit


def inverse(undo: Undo) -> Iterator[int]:
    """The exact inverse of the damage."""
    undo()
    yield 1


def norms(patient: Patient) -> Iterator[int]:
    """Every part's norm becomes the geometric mean of those of its matrix: a guess without any evaluation."""
    log_norms = [patient.sites.log_norms(target) for target in patient.sites.targets]  # [part] each
    patient.sites.scale_(torch.cat([each.mean() - each for each in log_norms]))
    yield 1


def gradient(patient: Patient, windows: Int[Tensor, "window time"], *, steps: int = GRADIENT_STEPS) -> Iterator[int]:
    """Adam on the logarithms of all scales."""
    logs = torch.zeros(patient.sites.action_dim, requires_grad=True)
    adam = torch.optim.Adam([logs], lr=GRADIENT_RATE)
    for step in range(1, steps + 1):
        before = logs.detach().clone()
        logs.grad = patient.sites.gradient(windows)
        adam.step()
        patient.sites.scale_(logs.detach() - before)
        yield step


def tuning(patient: Patient, windows: Callable[[int], Tensor], *, steps: int) -> Iterator[int]:
    """Adam on all weights that a damage may touch, each step on text of its own: plain fine-tuning."""
    parameters = patient.parameters
    adam = torch.optim.Adam(parameters, lr=TUNING_RATE)
    for step in range(1, steps + 1):
        batch = windows(step)
        with only_gradients_of(patient.model, parameters):
            loss = mean_loss(patient.model(input_ids=batch[:, :-1], use_cache=False).logits, batch)
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = slope
            adam.step()
            adam.zero_grad(set_to_none=True)
        yield step


def evolution(
    patient: Patient, windows: Int[Tensor, "window time"], generator: torch.Generator, *, evaluations: int
) -> Iterator[int]:
    """(1+1)-ES with the one-fifth rule, on the logarithms of all scales.

    Unlike :class:`~preceptor.systems.surgery.baselines.EvolutionSurgeon` its step may shrink to 0.01, since here the
    windows are fixed and their loss has no noise.
    """
    best, lowest, step = patient.snapshot(), patient.loss(windows), 0.3
    for evaluation in range(1, evaluations + 1):
        patient.put(best)
        patient.sites.scale_(step * torch.randn(patient.sites.action_dim, generator=generator))
        loss = patient.loss(windows)
        if loss < lowest:
            best, lowest, step = patient.snapshot(), loss, step * GROWTH
        else:
            patient.put(best)
            step *= GROWTH**-0.25
        step = min(max(step, STEP_LIMITS[0]), STEP_LIMITS[1])
        yield evaluation


def cma_es(
    patient: Patient, windows: Int[Tensor, "window time"], generator: torch.Generator, *, evaluations: int
) -> Iterator[int]:
    """CMA-ES on the logarithms of all scales; its recommendation is the mean of its distribution.

    Source: Hansen, arXiv 1604.00772, by the package ``cma``.

    Raises:
        MissingExtraError: ``cma`` is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise MissingExtraError("repair by cma_es", package="cma", extra="cma") from error
    draws = np.random.default_rng(generator.initial_seed() % 2**32)
    search = cma.CMAEvolutionStrategy(
        np.zeros(patient.sites.action_dim),
        CMA_STEP,
        # Its own draws come from numpy's global generator; `randn` takes them from ours, and no seed is set.
        {"popsize": LEAPS["cma_es"], "verbose": -9, "seed": np.nan, "randn": lambda *size: draws.standard_normal(size)},
    )
    damaged, evaluation = patient.snapshot(), 0

    def scaled(logs: np.ndarray) -> None:
        patient.put(damaged)
        patient.sites.scale_(torch.tensor(logs, dtype=torch.float32))

    while evaluation + LEAPS["cma_es"] <= evaluations:
        candidates, losses = search.ask(), []
        for candidate in candidates:
            scaled(candidate)
            losses.append(patient.loss(windows))
        search.tell(candidates, losses)
        evaluation += LEAPS["cma_es"]
        scaled(search.result.xfavorite)
        yield evaluation


def sac(
    patient: Patient,
    windows: Int[Tensor, "window time"],
    generator: torch.Generator,
    *,
    evaluations: int,
    folder: Path,
    draws: Callable[[int], torch.Generator],
) -> Iterator[int]:
    """SAC that starts from nothing, with the defaults of the three phases; what lowers the loss stays."""
    num_sites = patient.sites.action_dim
    surgeon = make_surgeon(
        "learned",
        state_dim=num_sites * FEATURE_DIM,
        action_dim=num_sites,
        learned_actions=(),
        best_of=1,
        agent=AgentOptions(),
        generator=generator,
        spill_folder=folder,
    )
    assert surgeon is not None, "a name was given"
    lowest = patient.loss(windows)
    for evaluation in range(1, evaluations + 1):
        draw = draws(evaluation)
        before = patient.snapshot()
        state = patient.sites.features(windows, gradients=False)[0].flatten()
        action = surgeon.propose(state, generator=draw)
        patient.sites.apply_(action)
        loss = patient.loss(windows)
        kept = loss < lowest and math.isfinite(loss)
        surgeon.observe(state, action, lowest - loss, committed=kept, generator=draw)
        if kept:
            lowest = loss
        else:
            patient.put(before)
        yield evaluation
