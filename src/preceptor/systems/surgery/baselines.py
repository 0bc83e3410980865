"""Who proposes edits: SAC, and the baselines, which propose without learning or learn from wrong rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.objectives.statistics import RunningMoments
from preceptor.systems.surgery.config import AgentOptions
from preceptor.systems.surgery.policy import Networks, ReplayBuffer, SacAgent

Action = Float[Tensor, " action"]


def sac_agent(
    options: AgentOptions,
    *,
    state_dim: int,
    action_dim: int,
    generator: torch.Generator,
    spill_folder: Path,
    networks: Networks | None = None,
) -> SacAgent:
    """The agent that ``options`` describe, with an empty replay buffer; see :class:`SacAgent` and its buffer."""
    return SacAgent(
        state_dim,
        action_dim,
        buffer=ReplayBuffer(options.capacity, state_dim=state_dim, action_dim=action_dim, spill_folder=spill_folder),
        generator=generator,
        hidden_dim=options.hidden_dim,
        learning_rate=options.learning_rate,
        discount=options.discount,
        target_step=options.target_step,
        batch_size=options.batch_size,
        initial_temperature=options.initial_temperature,
        random_steps=options.random_edits,
        networks=networks,
    )


def make_surgeon(
    name: str | None,
    *,
    state_dim: int,
    action_dim: int,
    learned_actions: Sequence[Sequence[float]],
    best_of: int,
    agent: AgentOptions,
    generator: torch.Generator,
    spill_folder: Path,
) -> Surgeon | None:
    """A new surgeon: the SAC agent (``learned``, ``shuffled``) or a baseline; None for no name.

    Args:
        name: one of ``EDITING_ARMS``.
        state_dim: length of a state.
        action_dim: length of an action.
        learned_actions: SAC's actions, which ``random`` imitates.
        best_of: N of ``best_of_n``.
        agent: settings of SAC.
        generator: draws SAC's initial weights.
        spill_folder: where a large replay buffer goes.
    """
    if name is None:
        return None
    if name == "evolution":
        return EvolutionSurgeon(action_dim)
    if name == "best_of_n":
        return BestOfNSurgeon(action_dim, n=best_of)
    # SAC's actions as they were, so that both make edits of the same size at the same step.
    if name == "random":
        return RandomSurgeon(torch.tensor(learned_actions))
    # `learned` and `shuffled` are one agent; only what it is told differs.
    return SacSurgeon(
        sac_agent(agent, state_dim=state_dim, action_dim=action_dim, generator=generator, spill_folder=spill_folder),
        updates_per_edit=agent.updates_per_edit,
        shuffled=name == "shuffled",
    )


class Surgeon(Protocol):
    """Proposes an edit, observes its reward, and names the edit to run the acceptance test on, if any.

    By default it has every edit with a positive reward tested, and learns nothing.
    """

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """An action in [−1, 1]."""
        ...

    def candidate(self, action: Action, reward: float) -> Action | None:
        """The action to test now, or None."""
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
        """Takes in the reward of an action."""
        return

    def metrics(self) -> dict[str, float]:
        """What to log about the surgeon itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        ...


class SacSurgeon(Surgeon):
    """The SAC agent, with rewards divided by their running root mean square.

    Rewards are differences of a few thousandths. Without scaling, the temperature would need thousands of updates to
    come down to them from any usual start, and the policy would stay at its maximal entropy.

    Args:
        agent: proposes and learns.
        updates_per_edit: updates of the agent.
        shuffled: a baseline: replace each reward by one drawn among all rewards so far.
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
        """Acts after learning: ``state`` completes the transition of the last action."""
        if self._pending is not None:
            # The next state is known only now, one edit later.
            self._agent.observe(*self._pending, state, terminated=False)  # surgery has no terminal state
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
        """Keeps the transition until the next proposal, which knows the next state."""
        self._squares.update(torch.tensor([reward**2], dtype=torch.float64))  # of the true rewards, shuffled or not
        if self._shuffled:
            # Drawn among all rewards so far: the same distribution, without any link to the action.
            self._rewards.append(reward)
            reward = self._rewards[int(torch.randint(len(self._rewards), (), generator=generator))]
        # Root mean square, not standard deviation: a mean reward other than 0 is information and stays.
        scale = math.sqrt(self._squares.mean)
        # All rewards so far were 0: there is nothing to scale by.
        self._pending = state, action, reward / scale if scale > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        """Metrics of the agent's last update."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """The agent with its buffer, the running scale and the transition that is not complete."""
        return {
            "agent": self._agent.state_dict(),
            "squares": self._squares.state_dict(),
            "rewards": self._rewards,
            "pending": None if self._pending is None else list(self._pending),
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self._agent.load_state_dict(state["agent"])
        self._squares.load_state_dict(state["squares"])
        self._rewards = list(state["rewards"])
        pending = state["pending"]
        self._pending = None if pending is None else (pending[0], pending[1], pending[2])
        self._metrics = dict(state["metrics"])


class RandomSurgeon(Surgeon):
    """Random edits as large as SAC's at the same step: its action's numbers with shuffled order and random signs.

    Args:
        actions: SAC's, in order.
    """

    def __init__(self, actions: Float[Tensor, "edit action"]) -> None:
        self._actions = actions
        self._num_edits = 0

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """The next action of SAC, shuffled."""
        # Both surgeons make the same number of edits, so there is one of SAC's for each.
        action = self._actions[self._num_edits]
        self._num_edits += 1
        signs = 2.0 * torch.randint(2, action.shape, generator=generator) - 1  # keeps the norm, loses the direction
        return action[torch.randperm(len(action), generator=generator)] * signs

    def state_dict(self) -> dict[str, Any]:
        """The number of edits proposed."""
        return {"num_edits": self._num_edits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self._num_edits = state["num_edits"]


class EvolutionSurgeon(Surgeon):
    """(1+1)-ES: Gaussian steps from the student as it is, kept when they improve it; one in five should.

    The standard deviation grows by a factor of 1.5 after a commit and shrinks by 1.5^(1/4) otherwise, so it is constant
    when one edit in five is committed. It stays above 0.1: the gain of smaller edits drowns in the noise of the reward
    and of the test, and the rule would shrink them forever.

    Source: Rechenberg (1973); Kern et al. (2004), doi:10.1023/B:NACO.0000023416.59689.4e.
    """

    GROWTH = 1.5
    LIMITS = (0.1, 1.0)

    def __init__(self, action_dim: int, *, standard_deviation: float = 0.3) -> None:
        self._action_dim = action_dim
        self._standard_deviation = standard_deviation

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Action:
        """A Gaussian action, clipped to ±1."""
        # Clipped, not squashed: small steps keep their size.
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
        # 1.5 once against 1.5^(−1/4) four times: the product is 1 at one success in five.
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
        """Takes over :meth:`state_dict`."""
        self._standard_deviation = state["standard_deviation"]


class BestOfNSurgeon(Surgeon):
    """Of every ``n`` uniform edits the best is tested.

    Args:
        action_dim: length of an action.
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
        """The best of the round, once the round is over."""
        if self._best is None or reward > self._best[0]:
            self._best = reward, action
        self._num_tried += 1
        if self._num_tried < self._n:
            return None
        # The round begins anew whatever becomes of its best edit.
        (reward, action), self._num_tried, self._best = self._best, 0, None
        return super().candidate(action, reward)

    def state_dict(self) -> dict[str, Any]:
        """The round so far."""
        return {"num_tried": self._num_tried, "best": None if self._best is None else list(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self._num_tried = state["num_tried"]
        self._best = None if state["best"] is None else (state["best"][0], state["best"][1])
