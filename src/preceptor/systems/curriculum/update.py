"""The update: cross-entropy on documents and PPO on rollouts in one loss, over epochs of minibatches.

    loss = w_ce · mean −ln π(document token) + w_ppo · [ policy loss + β · KL(π ‖ reference) ]      (policy)
    loss = value loss                                                                               (value network)

A step's documents are spread evenly over its minibatches, so each document is used once. Only :func:`optimizer_step`
changes weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.lm.model import LanguageModel
from preceptor.runs.guard import first_nonfinite
from preceptor.systems.curriculum.loss import (
    Documents,
    Experience,
    accumulate_by_dataset,
    accumulate_cross_entropy,
    accumulate_ppo,
)
from preceptor.systems.curriculum.policy import rollout_sampling
from preceptor.systems.curriculum.setup import Setup
from preceptor.systems.curriculum.state import State
from preceptor.systems.curriculum.sums import Sums

MAX_SAMPLER_KL = 1e-6
"""KL(sampler ‖ scorer) of the same weights, nats a token, above which they are not the same: rounding gives 1e-11."""


@dataclass(frozen=True)
class UpdateResult:
    """Metrics of an update; ``nonfinite`` names what kept optimizer steps from being taken.

    ``gradients`` are those of each dataset's mean loss before the update, if they were asked for, and ``losses`` the
    mean loss of each dataset in nats per token, NaN where it had no row.
    """

    metrics: dict[str, Any]
    nonfinite: list[str]
    gradients: dict[int, list[Tensor]]
    losses: Float[Tensor, " choices"]


def update(
    setup: Setup, state: State, documents: Documents, experience: Experience | None, *, by_dataset: bool = False
) -> UpdateResult:
    """Epochs of minibatches over the rollouts, each with its part of the documents; one optimizer step for each.

    Without rollouts the documents are cut into as many parts as with them, so that methods differ in what they learn
    from and not in how many optimizer steps they take. Once the KL from the policy that sampled exceeds the early
    stop, the rest of the update is cross-entropy alone.
    """
    ppo, options = setup.config.ppo, setup.config.update
    sums, world = Sums(), setup.run.world
    num_minibatches = ppo.epochs * ppo.minibatches if ppo.weight else 1
    document_parts = torch.arange(len(documents)).tensor_split(num_minibatches)
    loss_sums = torch.zeros(state.mixture.num_datasets, 2, dtype=torch.float64)  # per dataset: sum, number of tokens
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    minibatches: list[Tensor] = []
    nonfinite: list[str] = []
    gradients: dict[int, list[Tensor]] = {}
    num_used, stopped_early = 0, False
    for rows in document_parts:
        part, minibatch = documents.at(rows), None
        if experience is not None and not stopped_early:
            if not minibatches:  # a new epoch
                order = torch.randperm(len(experience.rollouts), generator=setup.run.streams["minibatch"])
                minibatches = list(order.tensor_split(ppo.minibatches))
            minibatch = experience.at(minibatches.pop(0).to(state.lm.device))
        # Gradients of datasets are of the first part alone, at the weights that the step began with.
        asked = by_dataset and not gradients
        accumulate = partial(accumulate_minibatch, setup, state, part, minibatch, by_dataset=asked, sums=sums)
        num_rows = max(world.most_rows(len(part)), world.most_rows(len(minibatch.rollouts) if minibatch else 0))
        with state.micro_batch.first_trial(num_rows) as trial:
            given = accumulate(micro_batch_size=trial.size)
        if trial.ran_out:
            given = state.micro_batch.search(trial.size, accumulate, parameters)
        sums, gradients = given.sums, gradients or given.gradients
        loss_sums += given.loss_sums
        if asked:
            for taken in gradients.values():
                world.sum_in_place(taken)
        if minibatch is not None:
            kl_from_old_policy = float(world.sum(torch.tensor(given.kl_from_old_policy, dtype=torch.float64)))
            if (
                num_used == 0 and kl_from_old_policy > MAX_SAMPLER_KL
            ):  # no step yet, so the ratio is 1 but for the engine
                state.lm.give_up_engine(
                    f"sampler and scorer are {kl_from_old_policy:.1e} nats a token apart before any step, "
                    f"{MAX_SAMPLER_KL:.0e} are allowed"
                )
            num_used += 1
            stopped_early = ppo.kl_early_stop > 0 and kl_from_old_policy > ppo.kl_early_stop
        world.sum_gradients(parameters)
        if (reason := optimizer_step(state, clip_norm=options.clip_norm, sums=sums)) is not None:
            nonfinite.append(reason)
    state.micro_batch.agree(world)
    if not nonfinite:  # ends the guard's count of skipped steps in a row
        state.guard.ok()
    metrics: dict[str, Any] = dict(sums.shared(world).means())
    loss_sums = world.sum(loss_sums)
    if loss_sums[:, 1].sum():
        metrics["cross_entropy"] = float(loss_sums[:, 0].sum() / loss_sums[:, 1].sum())
    if experience is not None:
        metrics["minibatches_used"] = num_used
    if state.micro_batch.found:
        metrics["micro_batch_size"] = state.micro_batch.found
    return UpdateResult(metrics, nonfinite, gradients, loss_sums[:, 0] / loss_sums[:, 1])


def kl_reference_model(setup: Setup, state: State) -> LanguageModel:
    """The model that the KL keeps the policy close to."""
    return state.frozen_model if setup.config.ppo.kl_reference == "frozen" else setup.initial_model


def optimizer_step(state: State, *, clip_norm: float, sums: Sums) -> str | None:
    """One step of the optimizer, with the gradients of policy and value network clipped separately; clears them.

    Returns:
        which gradient is not finite, and then no step was taken; else None.
    """
    named = list(state.lm.trainable_parameters().items())
    if state.value_network is not None:
        named += [(f"value {name}", parameter) for name, parameter in state.value_network.named_parameters()]
    reason = first_nonfinite((f"gradient of {name}", parameter.grad) for name, parameter in named)
    if reason is None:
        names = ("gradient_norm", "value_gradient_norm")
        for name, group in zip(names, state.optimizer.param_groups, strict=False):  # one group or both
            sums.add(name, nn.utils.clip_grad_norm_(group["params"], clip_norm))
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return reason


class Minibatch(NamedTuple):
    """What one minibatch gave beside its gradient; of this process's rows where processes share them.

    ``loss_sums`` are of the documents, ``gradients`` of each dataset's mean loss, if they were asked for, ``sums`` the
    step's metrics so far, this minibatch's included.
    """

    loss_sums: Float[Tensor, "choices 2"]
    gradients: dict[int, list[Tensor]]
    sums: Sums
    kl_from_old_policy: float


def accumulate_minibatch(
    setup: Setup,
    state: State,
    documents: Documents,
    minibatch: Experience | None,
    *,
    by_dataset: bool,
    sums: Sums,
    micro_batch_size: int,
) -> Minibatch:
    """Adds the gradient of ``documents`` and ``minibatch``; changes nothing else, so that it can be tried again.

    Nothing in it waits for another process, which may have had the memory that this one lacks.
    """
    ppo, options, world = setup.config.ppo, setup.config.update, setup.run.world
    loss_sums = torch.zeros(state.mixture.num_datasets, 2, dtype=torch.float64)
    gradients: dict[int, list[Tensor]] = {}
    sums, kl_from_old_policy = sums.copy(), 0.0
    if options.cross_entropy_weight and len(documents):
        arguments: dict[str, Any] = {
            "weight": options.cross_entropy_weight,
            "num_datasets": len(loss_sums),
            "micro_batch_size": micro_batch_size,
            "bf16": options.bf16,
            "world": world,
        }
        if by_dataset:
            loss_sums, gradients = accumulate_by_dataset(state.lm, documents, **arguments)
        else:
            loss_sums = accumulate_cross_entropy(state.lm, documents, **arguments)
    if minibatch is not None:
        kl_from_old_policy = accumulate_ppo(
            state.lm,
            minibatch,
            sampling=rollout_sampling(state.lm, ppo.temperature),
            options=ppo,
            kl_coefficient=state.kl_coefficient,
            value_network=state.value_network,
            reference_model=kl_reference_model(setup, state),
            micro_batch_size=micro_batch_size,
            bf16=options.bf16,
            sums=sums,
            world=world,
        )
    return Minibatch(loss_sums, gradients, sums, kl_from_old_policy)
