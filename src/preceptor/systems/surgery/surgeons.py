"""Who proposes edits: SAC, and controls that propose without learning, or learn nothing true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.objectives.statistics import RunningMoments
from preceptor.systems.surgery.agent import SacAgent

Action = Float[Tensor, " action"]


class Surgeon(Protocol):
    """Proposes an edit, is told what it earned, and names the edit that deserves the acceptance test, if any.

    Unless it says otherwise, it has every edit tested that earned something, and learns nothing.
    """

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """An action in [−1, 1]."""
        ...

    def candidate(self, action: Action, reward: float) -> Action | None:
        """What is to be tested now; None where nothing is."""
        return action if reward > 0 else None

    def observe(
        self,
        state: Float[Tensor, " state"],
        action: Action,
        reward: float,
        *,
        committed: bool,
        generator: torch.Generator,
    ) -> None:
        """Take in what the action earned."""
        return

    def metrics(self) -> dict[str, float]:
        """What is worth recording of the surgeon itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class SacSurgeon(Surgeon):
    """The agent, whose rewards are divided by their running root mean square.

    Rewards are differences of a few thousandths; the temperature could not come down to them from any usual start
    within thousands of updates, and the policy would stay at its maximal entropy.

    Args:
        agent: learns.
        updates_per_edit: of the agent.
        shuffled: pay it with a reward drawn among all rewards so far instead.
    """

    def __init__(self, agent: SacAgent, *, updates_per_edit: int, shuffled: bool = False) -> None:
        self._agent = agent
        self._updates_per_edit = updates_per_edit
        self._shuffled = shuffled
        self._squares = RunningMoments()
        self._rewards: list[float] = []
        self._pending: tuple[Tensor, Tensor, float] | None = None
        self._metrics: dict[str, float] = {}

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """The state also tells where the last action led to; the agent learns from it before it acts."""
        if self._pending is not None:
            self._agent.observe(*self._pending, state, terminated=False)
            self._pending = None
            for _ in range(self._updates_per_edit):
                self._metrics = self._agent.update(generator=generator)
        return self._agent.act(state, generator=generator)

    def observe(
        self,
        state: Float[Tensor, " state"],
        action: Action,
        reward: float,
        *,
        committed: bool,
        generator: torch.Generator,
    ) -> None:
        """The agent is told at the next proposal, when the next state is known."""
        self._squares.update(torch.tensor([reward**2], dtype=torch.float64))
        if self._shuffled:
            self._rewards.append(reward)
            reward = self._rewards[int(torch.randint(len(self._rewards), (), generator=generator))]
        scale = math.sqrt(self._squares.mean)
        self._pending = state, action, reward / scale if scale > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        """Of the agent's last update."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """The agent, buffer included, and the running scale."""
        return {
            "agent": self._agent.state_dict(),
            "squares": self._squares.state_dict(),
            "rewards": self._rewards,
            "pending": None if self._pending is None else list(self._pending),
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._agent.load_state_dict(state["agent"])
        self._squares.load_state_dict(state["squares"])
        self._rewards = list(state["rewards"])
        pending = state["pending"]
        self._pending = None if pending is None else (pending[0], pending[1], pending[2])
        self._metrics = dict(state["metrics"])


class RandomSurgeon(Surgeon):
    """Random edits as large as another surgeon's at the same step: its action's numbers in random order and sign.

    Args:
        models: the other's actions, in order.
    """

    def __init__(self, models: Float[Tensor, "edit action"]) -> None:
        self._models = models
        self._num_edits = 0

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """The next action, shuffled."""
        model = self._models[self._num_edits]
        self._num_edits += 1
        signs = 2.0 * torch.randint(2, model.shape, generator=generator) - 1
        return model[torch.randperm(len(model), generator=generator)] * signs

    def state_dict(self) -> dict[str, Any]:
        """How many were proposed."""
        return {"num_edits": self._num_edits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._num_edits = state["num_edits"]


class EvolutionSurgeon(Surgeon):
    """(1+1)-ES: Gaussian steps from the student as it is, kept when they improve it; one in five should.

    The standard deviation grows by a half after a commit and shrinks by its fourth root otherwise, so that it stands
    still when one in five is committed. It stays above a tenth: smaller edits earn less than the noise of the reward
    and of the test, and the rule would shrink them for ever.

    Source: Rechenberg (1973); Kern et al. (2004), doi:10.1023/B:NACO.0000023416.59689.4e.
    """

    GROWTH = 1.5
    LIMITS = (0.1, 1.0)

    def __init__(self, action_dim: int, *, standard_deviation: float = 0.3) -> None:
        self._action_dim = action_dim
        self._standard_deviation = standard_deviation

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """A Gaussian action, cut off at ±1."""
        return (self._standard_deviation * torch.randn(self._action_dim, generator=generator)).clamp(-1, 1)

    def observe(
        self,
        state: Float[Tensor, " state"],
        action: Action,
        reward: float,
        *,
        committed: bool,
        generator: torch.Generator,
    ) -> None:
        """The one-fifth rule."""
        factor = self.GROWTH if committed else self.GROWTH**-0.25
        low, high = self.LIMITS
        self._standard_deviation = min(max(self._standard_deviation * factor, low), high)

    def metrics(self) -> dict[str, float]:
        """The step size."""
        return {"standard_deviation": self._standard_deviation}

    def state_dict(self) -> dict[str, Any]:
        """The step size."""
        return self.metrics()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._standard_deviation = state["standard_deviation"]


class BestOfNSurgeon(Surgeon):
    """The best of every ``n`` uniform edits is tested, the others are forgotten.

    Args:
        action_dim: numbers in an action.
        n: edits of a round.
    """

    def __init__(self, action_dim: int, *, n: int) -> None:
        self._action_dim = action_dim
        self._n = n
        self._num_tried = 0
        self._best: tuple[float, Tensor] | None = None

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """Uniform in [−1, 1]."""
        return 2 * torch.rand(self._action_dim, generator=generator) - 1

    def candidate(self, action: Action, reward: float) -> Action | None:
        """The best of the round, when the round is over."""
        if self._best is None or reward > self._best[0]:
            self._best = reward, action
        self._num_tried += 1
        if self._num_tried < self._n:
            return None
        (reward, action), self._num_tried, self._best = self._best, 0, None
        return super().candidate(action, reward)

    def state_dict(self) -> dict[str, Any]:
        """The round so far."""
        return {"num_tried": self._num_tried, "best": None if self._best is None else list(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._num_tried = state["num_tried"]
        self._best = None if state["best"] is None else (state["best"][0], state["best"][1])
