"""A rule over tasks and levels that was itself learned: one network, shared over sources, prefers by how answers fare.

The network sees no name: of each source a few numbers (:data:`FEATURES`), and their mean over all sources. So a rule
that was trained over some tasks chooses among others (deep sets, Zaheer et al., arXiv 1703.06114). It needs no answer
beyond those that are learned from. Its output starts at 0 everywhere: before training it is uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.objectives.task_rules import Groups, State, TaskRule, Vector, levels_of, neighbour, sum_by_source

FEATURES = (
    "level",  # 0 at the first of its task, 1 at the last
    "tried",  # n / (n + 8) of the n answers that are remembered at the middle pace
    "success",  # mean of a Beta posterior of the success rate, at the middle pace
    "variance",  # 4 p(1 − p) of that mean
    "rise",  # the posterior mean at the fast pace less the one at the middle pace
    "slow_rise",  # the one at the middle pace less the one at the slow pace
    "advantage",  # mean absolute advantage of a group, at the middle pace
    "share",  # s / (s + 1) of the share s of the groups, as a multiple of an even share
    "below",  # success of the level below; 1 at the first level
    "above",  # success of the level above; 0 at the last level
)
"""What the network sees of a source; all lie in [−1, 1] but ``advantage``, which is about that large."""

DECAYS = (0.5, 0.8, 0.95)
"""What is left of the counts after each batch at the fast, the middle and the slow pace."""
MIDDLE = 1


class SourcePolicy(nn.Module):
    """Scores of sources, and the value of a state for the algorithm that trains it.

    Args:
        hidden_dim: width of both hidden layers.
        exploration: fraction of the weights that stays even, with which it is trained and used.
        generator: draws the weights; the outputs' are 0.
    """

    def __init__(self, hidden_dim: int, *, exploration: float = 0.05, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.exploration = exploration
        self.encoder = nn.Linear(len(FEATURES), hidden_dim)
        self.inner = nn.Linear(2 * hidden_dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)
        self.value = nn.Linear(hidden_dim + 1, 1)
        for layer in (self.encoder, self.inner):
            nn.init.orthogonal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        for layer in (self.score, self.value):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.double()  # a weight of a mixture is exact on any machine to far more digits than it is looked at

    def forward(
        self, features: Float[Tensor, "*batch sources features"], left: Float[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch sources"], Float[Tensor, "*batch"]]:
        """The score of each source, a log-weight up to a constant, and the value of the state.

        Args:
            features: of the sources, as in :data:`FEATURES`.
            left: share of the budget that is left, which a value depends on and a score does not; 0 where not given.
        """
        encoded = torch.tanh(self.encoder(features))  # [*batch, source, hidden]
        # Every source beside the mean of all: what it is worth depends on what else there is.
        mean = encoded.mean(-2, keepdim=True).expand_as(encoded)
        hidden = torch.tanh(self.inner(torch.cat([encoded, mean], dim=-1)))
        pooled = hidden.mean(-2)  # [*batch, hidden]
        left = pooled.new_zeros(pooled.shape[:-1]) if left is None else left
        return self.score(hidden)[..., 0], self.value(torch.cat([pooled, left[..., None]], dim=-1))[..., 0]


@dataclass(frozen=True)
class LearnedRule(TaskRule):
    """Softmax of the scores of a :class:`SourcePolicy`.

    Args:
        exploration: see :class:`TaskRule`; ``make_task_mixture`` takes the policy's own.
        stall: 1 by default, since the policy sees for itself whether success moves.
        policy: of the scores; it has to be given.

    >>> rule, tasks = LearnedRule(policy=SourcePolicy(4)), [0, 0]
    >>> rule.preferences(rule.initial_state(tasks), tasks, progress=0.0)  # untrained
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    exploration: float | int = 0.05
    stall: float | int = 1.0
    policy: SourcePolicy | None = None

    def initial_state(self, tasks: Sequence[int]) -> State:
        """No answer yet; counts at every pace."""
        zeros = torch.zeros(len(DECAYS), len(tasks), dtype=torch.float64)
        return {"right": zeros, "wrong": zeros, "advantage": zeros[0], "groups": zeros[0]}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """The old counts fade, each at its pace; the batch's are added."""
        decays = torch.tensor(DECAYS, dtype=torch.float64)[:, None]  # [pace, 1]
        decay = DECAYS[MIDDLE]
        right, wrong = (groups.size * part for part in (groups.success, 1 - groups.success))
        return {
            "right": decays * state["right"] + sum_by_source(groups, right, len(tasks)),
            "wrong": decays * state["wrong"] + sum_by_source(groups, wrong, len(tasks)),
            "advantage": decay * state["advantage"] + sum_by_source(groups, groups.advantage, len(tasks)),
            "groups": decay * state["groups"] + sum_by_source(groups, torch.ones_like(groups.success), len(tasks)),
        }

    @torch.no_grad()
    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """See the class."""
        assert self.policy is not None, "make_task_mixture asks for a policy"
        scores, _ = self.policy(source_features(state, tasks))
        return torch.softmax(scores, dim=0)


def source_features(state: State, tasks: Sequence[int]) -> Float[Tensor, "sources features"]:
    """What the network sees of each source, in the order of :data:`FEATURES`.

    Args:
        state: of a :class:`LearnedRule`.
        tasks: the task of each source.

    >>> rule, tasks = LearnedRule(policy=SourcePolicy(4)), [0, 0]
    >>> groups = Groups(torch.tensor([0]), torch.tensor([1.0]), torch.zeros(1), size=8)
    >>> seen = source_features(rule.observe(rule.initial_state(tasks), groups, tasks), tasks)
    >>> dict(zip(FEATURES, [[round(value, 2) for value in pair] for pair in seen.T.tolist()], strict=True))["success"]
    [0.9, 0.5]
    """
    num_levels = [tasks.count(task) for task in tasks]
    level = torch.tensor(
        [level / max(num - 1, 1) for level, num in zip(levels_of(tasks), num_levels, strict=True)], dtype=torch.float64
    )
    right, wrong = state["right"] + 1, state["wrong"] + 1  # a prior of one each: [pace, source]
    fast, middle, slow = right / (right + wrong)
    tried = (state["right"] + state["wrong"])[MIDDLE]
    groups = state["groups"]
    share = len(tasks) * groups / groups.sum().clamp(min=1e-9)
    columns = {
        "level": level,
        "tried": tried / (tried + 8),
        "success": middle,
        "variance": 4 * middle * (1 - middle),
        "rise": fast - middle,
        "slow_rise": middle - slow,
        "advantage": state["advantage"] / groups.clamp(min=1),
        "share": share / (share + 1),
        "below": neighbour(middle, tasks, offset=-1, missing=1.0),
        "above": neighbour(middle, tasks, offset=1, missing=0.0),
    }
    return torch.stack([columns[name] for name in FEATURES], dim=-1)
