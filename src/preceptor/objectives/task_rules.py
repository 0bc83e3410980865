"""Rules over tasks and their levels of difficulty: which ones a policy can learn from now, by the rewards of groups.

A *source* is one level of one task, a *group* several answers to one prompt, each right or wrong. What a group teaches
is bounded by the variance of its rewards, p(1 − p) at success rate p: nothing at 0 and at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.objectives.mixture_rules import check_ranges

State = dict[str, Tensor]
Vector = Float[Tensor, " choices"]

HISTORY = 60
"""Groups of each source that are remembered, newest last."""


@dataclass(frozen=True)
class Groups:
    """The groups of one batch.

    Attributes:
        sources: of each group, the index of the source that it was drawn from.
        success: fraction of each group's answers that were right, in [0, 1].
        advantage: mean absolute advantage over each group's answers.
        size: answers of a group.
    """

    sources: Int[Tensor, " groups"]
    success: Float[Tensor, " groups"]
    advantage: Float[Tensor, " groups"]
    size: int


@dataclass(frozen=True)
class TaskRule:
    """What all rules share; this one is uniform.

    Args:
        exploration: fraction of the weight that is spread evenly over all sources, in [0, 1].
        stall: factor on the preferences of a task whose success has stopped moving, in [0, 1]; 1 never cuts. A level
            has stopped where the mean success of its last 30 groups, between 0.05 and 0.95, is within two standard
            errors of that of the 30 before, and a task where all such levels have. A reward like a coin flip has the
            largest p(1 − p) of all, forever.

    Raises:
        ConfigError: an argument out of its range.
    """

    exploration: float | int = 0.1
    stall: float | int = 0.1

    def __post_init__(self) -> None:
        check_ranges(
            ("exploration", self.exploration, 0 <= self.exploration <= 1, "lie in [0, 1]"),
            ("stall", self.stall, 0 <= self.stall <= 1, "lie in [0, 1]"),
        )

    @property
    def resamples(self) -> bool:
        """Whether groups without variance are drawn again, until a batch is full of groups that teach (DAPO)."""
        return False

    @property
    def asks_for_success(self) -> bool:
        """Whether the rule must be told the true success rates (the oracle)."""
        return False

    def initial_state(self, tasks: Sequence[int]) -> State:
        """What the rule remembers before the first batch; ``tasks`` has the task of each source."""
        return {}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """The state after a batch."""
        return state

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """How much each source is preferred, on any scale; ``progress`` is the fraction of the steps taken."""
        return torch.ones(len(tasks), dtype=torch.float64)


@dataclass(frozen=True)
class SuccessVariance(TaskRule):
    """In proportion to the expected p(1 − p) under a Beta posterior of each source's success rate.

    With discounted counts a of right and b of wrong answers, some of the neighbouring levels' shared in, and a prior of
    one each: E[p(1 − p)] = (a+1)(b+1) / ((a+b+2)(a+b+3)).

    Args:
        decay: of the counts with each batch, in [0, 1].
        neighbours: weight of the counts of the levels next to a level, at least 0.

    >>> rule, tasks = SuccessVariance(neighbours=0.0), [0, 0]
    >>> groups = Groups(torch.tensor([0, 1]), torch.tensor([1.0, 0.5]), torch.zeros(2), size=2)
    >>> state = rule.observe(rule.initial_state(tasks), groups, tasks)
    >>> rule.preferences(state, tasks, progress=0.0)  # 3·1 / (4·5) and 2·2 / (4·5)
    tensor([0.1500, 0.2000], dtype=torch.float64)
    """

    decay: float | int = 0.9
    neighbours: float | int = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            ("decay", self.decay, 0 <= self.decay <= 1, "lie in [0, 1]"),
            ("neighbours", self.neighbours, self.neighbours >= 0, "be at least 0"),
        )

    def initial_state(self, tasks: Sequence[int]) -> State:
        """No answer yet."""
        zeros = torch.zeros(len(tasks), dtype=torch.float64)
        return {"right": zeros, "wrong": zeros}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """The old counts fade; the batch's are added."""
        right = sum_by_source(groups, groups.size * groups.success, len(tasks))
        wrong = sum_by_source(groups, groups.size * (1 - groups.success), len(tasks))
        return {"right": self.decay * state["right"] + right, "wrong": self.decay * state["wrong"] + wrong}

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """See the class."""
        # Beta posterior with a prior of one: levels next to each other are alike, so each lends some of its counts.
        right, wrong = (
            counts + self.neighbours * _of_neighbours(counts, tasks) + 1 for counts in (state["right"], state["wrong"])
        )
        # E[p(1 − p)], not p(1 − p) at the mean: a source that was hardly tried is worth a look.
        total = right + wrong
        return right * wrong / (total * (total + 1))


