"""The surgeon's policy: soft actor-critic (Haarnoja et al., arXiv 1812.05905) and the transitions it learns from."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import relu

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError
from preceptor.objectives.sac import (
    sac_actor_loss,
    sac_critic_loss,
    sac_temperature_loss,
    sample_squashed_gaussian,
    soft_q_targets,
)
from preceptor.runs.files import storage_errors

_NUM_CRITICS = 2
_LOG_STANDARD_DEVIATIONS = (-5.0, 2.0)  # keeps the density finite; e² is flat once squashed
_BYTES_PER_NUMBER = 4  # float32
_ZEROS = bytes(1 << 20)


class SacAgent:
    """A squashed Gaussian policy, twin critics with slowly following targets, and a self-adjusting temperature.

    Args:
        state_dim: length of a state; the caller normalises its numbers to order 1.
        action_dim: length of an action.
        buffer: what the agent learns from.
        generator: draws the initial weights.
        hidden_dim: width of the two hidden layers of every network.
        learning_rate: of Adam, for all networks and for the logarithm of the temperature.
        discount: γ in [0, 1].
        target_step: τ in (0, 1], the fraction of the way to the critics that the targets move at each update.
        batch_size: transitions of an update.
        initial_temperature: α > 0 at the start, reward units per nat.
        target_entropy: nats; None is −action_dim. A number in (−1, 1) has at most ln 2 nats.
        random_steps: actions are uniform until so many transitions were seen.
        networks: makes actor and critics; by default perceptrons over whole states.

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
        networks: Networks | None = None,
    ) -> None:
        sizes = {"state_dim": state_dim, "action_dim": action_dim, "hidden_dim": hidden_dim, "batch_size": batch_size}
        faults = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if not 0 <= discount <= 1:
            faults.append(f"discount must lie in [0, 1], got {discount}")
        if not 0 < target_step <= 1:
            faults.append(f"target_step must lie in (0, 1], got {target_step}")
        rates = {"learning_rate": learning_rate, "initial_temperature": initial_temperature}
        faults += [f"{name} must be above 0, got {rate}" for name, rate in rates.items() if not rate > 0]
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
        self._actor, self._critics = (networks or mlp_networks)(
            state_dim, action_dim, hidden_dim=hidden_dim, num_critics=_NUM_CRITICS, generator=generator
        )
        self._targets = copy.deepcopy(self._critics).requires_grad_(False)
        self._log_temperature = nn.Parameter(torch.tensor(math.log(initial_temperature)))
        self._optimizers = {
            "actor": torch.optim.Adam(self._actor.parameters(), lr=learning_rate, fused=True),
            "critics": torch.optim.Adam(self._critics.parameters(), lr=learning_rate, fused=True),
            "temperature": torch.optim.Adam([self._log_temperature], lr=learning_rate, fused=True),
        }

    @property
    def actor(self) -> nn.Module:
        """From states to means and logarithms of standard deviations before squashing."""
        return self._actor

    @property
    def temperature(self) -> float:
        """α, reward units per nat."""
        return math.exp(self._log_temperature.item())

    @torch.no_grad()
    def act(
        self, state: Float[Tensor, " state"], *, generator: torch.Generator, deterministic: bool = False
    ) -> Float[Tensor, " action"]:
        """An action in [−1, 1]: sampled, uniform in the first ``random_steps``, or the policy's squashed mean."""
        if not deterministic and self.buffer.num_added < self.random_steps:
            return 2 * torch.rand(self.action_dim, generator=generator) - 1
        mean, log_standard_deviation = self._policy(state.float()[None])  # a batch of one
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
            Metrics of the batch; ``q_value`` is the mean over the critics, ``temperature`` that after the step, and
            ``entropy``, ``entropy_maximum`` and ``entropy_target`` are in nats.

        Raises:
            ShapeError: nothing was observed yet.
        """
        # A batch of transitions; every part begins with the batch axis.
        states, actions, rewards, next_states, terminated = self.buffer.sample(self.batch_size, generator=generator)
        temperature = self.temperature  # one value for the whole update

        # Critics: towards the reward plus the discounted soft value of the next state, by the slow targets.
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
        q_values = self._q_values(self._critics, states, actions)  # [critics, batch]
        critic_loss = sac_critic_loss(q_values, targets)
        self._step("critics", critic_loss, self._critics.parameters())

        # Actor: higher Q-values by the new critics, and entropy; the sampled actions carry its gradient.
        new_actions, log_probs = sample_squashed_gaussian(*self._policy(states), generator=generator)
        new_q_values = self._q_values(self._critics, states, new_actions)
        actor_loss = sac_actor_loss(log_probs, new_q_values, temperature=temperature)
        self._step("actor", actor_loss, self._actor.parameters())

        # Temperature: up while the policy's entropy is below its target, down while it is above.
        temperature_loss = sac_temperature_loss(self._log_temperature, log_probs, target_entropy=self.target_entropy)
        self._step("temperature", temperature_loss, [self._log_temperature])

        # Polyak averaging: slow targets, because a network that chases its own estimate diverges.
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

    def learn(self, num_updates: int, *, generator: torch.Generator) -> dict[str, float]:
        """So many updates, once the first random actions are over; gives the metrics of the last one."""
        metrics: dict[str, float] = {}
        if self.buffer.num_added >= self.random_steps:
            for _ in range(num_updates):
                metrics = self.update(generator=generator)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as live tensors and plain numbers."""
        return {
            "num_updates": self.num_updates,
            "log_temperature": self._log_temperature.detach(),
            "networks": {name: dict(network.state_dict()) for name, network in self._networks().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`, the buffer included.

        Raises:
            CheckpointError: the state belongs to another agent.
        """
        try:
            for name, network in self._networks().items():
                network.load_state_dict(state["networks"][name])
            for name, optimizer in self._optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
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
        return gaussian_of(self._actor(states))

    @staticmethod
    def _q_values(
        critics: nn.Module, states: Float[Tensor, "batch state"], actions: Float[Tensor, "batch action"]
    ) -> Float[Tensor, "critics batch"]:
        q_values: Tensor = critics(torch.cat([states, actions], dim=-1))
        return q_values.squeeze(-1)

    def _step(self, name: str, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> None:
        """One step down ``loss`` in ``parameters`` alone: the actor's loss depends on the critics too."""
        parameters = list(parameters)
        # Gradients of these parameters alone. backward() would also leave some in the critics when the actor steps.
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizers[name].step()


def gaussian_of(
    outputs: Float[Tensor, "1 batch both"],
) -> tuple[Float[Tensor, "batch action"], Float[Tensor, "batch action"]]:
    """Means and logarithms of standard deviations before squashing, from what an actor gives."""
    mean, log_standard_deviation = outputs[0].chunk(2, dim=-1)
    # A standard deviation of e⁻⁵ to e²: narrower lets densities grow without bound, wider is uniform once squashed.
    return mean, log_standard_deviation.clamp(*_LOG_STANDARD_DEVIATIONS)


class Networks(Protocol):
    """Makes an actor (states [batch, state] → [1, batch, 2 · action]) and critics (→ [critics, batch, 1])."""

    def __call__(
        self, state_dim: int, action_dim: int, *, hidden_dim: int, num_critics: int, generator: torch.Generator
    ) -> tuple[nn.Module, nn.Module]: ...


def mlp_networks(
    state_dim: int, action_dim: int, *, hidden_dim: int, num_critics: int, generator: torch.Generator
) -> tuple[nn.Module, nn.Module]:
    """Perceptrons with two hidden layers, the critics' over state and action side by side."""
    actor = Mlp([state_dim, hidden_dim, hidden_dim, 2 * action_dim], num_networks=1, generator=generator)
    widths = [state_dim + action_dim, hidden_dim, hidden_dim, 1]
    return actor, Mlp(widths, num_networks=num_critics, generator=generator)


class Mlp(nn.Module):
    """Networks of one shape, with ReLU between the layers; each layer of all of them is one batched product.

    Weights and biases start uniform in ±1/√(inputs), as in torch's own linear layers.

    Args:
        widths: of the input, each hidden layer and the output.
        num_networks: number of networks.
        generator: draws the weights.
    """

    def __init__(self, widths: Sequence[int], *, num_networks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for num_in, num_out in pairwise(widths):
            for parameters, num_rows in ((self.weights, num_in), (self.biases, 1)):
                drawn = torch.rand(num_networks, num_rows, num_out, generator=generator)
                # [networks, in, out] for weights and [networks, 1, out] for biases, as `baddbmm` takes them
                parameters.append(nn.Parameter((2 * drawn - 1) / math.sqrt(num_in)))

    def forward(self, inputs: Float[Tensor, "*networks batch in"]) -> Float[Tensor, "networks batch out"]:
        """The output of every network, for the same ``inputs`` or for those of its own."""
        hidden = inputs.expand(len(self.weights[0]), *inputs.shape[-2:])  # [networks, batch, width]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, relu(hidden) if layer else hidden, weight)
        return hidden


class Transitions(NamedTuple):
    """A batch of transitions; ``terminated`` means that the next state is terminal and has no value."""

    states: Float[Tensor, "batch state"]
    actions: Float[Tensor, "batch action"]
    rewards: Float[Tensor, " batch"]
    next_states: Float[Tensor, "batch state"]
    terminated: Bool[Tensor, " batch"]


class ReplayBuffer:
    """A ring of the last ``capacity`` transitions, in float32 on the CPU.

    Args:
        capacity: transitions kept.
        state_dim: length of a state.
        action_dim: length of an action.
        memory_limit_bytes: a larger buffer is a memory-mapped file.
        spill_folder: an existing folder for that file; needed above the limit.

    Attributes:
        num_added: transitions seen so far.
        spilled: whether the buffer is a file.

    Raises:
        ConfigError: a value out of range, or no folder for a buffer above the limit.
        StorageError: the disk has no room for it.
    """

    def __init__(
        self,
        capacity: int,
        *,
        state_dim: int,
        action_dim: int,
        memory_limit_bytes: int = 256 << 20,
        spill_folder: Path | None = None,
    ) -> None:
        sizes = {"capacity": capacity, "state_dim": state_dim, "action_dim": action_dim}
        if faults := [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]:
            raise ConfigError(*faults)
        self.capacity, self.num_added = capacity, 0
        # A row holds state, action, reward, next state and whether it terminated, side by side.
        self._widths = [state_dim, action_dim, 1, state_dim, 1]
        num_bytes = capacity * sum(self._widths) * _BYTES_PER_NUMBER
        self.spilled = num_bytes > memory_limit_bytes
        if not self.spilled:
            self._table = torch.zeros(capacity, sum(self._widths))
        elif spill_folder is None:
            raise ConfigError(
                f"a replay buffer of {num_bytes} bytes exceeds memory_limit_bytes={memory_limit_bytes}; "
                "give spill_folder, raise the limit or lower the capacity"
            )
        else:
            self._table = _mapped_zeros(spill_folder, num_bytes).view(capacity, -1)

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(
        self,
        state: Float[Tensor, " state"],
        action: Float[Tensor, " action"],
        reward: float,
        next_state: Float[Tensor, " state"],
        *,
        terminated: bool,
    ) -> None:
        """Adds a transition, in place of the oldest one if the buffer is full. A time limit does not terminate.

        Raises:
            ShapeError: the sizes are not this buffer's.
            NumericError: a number is NaN or infinite; it would reach every weight of the agent.
        """
        parts = [state, action, torch.tensor([reward]), next_state, torch.tensor([float(terminated)])]
        if [tuple(part.shape) for part in parts] != [(width,) for width in self._widths]:
            raise ShapeError(
                f"state, action and next state have shapes {tuple(state.shape)}, {tuple(action.shape)}, "
                f"{tuple(next_state.shape)}; this buffer holds ({self._widths[0]},), ({self._widths[1]},), "
                f"({self._widths[3]},)"
            )
        row = torch.cat([part.detach().to("cpu", torch.float32) for part in parts])
        if not row.isfinite().all():
            # One NaN in the buffer would be drawn again and again.
            raise NumericError(f"a transition with a NaN or an infinity (reward {reward}) cannot teach; leave it out")
        self._table[self.num_added % self.capacity] = row  # the oldest row, once the ring is full
        self.num_added += 1

    def sample(self, batch_size: int, *, generator: torch.Generator) -> Transitions:
        """``batch_size`` transitions drawn uniformly with replacement; raises ``ShapeError`` if there is none."""
        if not len(self):
            raise ShapeError("an empty replay buffer has nothing to sample; add a transition first")
        rows = self._table[torch.randint(len(self), (batch_size,), generator=generator)]  # [batch, sum of widths]
        states, actions, rewards, next_states, terminated = rows.split(self._widths, dim=1)
        return Transitions(states, actions, rewards[:, 0], next_states, terminated[:, 0] > 0)

    def state_dict(self) -> dict[str, Any]:
        """The count, and a live view of the transitions."""
        return {"num_added": self.num_added, "transitions": self._table[: len(self)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`.

        Raises:
            CheckpointError: the saved buffer has another capacity or other widths; nothing has changed then.
        """
        num_added, transitions = state["num_added"], state["transitions"]
        # Rows beyond the count are zeros and are not saved.
        shape = (min(num_added, self.capacity), sum(self._widths))
        if tuple(transitions.shape) != shape:
            raise CheckpointError(
                f"the saved replay buffer has shape {tuple(transitions.shape)}, this one {shape}; "
                "resume with the same capacity, state and action"
            )
        self.num_added = num_added
        self._table[: len(self)] = transitions


def _mapped_zeros(folder: Path, num_bytes: int) -> Float[Tensor, " numbers"]:
    """Zeros in a memory-mapped file of ``folder`` whose name is removed at once, so the process's end frees the space.

    They are written out: a mapped file with holes would end the process when the disk is full.
    """
    with (
        storage_errors(f"make room for a replay buffer of {num_bytes} bytes in {folder}"),
        tempfile.NamedTemporaryFile(dir=folder, prefix="replay-buffer-") as file,
    ):
        for start in range(0, num_bytes, len(_ZEROS)):
            # In pieces, so that no copy of the buffer's size is needed.
            file.write(_ZEROS[: num_bytes - start])
        file.flush()
        return torch.from_file(file.name, shared=True, size=num_bytes // _BYTES_PER_NUMBER, dtype=torch.float32)
