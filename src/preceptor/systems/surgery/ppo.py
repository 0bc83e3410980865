"""PPO as the amortised surgeon's other learner: the same networks, without critics of actions and without a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.errors import CheckpointError
from preceptor.objectives.policy_gradient import ppo_clip_loss
from preceptor.objectives.sac import squashed_gaussian_log_prob
from preceptor.objectives.statistics import whiten
from preceptor.objectives.value import value_loss
from preceptor.systems.surgery.config import AgentOptions
from preceptor.systems.surgery.policy import gaussian_of
from preceptor.systems.surgery.site_policy import SiteNetwork

CLIP_NORM = 0.5
"""Largest norm of a gradient."""


class PpoAgent:
    """A squashed Gaussian policy over the sites of any model, and a value of the damaged model as its baseline.

    An edit is an episode of its own, so its return is its reward, and the advantage is that less the value.

    Args:
        options: width, learning rate.
        generator: draws the initial weights.

    Attributes:
        actor: from flat states to means and logarithms of standard deviations of every site.
        value: from flat states to the expected reward, a sum over sites.
    """

    def __init__(self, options: AgentOptions, *, generator: torch.Generator) -> None:
        widths: dict[str, Any] = {"hidden_dim": options.hidden_dim, "num_networks": 1, "generator": generator}
        self.actor = SiteNetwork(extra=0, outputs=2, summed=False, **widths)
        self.value = SiteNetwork(extra=0, outputs=1, summed=True, **widths)
        self._optimizer = torch.optim.Adam(self._parameters().values(), lr=options.learning_rate)
        self._drawn: list[tuple[Tensor, float]] = []  # actions before squashing, with ln π, not yet paid
        self._edits: list[tuple[Tensor, Tensor, float, float]] = []  # state, action before squashing, ln π, reward

    @torch.no_grad()
    def act(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Float[Tensor, " action"]:
        """An action in (−1, 1), drawn from the policy."""
        mean, log_standard_deviation = gaussian_of(self.actor(state[None]))
        noise = torch.randn(mean.shape, generator=generator)
        unsquashed = mean + log_standard_deviation.exp() * noise  # [1, action]
        log_prob = squashed_gaussian_log_prob(unsquashed, mean, log_standard_deviation)
        self._drawn.append((unsquashed[0], float(log_prob)))
        return torch.tanh(unsquashed[0])

    def observe(
        self,
        state: Float[Tensor, " state"],
        action: Float[Tensor, " action"],
        reward: float,
        next_state: Float[Tensor, " state"],
        *,
        terminated: bool,
    ) -> None:
        """What an action earned; actions are paid in the order in which they were drawn."""
        unsquashed, log_prob = self._drawn.pop(0)
        assert torch.equal(torch.tanh(unsquashed), action), "edits are paid in the order of their drawing"
        self._edits.append((state, unsquashed, log_prob, reward))

    def learn(self, num_updates: int, *, generator: torch.Generator) -> dict[str, float]:
        """So many passes over the edits observed since the last call, which are then forgotten.

        Returns:
            Metrics of the last pass; ``entropy`` in nats, estimated from the edits.
        """
        states = torch.stack([state for state, _, _, _ in self._edits])
        unsquashed = torch.stack([drawn for _, drawn, _, _ in self._edits])
        log_probs = torch.tensor([[log_prob] for _, _, log_prob, _ in self._edits])
        rewards = torch.tensor([[reward] for _, _, _, reward in self._edits])
        self._edits = []
        counted = torch.ones_like(rewards, dtype=torch.bool)  # [edits, 1]: an episode of one step each
        with torch.no_grad():
            advantages = whiten(rewards - self.value(states)[0], counted)
        metrics: dict[str, float] = {}
        for _ in range(num_updates):
            new_log_probs = squashed_gaussian_log_prob(unsquashed, *gaussian_of(self.actor(states)))[:, None]
            policy_loss = ppo_clip_loss(new_log_probs, log_probs, advantages, mask=counted)
            baseline_loss = value_loss(self.value(states)[0], rewards, mask=counted)
            self._optimizer.zero_grad()
            (policy_loss + baseline_loss).backward()
            nn.utils.clip_grad_norm_(self._parameters().values(), CLIP_NORM)
            self._optimizer.step()
            metrics = {
                "policy_loss": policy_loss.item(),
                "value_loss": baseline_loss.item(),
                "entropy": -new_log_probs.mean().item(),
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer; between the steps of a run no edit waits for its reward."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self._parameters().items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`.

        Raises:
            CheckpointError: the state belongs to another agent.
        """
        try:
            with torch.no_grad():
                for name, parameter in self._parameters().items():
                    parameter.copy_(state["parameters"][name])
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the saved surgeon is not this one; resume with the same configuration: {error}"
            ) from error

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, network in (("actor", self.actor), ("value", self.value))
            for name, parameter in network.named_parameters()
        }