@dataclass(frozen=True)
class FrontierRange(TaskRule):
    """The highest levels reached of each task, evenly: a window that moves up as its top level is mastered.

    Source: RLVE, arXiv 2511.07317, whose window has four levels and moves at nine in ten. Where one level helps the
    next, waiting for so much costs more than it gives: with 0.9 a model takes longer to learn to reverse digits.

    Args:
        window: number of levels.
        threshold: success rate at the top level at which the window moves, in (0, 1).
        answers: at the top level that the rate is taken over.

    >>> rule, tasks = FrontierRange(window=1, answers=4), [0, 0, 1]
    >>> groups = Groups(torch.tensor([0, 2]), torch.tensor([1.0, 0.5]), torch.zeros(2), size=4)
    >>> state = rule.observe(rule.initial_state(tasks), groups, tasks)
    >>> rule.preferences(state, tasks, progress=0.0)  # the first task is at its second level now
    tensor([0., 1., 1.], dtype=torch.float64)
    """

    exploration: float | int = 0.0
    window: float | int = 2.0
    threshold: float | int = 0.5
    answers: float | int = 64.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            ("window", self.window, self.window >= 1, "be at least 1"),
            ("threshold", self.threshold, 0 < self.threshold < 1, "lie in (0, 1)"),
            ("answers", self.answers, self.answers >= 1, "be at least 1"),
        )

    def initial_state(self, tasks: Sequence[int]) -> State:
        """Every task at its first level; one number a task."""
        zeros = torch.zeros(max(tasks) + 1, dtype=torch.float64)
        return {"frontier": zeros, "right": zeros, "seen": zeros}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """Counts the answers at each task's top level, and moves the window where there are enough."""
        frontier, right, seen = (state[name].clone() for name in ("frontier", "right", "seen"))
        successes = sum_by_source(groups, groups.size * groups.success, len(tasks))
        answers = sum_by_source(groups, torch.full_like(groups.success, groups.size), len(tasks))
        for task in range(len(frontier)):
            levels = [source for source, of in enumerate(tasks) if of == task]
            top = levels[int(frontier[task])]
            right[task] += successes[top]
            seen[task] += answers[top]
            # A rate over a fixed number of answers, then a new count: a running rate would remember the level before.
            if seen[task] >= self.answers:
                if right[task] / seen[task] >= self.threshold and frontier[task] < len(levels) - 1:
                    frontier[task] += 1
                right[task] = seen[task] = 0.0
        return {"frontier": frontier, "right": right, "seen": seen}

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """One in the window, zero outside."""
        levels = levels_of(tasks)
        tops = [int(state["frontier"][task]) for task in tasks]
        # Evenly inside: the level below keeps what was learned, the top one brings what is new.
        inside = [top - self.window < level <= top for level, top in zip(levels, tops, strict=True)]
        return torch.tensor(inside, dtype=torch.float64)


@dataclass(frozen=True)
class MeanAdvantage(TaskRule):
    """Softmax of a running mean of each source's mean absolute advantage.

    Source: SEC, arXiv 2505.14970. At temperature 0.25 it stays on the first level for good with some seeds.

    Args:
        rate: of the running mean, in (0, 1].
        temperature: of the softmax, above 0.
    """

    exploration: float | int = 0.0
    rate: float | int = 0.5
    temperature: float | int = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            ("rate", self.rate, 0 < self.rate <= 1, "lie in (0, 1]"),
            ("temperature", self.temperature, self.temperature > 0, "be above 0"),
        )

    def initial_state(self, tasks: Sequence[int]) -> State:
        """Nothing is known to teach."""
        return {"mean": torch.zeros(len(tasks), dtype=torch.float64)}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """The running mean moves where the batch has groups."""
        # Sources without a group in this batch keep their mean; 0 would say that they teach nothing.
        count = sum_by_source(groups, torch.ones_like(groups.success), len(tasks))
        mean = sum_by_source(groups, groups.advantage, len(tasks)) / count.clamp(min=1)
        return {"mean": torch.where(count > 0, state["mean"] + self.rate * (mean - state["mean"]), state["mean"])}

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """See the class."""
        return torch.softmax(state["mean"] / self.temperature, dim=0)


