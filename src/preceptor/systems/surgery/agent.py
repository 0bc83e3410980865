"""Soft actor-critic (Haarnoja et al., arXiv 1812.05905): the networks around the losses of ``objectives.sac``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from preceptor.errors import CheckpointError, ConfigError
from preceptor.objectives.sac import (
    sac_actor_loss,
    sac_critic_loss,
    sac_temperature_loss,
    sample_squashed_gaussian,
    soft_q_targets,
)
from preceptor.systems.surgery.replay_buffer import ReplayBuffer

_NUM_CRITICS = 2
_LOG_STANDARD_DEVIATIONS = (-5.0, 2.0)  # keeps the density finite; 2 is wide enough to be flat once squashed


class SacAgent:
    """A squashed Gaussian policy, twin critics with slowly following targets, and a temperature that sets itself.

    Args:
        state_dim: numbers in a state, which should be of order 1: the caller normalises.
        action_dim: numbers in an action.
        buffer: what the agent learns from.
        generator: draws the initial weights.
        hidden_dim: width of the two hidden layers of every network.
        learning_rate: of Adam, for all of them and for the logarithm of the temperature.
        discount: γ in [0, 1].
        target_step: τ in (0, 1], what part of the way to the critics the targets go at each update.
        batch_size: transitions of an update.
        initial_temperature: α > 0 at the start, reward units per nat.
        target_entropy: nats; None is −action_dim. Actions in (−1, 1) have at most ln 2 nats each.
        random_steps: as long as fewer transitions were seen, actions are uniform.

    Attributes:
        num_updates: so far.
        max_entropy: of the uniform policy, nats: action_dim · ln 2.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        buffer: ReplayBuffer,
        generator: torch.Generator,
        hidden_dim: int = 64,
        learning_rate: float = 3e-4,
        discount: float = 0.99,
        target_step: float = 0.005,
        batch_size: int = 256,
        initial_temperature: float = 1.0,
        target_entropy: float | None = None,
        random_steps: int = 100,
    ) -> None:
        sizes = {"state_dim": state_dim, "action_dim": action_dim, "hidden_dim": hidden_dim, "batch_size": batch_size}
        faults = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if not 0 <= discount <= 1:
            faults.append(f"discount must lie in [0, 1], got {discount}")
        if not 0 < target_step <= 1:
            faults.append(f"target_step must lie in (0, 1], got {target_step}")
        if not learning_rate > 0:
            faults.append(f"learning_rate must be above 0, got {learning_rate}")
        if not initial_temperature > 0:
            faults.append(f"initial_temperature must be above 0, got {initial_temperature}")
        self.max_entropy = action_dim * math.log(2)
        self.target_entropy = float(-action_dim) if target_entropy is None else target_entropy
        if not self.target_entropy < self.max_entropy:
            faults.append(f"target_entropy must lie below {self.max_entropy:.4g} nats, got {target_entropy}")
        if faults:
            raise ConfigError(*faults)
        self.buffer = buffer
        self.action_dim = action_dim
        self.discount = discount
        self.target_step = target_step
        self.batch_size = batch_size
        self.random_steps = random_steps
        self.num_updates = 0
        self._actor = Mlp([state_dim, hidden_dim, hidden_dim, 2 * action_dim], num_networks=1, generator=generator)
        widths = [state_dim + action_dim, hidden_dim, hidden_dim, 1]
        self._critics = Mlp(widths, num_networks=_NUM_CRITICS, generator=generator)
        self._targets = Mlp(widths, num_networks=_NUM_CRITICS, generator=generator)
        self._targets.load_state_dict(self._critics.state_dict())
        self._targets.requires_grad_(False)
        self._log_temperature = nn.Parameter(torch.tensor(math.log(initial_temperature)))
        self._optimisers = {
            "actor": torch.optim.Adam(self._actor.parameters(), lr=learning_rate, fused=True),
            "critics": torch.optim.Adam(self._critics.parameters(), lr=learning_rate, fused=True),
            "temperature": torch.optim.Adam([self._log_temperature], lr=learning_rate, fused=True),
        }

    @property
    def temperature(self) -> float:
        """α, reward units per nat."""
        return math.exp(self._log_temperature.item())

    @torch.no_grad()
    def act(
        self, state: Float[Tensor, " state"], *, generator: torch.Generator, deterministic: bool = False
    ) -> Float[Tensor, " action"]:
        """An action in [−1, 1]: drawn, uniform in the first ``random_steps``, or the policy's mean squashed."""
        if not deterministic and self.buffer.num_added < self.random_steps:
            return 2 * torch.rand(self.action_dim, generator=generator) - 1
        mean, log_standard_deviation = self._policy(state.float()[None])
        if deterministic:
            return torch.tanh(mean[0])
        return sample_squashed_gaussian(mean, log_standard_deviation, generator=generator)[0][0]

    def observe(
        self,
        state: Float[Tensor, " state"],
        action: Float[Tensor, " action"],
        reward: float,
        next_state: Float[Tensor, " state"],
        *,
        terminated: bool,
    ) -> None:
        """Remembers a transition; see :meth:`ReplayBuffer.add`."""
        self.buffer.add(state, action, reward, next_state, terminated=terminated)

    def update(self, *, generator: torch.Generator) -> dict[str, float]:
        """One step of the critics, the actor and the temperature, then of the targets, on a batch from the buffer.

        Returns:
            Metrics of the batch: ``critic_loss``, ``actor_loss``, ``q_value`` (mean over the critics), ``temperature``
            (after the step), ``entropy`` in nats beside ``entropy_maximum`` and ``entropy_target``.

        Raises:
            ShapeError: nothing was observed yet.
        """
        states, actions, rewards, next_states, terminated = self.buffer.sample(self.batch_size, generator=generator)
        temperature = self.temperature

        with torch.no_grad():
            next_actions, next_log_probs = sample_squashed_gaussian(*self._policy(next_states), generator=generator)
            targets = soft_q_targets(
                rewards,
                self._q_values(self._targets, next_states, next_actions),
                next_log_probs,
                terminated=terminated,
                discount=self.discount,
                temperature=temperature,
            )
        q_values = self._q_values(self._critics, states, actions)
        critic_loss = sac_critic_loss(q_values, targets)
        self._step("critics", critic_loss, self._critics.parameters())

        new_actions, log_probs = sample_squashed_gaussian(*self._policy(states), generator=generator)
        new_q_values = self._q_values(self._critics, states, new_actions)
        actor_loss = sac_actor_loss(log_probs, new_q_values, temperature=temperature)
        self._step("actor", actor_loss, self._actor.parameters())

        temperature_loss = sac_temperature_loss(self._log_temperature, log_probs, target_entropy=self.target_entropy)
        self._step("temperature", temperature_loss, [self._log_temperature])

        with torch.no_grad():
            for target, parameter in zip(self._targets.parameters(), self._critics.parameters(), strict=True):
                target.lerp_(parameter, self.target_step)
        self.num_updates += 1
        return {
            "critic_loss": critic_loss.item(),
            "actor_loss": actor_loss.item(),
            "q_value": q_values.mean().item(),
            "temperature": self.temperature,
            "entropy": -log_probs.mean().item(),
            "entropy_maximum": self.max_entropy,
            "entropy_target": self.target_entropy,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as live tensors and plain numbers; write it before going on."""
        return {
            "num_updates": self.num_updates,
            "log_temperature": self._log_temperature.detach(),
            "networks": {name: dict(network.state_dict()) for name, network in self._networks().items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()},
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the agent, with its buffer, where ``state_dict`` found it.

        Raises:
            CheckpointError: the state is of another agent.
        """
        try:
            for name, network in self._networks().items():
                network.load_state_dict(state["networks"][name])
            for name, optimiser in self._optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
            with torch.no_grad():
                self._log_temperature.copy_(state["log_temperature"])
            self.num_updates = state["num_updates"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the saved surgeon is not this one; resume with the same configuration: {error}"
            ) from error
        self.buffer.load_state_dict(state["buffer"])

    def _networks(self) -> dict[str, nn.Module]:
        return {"actor": self._actor, "critics": self._critics, "targets": self._targets}

    def _policy(
        self, states: Float[Tensor, "batch state"]
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, "batch action"]]:
        mean, log_standard_deviation = self._actor(states)[0].chunk(2, dim=-1)
        return mean, log_standard_deviation.clamp(*_LOG_STANDARD_DEVIATIONS)

    @staticmethod
    def _q_values(
        critics: Mlp, states: Float[Tensor, "batch state"], actions: Float[Tensor, "batch action"]
    ) -> Float[Tensor, "critics batch"]:
        q_values: Tensor = critics(torch.cat([states, actions], dim=-1))
        return q_values.squeeze(-1)

    def _step(self, name: str, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> None:
        """One step down ``loss`` in ``parameters`` alone: the actor's leads through the critics too."""
        parameters = list(parameters)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimisers[name].step()


class Mlp(nn.Module):
    """Networks of one shape side by side, ReLU between the layers; each layer of all of them is one product.

    Weights and biases start uniform in ±1/√(inputs), as in torch's own linear layers.

    Args:
        widths: numbers in, of each hidden layer, and out.
        num_networks: how many.
        generator: draws the weights.
    """

    def __init__(self, widths: Sequence[int], *, num_networks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for num_in, num_out in pairwise(widths):
            for parameters, num_rows in ((self.weights, num_in), (self.biases, 1)):
                drawn = torch.rand(num_networks, num_rows, num_out, generator=generator)
                parameters.append(nn.Parameter((2 * drawn - 1) / math.sqrt(num_in)))

    def forward(self, inputs: Float[Tensor, "batch in"]) -> Float[Tensor, "networks batch out"]:
        """What every network gives for the same ``inputs``."""
        hidden = inputs.expand(len(self.weights[0]), *inputs.shape)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, relu(hidden) if layer else hidden, weight)
        return hidden
