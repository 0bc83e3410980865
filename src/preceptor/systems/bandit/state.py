"""Everything that training changes and a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preceptor.lm.model import LanguageModel
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.guard import NonFiniteGuard, guarded_step
from preceptor.systems.bandit.config import PretrainingOptions, UpdateOptions
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.episodes import Scored
from preceptor.systems.bandit.rewards import RewardBaseline
from preceptor.systems.bandit.setup import InContextSetup, Setup

VALUE_SCALE = 5.0
"""Regrets are divided by this, so that the values of a first state are of the order of 1."""


class State:
    """The state of training, through both phases: pretraining, then REINFORCE.

    Attributes:
        parameters: what moves, by name.
        optimizer: of the present phase.
        initial_model: the model before the first reward, frozen: a control, and the reference of the KL. None during
            pretraining.
        baseline: the reward baseline.
        queue: batches left in this epoch, the next one last: number of the bandit, indices of its prompts.
        regret: cumulative regret of each bandit after each of its steps, in expected reward.
        num_pulls, num_best, reward_sum: pulls, pulls of the best word, and sum of rewards of each bandit.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        names = [bandit.name for bandit in setup.bandits]
        self.parameters = setup.lm.trainable_parameters()
        self.optimizer = self._fresh_optimizer(setup.config.pretraining)
        self.initial_model: LanguageModel | None = None
        self.baseline = RewardBaseline(setup.config.update.baseline, names)
        self.guard = NonFiniteGuard()
        self.queue: list[tuple[int, list[int]]] = []
        self.regret: dict[str, list[float]] = {name: [] for name in names}
        self.num_pulls = dict.fromkeys(names, 0)
        self.num_best = dict.fromkeys(names, 0)
        self.reward_sum = dict.fromkeys(names, 0.0)

    def begin_rewards(self) -> None:
        """Passes from pretraining to REINFORCE: keeps the model as it is now, and starts a fresh optimizer."""
        self.initial_model = self.setup.lm.frozen_copy()
        self.optimizer = self._fresh_optimizer(self.setup.config.update)

    def _fresh_optimizer(self, options: PretrainingOptions | UpdateOptions) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay)

    def descend(self, loss: Tensor | None, step: int, *, clip_norm: float) -> float:
        """One optimizer step down ``loss``; the gradient's norm before clipping, NaN for a step that was skipped.

        In a run on many processes ``loss`` is this process's part of a sum, None where it has no part.
        """
        if loss is not None:
            loss.backward()
        self.setup.run.world.sum_gradients(self.parameters.values())
        return guarded_step(
            self.guard,
            self.optimizer,
            self.parameters,
            step=step,
            clip_norm=clip_norm,
            notice=self.setup.run.notice,
        )

    def count(self, bandit: Bandit, actions: Int[Tensor, " batch"], rewards: Float[Tensor, " batch"]) -> None:
        """Adds a batch of pulls to the totals; regret is against the best word's expected reward."""
        name, expected = bandit.name, bandit.expected
        before = self.regret[name][-1] if self.regret[name] else 0.0
        self.regret[name].append(before + float((expected.max() - expected[actions]).sum()))
        self.num_pulls[name] += len(actions)
        self.num_best[name] += int((expected[actions] == expected.max()).sum())
        self.reward_sum[name] += float(rewards.sum())

    def mean_rewards(self) -> dict[str, float]:
        """Mean reward so far of each bandit that was played."""
        return {name: self.reward_sum[name] / pulls for name, pulls in self.num_pulls.items() if pulls}

    def state_dict(self) -> dict[str, Any]:
        """The weights of both models, the optimizer, and everything counted."""
        state = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": optimizer_state(self.optimizer),
            "baseline": self.baseline.state_dict(),
            "guard": self.guard.state_dict(),
            "queue": self.queue,
            "regret": self.regret,
            "num_pulls": self.num_pulls,
            "num_best": self.num_best,
            "reward_sum": self.reward_sum,
        }
        if self.initial_model is not None:
            state["initial_model"] = dict(self.initial_model.model.named_parameters())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over :meth:`state_dict`; raises ``CheckpointError`` for another model's."""
        copy_tensors(state["model"], self.parameters)
        # Both phases use AdamW over the same parameters, and the phase's settings come from the saved state.
        load_optimizer(self.optimizer, state["optimizer"])
        if "initial_model" in state:
            self.initial_model = self.setup.lm.frozen_copy()
            copy_tensors(state["initial_model"], dict(self.initial_model.model.named_parameters()))
        self.baseline.load_state_dict(state["baseline"])
        self.guard.load_state_dict(state["guard"])
        self.queue = state["queue"]
        self.regret = state["regret"]
        self.num_pulls, self.num_best, self.reward_sum = (
            state[name] for name in ("num_pulls", "num_best", "reward_sum")
        )


