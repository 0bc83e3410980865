"""Everything that training changes: models, optimizer, mixture, sampler, outcomes; all of it is in a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from preceptor.data.corpora.mixture import MixtureSampler
from preceptor.errors import CheckpointError
from preceptor.lm.model import LanguageModel
from preceptor.objectives.kl import AdaptiveKLController
from preceptor.objectives.mixture import make_mixture
from preceptor.objectives.task_mixture import TaskMixture, make_task_mixture
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.guard import MicroBatch, NonFiniteGuard
from preceptor.runs.random import derived_seed
from preceptor.systems.curriculum.baselines import Method
from preceptor.systems.curriculum.config import UpdateOptions
from preceptor.systems.curriculum.result import Outcome
from preceptor.systems.curriculum.rewards import reward_terms
from preceptor.systems.curriculum.setup import Setup
from preceptor.systems.curriculum.value_network import ValueNetwork, build_value_network


class State:
    """The method in training and the outcomes of all methods so far; starts with the first method.

    Attributes:
        method: in training.
        steps_before: steps of the run that the methods before it took.
        lm: the policy; the same object as ``setup.lm``.
        frozen_model: the rolling copy that measures difficulty; it shares no storage with the policy.
        terms: of the reward; none without a policy gradient.
        value_network: of ``gae``, else None.
        optimizer: over the policy's weights and the value network's.
        mixture: weights of the datasets, and the rule that moves them.
        prompt_mixture: of the datasets that prompts come from; None where they follow ``mixture``.
        sampler: draws rows of documents by those weights.
        kl: moves the KL coefficient; None where it is fixed.
        guard: counts optimizer steps that were skipped because a gradient was not finite.
        micro_batch: rows per forward and backward pass, the same for all methods.
        sample: indices of the rows of each dataset that difficulty is measured on.
        sample_losses: of those rows at the last measurement, nats per token.
        tokens_since: tokens of each dataset trained on since the last measurement, float64.
        target_gradients: of each target that is not learned from, where the rule follows gradients.
        best_loss: smallest macro mean of the validation losses, nats per token.
        outcomes: of each method so far, this one included, by name.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.lm = setup.lm
        self.frozen_model = setup.lm.frozen_copy()
        self.outcomes: dict[str, Outcome] = {}
        self.micro_batch = MicroBatch(setup.config.update.micro_batch_size)
        self.begin(setup.methods[0])

    def begin(self, method: Method) -> None:
        """Puts the policy back to its initial weights and makes everything else of ``method`` anew."""
        setup, config = self._setup, self._setup.config
        self.method = method
        self.steps_before = setup.steps_before(method)
        copy_tensors(setup.initial_weights, self.lm.trainable_parameters())
        self.refresh_frozen_model()
        self.terms = (
            reward_terms(config.ppo.rewards, self.lm, likelihood=self.frozen_model) if method.policy_gradient else []
        )
        self.value_network: ValueNetwork | None = None
        if method.policy_gradient and config.ppo.advantage == "gae":
            self.value_network = build_value_network(
                self.lm,
                kind=config.value.kind,
                width=config.value.width,
                num_layers=config.value.num_layers,
                seed=derived_seed(config.seed, "value network"),
            )
        self.optimizer = build_optimizer(
            self.lm,
            self.value_network,
            config.update,
            value_learning_rate=config.value.learning_rate,
            learns=method.learns,
        )
        self.mixture = make_mixture(
            method.rule,
            num_datasets=len(setup.corpora),
            sizes=[corpus.train.num_tokens for corpus in setup.corpora],
            weights=method.weights or None,
            exploration=config.mixture.exploration,
            targets=[corpus.target for corpus in setup.corpora],
            target_share=config.mixture.target_share,
            **method.settings,
        )
        self.prompt_mixture: TaskMixture | None = None
        if method.policy_gradient and config.ppo.prompt_rule != "mixture":
            self.prompt_mixture = make_task_mixture(config.ppo.prompt_rule, num_levels=[1] * len(setup.corpora))
        # The sampler's seed does not depend on the method: under equal weights all methods see the same rows.
        self.sampler = MixtureSampler(
            {corpus.name: len(corpus.train) for corpus in setup.corpora},
            seed=derived_seed(config.seed, "documents") % 2**63,
        )
        self.kl: AdaptiveKLController | None = None
        if method.policy_gradient and config.ppo.kl_target and config.ppo.kl_place != "none":
            self.kl = AdaptiveKLController(
                coefficient=config.ppo.kl_coefficient, target=config.ppo.kl_target, horizon=config.ppo.kl_horizon
            )
        self.guard = NonFiniteGuard()
        self.sample: list[list[int]] = []  # drawn at the first measurement
        self.sample_losses: list[Tensor] = []
        self.tokens_since = torch.zeros(len(setup.corpora), dtype=torch.float64)
        self.target_gradients: list[list[Tensor]] = []
        self.best_loss = math.inf
        self.outcomes[method.name] = Outcome()

    @property
    def outcome(self) -> Outcome:
        """Of the method in training, so far."""
        return self.outcomes[self.method.name]

    @property
    def kl_coefficient(self) -> float:
        """β, in reward per nat."""
        return self._setup.config.ppo.kl_coefficient if self.kl is None else self.kl.coefficient

    def refresh_frozen_model(self) -> None:
        """Makes the frozen copy the policy as it is now, in storage of its own."""
        self.frozen_model.model.load_state_dict(self.lm.model.state_dict())

    def set_learning_rate(self, scale: float) -> None:
        """Multiplies the learning rate of every parameter group by ``scale``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale

    def state_dict(self) -> dict[str, Any]:
        """All of the above, as nested tensors and plain values."""
        return {
            "method": self.method.name,
            **self._live_tensors(),
            "engine": self.lm.engine_state(),
            "optimizer": optimizer_state(self.optimizer),
            "mixture": self.mixture.state_dict(),
            "prompt_mixture": None if self.prompt_mixture is None else self.prompt_mixture.state_dict(),
            "sampler": self.sampler.state_dict(),
            "kl": None if self.kl is None else self.kl.state_dict(),
            "guard": self.guard.state_dict(),
            "micro_batch": self.micro_batch.state_dict(),
            "sample": self.sample,
            "sample_losses": self.sample_losses,
            "tokens_since": self.tokens_since,
            "target_gradients": self.target_gradients,
            "best_loss": self.best_loss,
            "outcomes": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the method that ``state_dict`` was taken of.

        Raises:
            CheckpointError: it is of a method that this configuration does not have, or of another model.
        """
        by_name = {method.name: method for method in self._setup.methods}
        if state["method"] not in by_name:
            raise CheckpointError(
                f"the checkpoint is of the method {state['method']}, this run has {', '.join(by_name)}; "
                "resume with the same configuration"
            )
        # Builds the networks and the optimizer that this method has; then everything is overwritten in place.
        self.begin(by_name[state["method"]])
        for name, tensors in self._live_tensors().items():
            copy_tensors(state[name], tensors)
        self.lm.load_engine_state(state["engine"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.mixture.load_state_dict(state["mixture"])
        if self.prompt_mixture is not None:
            self.prompt_mixture.load_state_dict(state["prompt_mixture"])
        self.sampler.load_state_dict(state["sampler"])
        if self.kl is not None:
            self.kl.load_state_dict(state["kl"])
        self.guard.load_state_dict(state["guard"])
        self.micro_batch.load_state_dict(state.get("micro_batch", {"found": 0}))  # runs before trials have none
        self.sample = state["sample"]
        self.sample_losses = state["sample_losses"]
        self.tokens_since = state["tokens_since"]
        self.target_gradients = state["target_gradients"]
        self.best_loss = state["best_loss"]
        self.outcomes = {name: Outcome(**outcome) for name, outcome in state["outcomes"].items()}

    def _live_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The weights of each network that can differ from those it began with."""
        policy = {name: parameter.detach() for name, parameter in self.lm.trainable_parameters().items()}
        # Nothing of the frozen copy is trainable; it differs from the initial model where the policy does.
        frozen: dict[str, Tensor] = {
            name: tensor for name, tensor in self.frozen_model.model.named_parameters() if name in policy
        }
        value_network: dict[str, Tensor] = {}
        if self.value_network is not None:
            value_network = {
                name: parameter.detach()
                for name, parameter in self.value_network.named_parameters()
                if parameter.requires_grad
            }
        return {"policy": policy, "frozen_model": frozen, "value_network": value_network}


def build_optimizer(
    lm: LanguageModel,
    value_network: ValueNetwork | None,
    options: UpdateOptions,
    *,
    value_learning_rate: float,
    learns: bool,
) -> torch.optim.Optimizer:
    """AdamW over the policy and the value network, each with its own learning rate; both are 0 unless ``learns``."""
    # `initial_lr` is what the schedule multiplies at every step.
    groups: list[dict[str, Any]] = [
        {"params": list(lm.trainable_parameters().values()), "initial_lr": options.learning_rate * learns}
    ]
    if value_network is not None:
        parameters = [parameter for parameter in value_network.parameters() if parameter.requires_grad]
        groups.append({"params": parameters, "initial_lr": value_learning_rate * learns})
    for group in groups:
        group["lr"] = group["initial_lr"]
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def learning_rate_scale(step: int, options: UpdateOptions, *, num_steps: int = 0) -> float:
    """Factor in (0, 1] on the learning rates at ``step`` of a method (from 1): linear warm-up, then the decay.

    The decay ends after ``num_steps`` steps, or after ``options.steps`` where that is 0.

    >>> [learning_rate_scale(s, UpdateOptions(steps=4, warm_up_steps=2, decay="linear")) for s in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm_up = options.warm_up_steps
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up - 1) / max(
        (num_steps or options.steps) - warm_up, 1
    )  # of the decay, in [0, 1): the last rate is above 0
    if options.decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if options.decay == "cosine" else 1.0