@dataclass(frozen=True)
class UpperConfidence(MeanAdvantage):
    """Softmax of the mean absolute advantage of the latest groups plus √(2 ln(n + 1) / (n_k + 1)).

    Source: DUMP, arXiv 2504.09710.

    Args:
        rate: of the running mean over groups, in (0, 1]; about 2 over the groups that it spans.
        temperature: of the softmax, above 0.
    """

    rate: float | int = 0.05

    def initial_state(self, tasks: Sequence[int]) -> State:
        """No group yet."""
        zeros = torch.zeros(len(tasks), dtype=torch.float64)
        return {"mean": zeros, "num_groups": zeros}

    def observe(self, state: State, groups: Groups, tasks: Sequence[int]) -> State:
        """Group by group, so that the mean spans groups and not batches."""
        mean, num_groups = state["mean"].clone(), state["num_groups"].clone()
        for source, advantage in zip(groups.sources.tolist(), groups.advantage.tolist(), strict=True):
            # A plain mean until the window is full: the first group must not weigh as if others stood behind it.
            rate = max(self.rate, 1 / (num_groups[source] + 1))
            mean[source] += rate * (advantage - mean[source])
            num_groups[source] += 1
        return {"mean": mean, "num_groups": num_groups}

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """See the class."""
        num_groups = state["num_groups"]
        # n + 1 and n_k + 1: nothing is infinite before the first group.
        bonus = (2 * torch.log(num_groups.sum() + 1) / (num_groups + 1)).sqrt()
        return torch.softmax((state["mean"] + bonus) / self.temperature, dim=0)


@dataclass(frozen=True)
class DynamicSampling(TaskRule):
    """Uniform, and groups whose answers are all right or all wrong are drawn again (DAPO, arXiv 2503.14476)."""

    @property
    def resamples(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True)
class Staged(TaskRule):
    """Levels open one after another on a fixed schedule, the last one at ``horizon`` of the steps.

    Args:
        horizon: fraction of the steps, in (0, 1].
        hardest_first: 1 opens the highest level first.
    """

    exploration: float | int = 0.0
    horizon: float | int = 0.25
    hardest_first: float | int = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            ("horizon", self.horizon, 0 < self.horizon <= 1, "lie in (0, 1]"),
            ("hardest_first", self.hardest_first, self.hardest_first in (0, 1), "be 0 or 1"),
        )

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """One for every open level."""
        levels = levels_of(tasks)
        nums = [tasks.count(task) for task in tasks]
        # At least one level is open from the start, and all of them from the horizon on.
        done = min(1.0, progress / self.horizon)
        opened = [
            (num - 1 - level if self.hardest_first else level) < max(1.0, num * done)
            for level, num in zip(levels, nums, strict=True)
        ]
        return torch.tensor(opened, dtype=torch.float64)


@dataclass(frozen=True)
class Oracle(TaskRule):
    """In proportion to p(1 − p) of success rates measured apart, whose answers count as cost: a bound, not a rule."""

    @property
    def asks_for_success(self) -> bool:
        """Yes."""
        return True

    def initial_state(self, tasks: Sequence[int]) -> State:
        """Nothing was measured."""
        return {"success": torch.full((len(tasks),), 0.5, dtype=torch.float64)}

    def preferences(self, state: State, tasks: Sequence[int], *, progress: float) -> Vector:
        """See the class."""
        return state["success"] * (1 - state["success"])


def is_stalled(history: Sequence[float]) -> bool:
    """Whether success has stopped moving; False until there are ``HISTORY`` groups. See :class:`TaskRule`.

    >>> is_stalled([0.5, 0.25, 0.75] * 20), is_stalled([0.1] * 30 + [0.6] * 30), is_stalled([0.0] * 60)
    (True, False, False)
    """
    if len(history) < HISTORY:
        return False
    half = HISTORY // 2
    values = torch.tensor(history[-HISTORY:], dtype=torch.float64)
    # Two halves next to each other: a slow rise shows as a difference of their means.
    before, after = values[:half], values[half:]
    error = ((before.var() + after.var()) / half).sqrt() + 0.01  # of the difference, never quite 0
    return bool(0.05 < after.mean() < 0.95 and (after.mean() - before.mean()).abs() < 2 * error)


def levels_of(tasks: Sequence[int]) -> list[int]:
    """The level of each source within its task, from 0."""
    return [source - tasks.index(task) for source, task in enumerate(tasks)]


def sum_by_source(groups: Groups, values: Tensor, num_sources: int) -> Vector:
    """The sum of the values of each source's groups."""
    return torch.zeros(num_sources, dtype=torch.float64).index_add_(0, groups.sources, values.double())


def neighbour(values: Vector, tasks: Sequence[int], *, offset: int, missing: float) -> Vector:
    """Of each source, the value of the level ``offset`` above it in its own task; ``missing`` where there is none.

    >>> neighbour(torch.tensor([1.0, 2.0, 3.0]), [0, 0, 1], offset=1, missing=0.0)
    tensor([2., 0., 0.])
    """
    shifted = torch.full_like(values, missing)
    for source, task in enumerate(tasks):
        other = source + offset
        if 0 <= other < len(tasks) and tasks[other] == task:
            shifted[source] = values[other]
    return shifted


def _of_neighbours(values: Vector, tasks: Sequence[int]) -> Vector:
    """Of each source, the sum over the levels next to it in its own task."""
    return neighbour(values, tasks, offset=-1, missing=0.0) + neighbour(values, tasks, offset=1, missing=0.0)