class InContextState:
    """The same for mode ``in-context``: through its warm start and its updates on rewards.

    Attributes:
        parameters: of model and value head, by name.
        value_head: from a layer's output to the expected sum of later rewards, in ``VALUE_SCALE``.
        warm_model: the model when its warm start ended, frozen; None before, and without one.
        difficulty: of the warm start, from 0 (nearly certain rewards) to 1 (the prior).
        agreement: running mean of how often the model's favorite was the better arm by the rewards so far.
        num_pulls, num_teacher_pulls: rounds that the model played, and that were played or labeled by others.
    """

    def __init__(self, setup: InContextSetup) -> None:
        self.setup = setup
        width = int(setup.lm.model.config.get_text_config().hidden_size)
        value = nn.Linear(width, 1)
        nn.init.zeros_(value.weight)
        nn.init.zeros_(value.bias)
        self.value_head = nn.Sequential(nn.LayerNorm(width), value).to(setup.lm.device)
        self.parameters: dict[str, nn.Parameter] = {
            **setup.lm.trainable_parameters(),
            **{f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()},
        }
        self.optimizer = self._fresh_optimizer()
        self.guard = NonFiniteGuard()
        self.warm_model: LanguageModel | None = None
        self.difficulty = self.agreement = 0.0
        self.num_pulls = self.num_teacher_pulls = 0

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))

    def begin_rewards(self) -> None:
        """Passes from the warm start to rewards: keeps the model as it is now, and starts a fresh optimizer."""
        self.warm_model = self.setup.lm.frozen_copy()
        self.optimizer = self._fresh_optimizer()

    def descend(self, loss: Tensor | None, step: int, *, learning_rate: float) -> float:
        """One optimizer step down ``loss``, as :meth:`State.descend`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if loss is not None:
            loss.backward()
        if len(self.setup.fresh_tokens) and (gradient := self.setup.token_vectors.grad) is not None:
            gradient[self.setup.fresh_tokens] = 0  # drawn anew for every update, so not learned
        self.setup.run.world.sum_gradients(self.parameters.values())
        return guarded_step(
            self.guard,
            self.optimizer,
            self.parameters,
            step=step,
            clip_norm=self.setup.config.in_context.clip_norm,
            notice=self.setup.run.notice,
        )

    def values(self, scored: Scored) -> Float[Tensor, "episodes rounds"]:
        """Expected sum of the rewards from each round on, in ``VALUE_SCALE``."""
        values: Tensor = self.value_head(scored.states.float())[..., 0]
        return values

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, and everything counted."""
        state = {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": optimizer_state(self.optimizer),
            "guard": self.guard.state_dict(),
            "difficulty": self.difficulty,
            "agreement": self.agreement,
            "num_pulls": self.num_pulls,
            "num_teacher_pulls": self.num_teacher_pulls,
        }
        if self.warm_model is not None:
            state["warm_model"] = dict(self.warm_model.model.named_parameters())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over :meth:`state_dict`; raises ``CheckpointError`` for another model's."""
        copy_tensors(state["parameters"], self.parameters)
        load_optimizer(self.optimizer, state["optimizer"])
        if "warm_model" in state:
            self.warm_model = self.setup.lm.frozen_copy()
            copy_tensors(state["warm_model"], dict(self.warm_model.model.named_parameters()))
        self.guard.load_state_dict(state["guard"])
        self.difficulty, self.agreement = state["difficulty"], state["agreement"]
        self.num_pulls, self.num_teacher_pulls = state["num_pulls"], state["num_teacher_pulls"]
