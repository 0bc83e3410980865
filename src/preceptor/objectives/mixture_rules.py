"""Rules that turn measured difficulty into preferences among datasets.

A rule is a frozen record of its constants; what it remembers is passed in and given back, so that it can be saved.
No rule looks at a dataset's place in the list: permuting the datasets permutes the result.

**Why a noise dataset attracts no weight.** Random text has a high loss that never falls. A rule that rewards loss
(``difficulty``, ``exp3``) pours the budget into it. A rule that rewards the *fall* of the loss is not safe either: of
two noisy measurements one is lower, and half the time it is the later one, so chance alone looks like progress. The two
rules here count a fall only as far as it exceeds ``threshold`` standard errors of itself, with the errors of the
measurements carried through every average exactly. A loss that does not move passes one error by chance in 16 % of the
updates and is then worth half an error on average, where real progress is many errors; two errors shut noise out almost
wholly (2.3 %), but small progress too.

**Why forgetting earns nothing.** A dataset that draws no weight is forgotten: its loss rises, and falls again as soon
as it is drawn once more. Paid for that fall, a rule would chase whatever it starved before, noise above all. So
progress is counted by :func:`counted_loss`: a fall as far as it goes below the best loss so far, a rise in full.

**What is learned for.** Only targets are judged. A mixture that knows them keeps a share of its weight on them
(:class:`~preceptor.objectives.mixture.Mixture`), and ``targets`` and ``alignment`` of :class:`Difficulty` tell a rule
which they are and what each dataset's gradient does for them (:mod:`preceptor.objectives.mixture_targets`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Difficulty:
    """One measurement of every dataset; float64 tensors with one number a dataset.

    Attributes:
        mean: of the document losses, nats per token.
        variance: of the document losses, squared nats per token.
        mean_error: standard error of ``mean``: how far two measurements differ by the choice of documents alone.
        variance_error: the same of ``variance``.
        targets: True = the dataset is judged in the end; None where nobody said, and then all count alike.
        alignment: by how much a step on the dataset lowers the loss of the targets, to first order, on any scale; NaN
            for a dataset that was not measured this time, None where none was.

    >>> one = torch.ones(2)
    >>> Difficulty(mean=one, variance=one, mean_error=one, variance_error=one).mean
    tensor([1., 1.])
    """

    mean: Float[Tensor, " choices"]
    variance: Float[Tensor, " choices"]
    mean_error: Float[Tensor, " choices"]
    variance_error: Float[Tensor, " choices"]
    targets: Bool[Tensor, " choices"] | None = None
    alignment: Float[Tensor, " choices"] | None = None


def counted_loss(
    loss: Float[Tensor, " choices"],
    *,
    previous: Float[Tensor, " choices"],
    best: Float[Tensor, " choices"],
    counted: Float[Tensor, " choices"],
    margin: Float[Tensor, " choices"],
) -> Float[Tensor, " choices"]:
    """The losses as progress is counted by: every rise counts, a fall only below the best so far.

        counted ← counted − (best − loss)₊ + (loss − previous − margin)₊

    Where a loss only ever falls this is the loss itself. One that rises and falls back has risen for good, so whatever
    is forgotten and learned again earns nothing.

    Args:
        loss: now, nats per token.
        previous: at the measurement before.
        best: the lowest so far, ``loss`` not included.
        counted: what this function gave at the measurement before; the loss itself at the first one.
        margin: rises up to here are chance, nats per token.

    >>> loss, counted = torch.tensor([2.0]), torch.tensor([2.0])  # starved: up to 3, then learned again down to 1.5
    >>> for now, best in ((3.0, 2.0), (2.0, 2.0), (1.5, 2.0)):
    ...     now, before = torch.tensor([now]), loss
    ...     counted = counted_loss(now, previous=before, best=torch.tensor([best]), counted=counted, margin=now * 0)
    ...     loss = now
    ...     print(counted.item())
    3.0
    3.0
    2.5
    """
    return counted - (best - loss).clamp(min=0) + (loss - previous - margin).clamp(min=0)


@runtime_checkable
class MixtureRule(Protocol):
    """What a :class:`~preceptor.objectives.mixture.Mixture` asks of a rule; your own needs these two methods.

    >>> class Easiest:
    ...     def initial_state(self, num_datasets):
    ...         return {}
    ...
    ...     def preferences(self, difficulty, state, *, tokens, weights, num_updates):
    ...         return 1 / difficulty.mean, state
    >>> isinstance(Easiest(), MixtureRule)
    True
    """

    def initial_state(self, num_datasets: int) -> State:
        """What the rule remembers before the first measurement: float64 tensors by name.

        A tensor has one number a dataset, or rows of them, (rows, ``num_datasets``), where the rule keeps a history.
        """
        ...

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """How much each dataset is preferred now, on any scale, with the state for the next call.

        What is not above 0 is not preferred; if nothing is, the mixture becomes uniform.

        Args:
            difficulty: what was measured.
            state: what was remembered; it is not changed.
            tokens: of each dataset trained on since the call before.
            weights: under which they were drawn.
            num_updates: calls before this one.
        """
        ...


@dataclass(frozen=True)
class SecondOrder:
    """Weights that move along a velocity, and a velocity that follows the change over time of the metric.

    The metric of a dataset is m = mean + c·variance. Its smoothed fall per update is the velocity

        v = (1 − μ)·(a − m),   a ← a − v,   counted beyond z of its standard errors: ṽ = sign(v)·max(|v| − z·σ_v, 0)

    (a starts at the first m, so v ← μ·v + (1 − μ)·(m_before − m_now) while μ is constant; 1 − μ is at least t₀/(t + t₀)
    at update t). The weights are w ← w + η·u/Σ|u|, clipped at 0 and scaled to sum to 1, with u = ṽ + d·(mean of σ_v).
    Where no change exceeds its error u is the same for all, so the weights drift back to uniform: what was favoured for
    its progress shows none any more. Where all are clipped to 0 they become uniform, and the mixture says so.

    Departures from the text, whose code differentiates *across the list of datasets*, so that weights depend on the
    order in which datasets are listed: the change is taken over time; it counts when the metric *falls*; it is scaled
    (Σ|u| = 1), so that η means the same whatever the loss; what lies within the error does not count. The text's η is
    0.1; a run has tens of updates, not thousands, so the default is larger. With ``guard`` m is first passed through
    :func:`counted_loss` (margin: 2z errors), so that what was forgotten and is learned again shows no velocity.

    Args:
        step_size: η > 0, the share that one update can move.
        momentum: μ in [0, 1).
        warm_up: t₀ ≥ 0, updates: until the run is some t₀/(1 − μ) updates old, the memory of the velocity is a share of
            its age. The first updates see falls of nats, later ones of hundredths; with a fixed memory, what fell
            steeply at first and has long stopped, as noise does once its alphabet is learnt, would lead for most of
            a run.
        variance_weight: c ≥ 0, per nat.
        threshold: z ≥ 0, in standard errors.
        doubt: d ≥ 0, in standard errors: the progress granted to every dataset, since it cannot be excluded. Without
            it, one dataset that passes the threshold by chance, alone and by a hair, would get everything.
        guard: whether a fall counts only below the best metric so far; 0 is the text.

    Raises:
        ConfigError: an argument out of its range.

    >>> rule, tokens = SecondOrder(step_size=1.0, momentum=0.5), torch.ones(2)
    >>> zeros, state, uniform = torch.zeros(2), rule.initial_state(2), torch.full((2,), 0.5)
    >>> for n, mean in enumerate([[2.0, 5.0], [1.0, 5.0]]):  # only the first is being learnt
    ...     measured = Difficulty(torch.tensor(mean), zeros, zeros, zeros)
    ...     weights, state = rule.preferences(measured, state, tokens=tokens, weights=uniform, num_updates=n)
    >>> weights / weights.sum()
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    step_size: float = 0.5
    momentum: float = 0.9
    warm_up: float = 4.0
    variance_weight: float = 1.0
    threshold: float = 1.0
    doubt: float = 0.1
    guard: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(
            ("step_size", self.step_size, self.step_size > 0, "be above 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "lie in [0, 1)"),
            ("warm_up", self.warm_up, self.warm_up >= 0, "be at least 0"),
            ("variance_weight", self.variance_weight, self.variance_weight >= 0, "be at least 0"),
            ("threshold", self.threshold, self.threshold >= 0, "be at least 0"),
            ("doubt", self.doubt, self.doubt >= 0, "be at least 0"),
            ("guard", self.guard, self.guard in (0, 1), "be 0 or 1"),
        )

    def initial_state(self, num_datasets: int) -> State:
        """No measurement yet; ``position`` are the weights before exploration, which start uniform."""
        zeros = torch.zeros(num_datasets, dtype=torch.float64)
        return {
            "position": torch.full_like(zeros, 1 / num_datasets),
            "average": zeros,
            "average_variance": zeros,
            **_no_losses(num_datasets),
        }

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`MixtureRule`."""
        metric = difficulty.mean.double() + self.variance_weight * difficulty.variance.double()
        # The two errors are not independent (they come from the same documents); their sum bounds that of the metric.
        error = difficulty.mean_error.double() + self.variance_weight * difficulty.variance_error.double()
        losses = _count(metric, state, margin=2 * self.threshold * error, first=num_updates == 0)
        metric = losses["counted"] if self.guard else metric
        if num_updates == 0:
            return weights, state | {
                "position": weights,
                "average": metric,
                "average_variance": error.square(),
                **losses,
            }
        # 1 − μ in the long run, larger in the first updates: see `warm_up`.
        rate = max(1 - self.momentum, self.warm_up / (num_updates + self.warm_up))
        # As the distance from a running average, the smoothed change has an error that is a sum over independent
        # measurements.
        # A fall of the metric is positive.
        velocity = rate * (state["average"] - metric)
        velocity_error = rate * (state["average_variance"] + error.square()).sqrt()
        # Soft threshold: towards 0 by z standard errors, and 0 within them.
        beyond = velocity.sign() * (velocity.abs() - self.threshold * velocity_error).clamp(min=0)
        # The same for all: it matters little where progress is clear and decides where there is none.
        force = beyond + self.doubt * velocity_error.mean()
        uniform = torch.full_like(beyond, 1 / len(beyond))
        # Scaled to Σ|step| = 1: `step_size` is a share of the mixture, whatever the unit of the loss.
        step = force / force.abs().sum() if force.any() else uniform
        # Clipped at 0 but not yet scaled: preferences may have any scale.
        position = (state["position"] + self.step_size * step).clamp(min=0)
        shares = position / position.sum() if position.any() else uniform
        return position, {
            "position": shares,
            # average − velocity is the exponential average: (1 − rate) · average + rate · metric.
            "average": state["average"] - velocity,
            # Variance of a weighted sum of independent measurements.
            "average_variance": (1 - rate) ** 2 * state["average_variance"] + rate**2 * error.square(),
            **losses,
        }


@dataclass(frozen=True)
class LearningProgress:
    """Weights in proportion to how fast the loss falls: slow minus fast running average, as far as it is no chance.

    With averages a ← a + rate·(ℓ − a) of the counted loss ℓ (:func:`counted_loss`, with a margin of 2z errors), which
    start at the first measurement, the progress is

        p = slow − fast,   w ∝ (max(p − z·σ_p, 0) + d·(mean of σ_p)) / √h

    with σ_p the standard error of p, rates that begin high (see ``warm_up``) and h the running share of the dataset in
    what was drawn. Progress scales with how much of a dataset is trained on, so weights in proportion to it alone would
    make the rich richer; progress per token (p/h) would hand a dataset the progress that it owes to others, and √h lies
    between. If no dataset shows progress beyond its error, the mixture is uniform but for √h; if there is no error
    either, it is uniform and says so.

    Source: the running averages of learning progress in Matiisen et al., arXiv 1707.00183, and Kanitscheider et al.,
    arXiv 2106.14876 (fast and slow). Theirs take the absolute value, so that what is being forgotten is practised
    again; a dataset of noise is "forgotten" all the time, so here a forgotten target is brought back by the share of
    the mixture that is kept on targets.

    Args:
        fast: rate of the fast average, in (0, 1].
        slow: rate of the slow one, in (0, fast).
        warm_up: t₀ ≥ 0, updates: the slow rate is never below t₀/(t + t₀) at update t, the fast one never below twice
            that (nor above 1); see :class:`SecondOrder` for why.
        threshold: z ≥ 0, in standard errors. The error is that of measurements whose noise is independent. A dataset
            that is not being learnt clears z = 1 in 2 % of measurements on fresh documents and in 3 % on the same ones
            each time (a fall that undoes a rise does not count; 16 % and 8 % if it did); but in 35 % where their losses
            walk at random, as under training that moves them to and fro (41 % if it did).
            One document a dataset gives no error at all, and z no meaning.
        doubt: d ≥ 0, in standard errors; see :class:`SecondOrder`.
        share_exponent: of h, in [0, 1]: 0 is progress as it is, 1 progress per token.

    Raises:
        ConfigError: an argument out of its range.

    >>> rule, tokens, state = LearningProgress(), torch.ones(2), LearningProgress().initial_state(2)
    >>> zeros, uniform = torch.zeros(2), torch.full((2,), 0.5)
    >>> for n, mean in enumerate([[2.0, 5.0], [1.0, 5.0]]):  # only the first is being learnt
    ...     measured = Difficulty(torch.tensor(mean), zeros, zeros, zeros)
    ...     preferences, state = rule.preferences(measured, state, tokens=tokens, weights=uniform, num_updates=n)
    >>> preferences / preferences.sum()
    tensor([1., 0.], dtype=torch.float64)
    """

    fast: float = 0.3
    slow: float = 0.05
    warm_up: float = 4.0
    threshold: float = 1.0
    doubt: float = 0.1
    share_exponent: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(
            ("fast", self.fast, 0 < self.fast <= 1, "lie in (0, 1]"),
            ("slow", self.slow, 0 < self.slow < self.fast, f"lie in (0, fast = {self.fast})"),
            ("warm_up", self.warm_up, self.warm_up >= 0, "be at least 0"),
            ("threshold", self.threshold, self.threshold >= 0, "be at least 0"),
            ("doubt", self.doubt, self.doubt >= 0, "be at least 0"),
            ("share_exponent", self.share_exponent, 0 <= self.share_exponent <= 1, "lie in [0, 1]"),
        )

    def initial_state(self, num_datasets: int) -> State:
        """No measurement yet."""
        names = ("fast", "slow", "fast_variance", "slow_variance", "covariance", "share")
        zeros = torch.zeros(num_datasets, dtype=torch.float64)
        return dict.fromkeys(names, zeros) | _no_losses(num_datasets)

    def preferences(
        self,
        difficulty: Difficulty,
        state: State,
        *,
        tokens: Float[Tensor, " choices"],
        weights: Float[Tensor, " choices"],
        num_updates: int,
    ) -> tuple[Float[Tensor, " choices"], State]:
        """See :class:`MixtureRule`."""
        error, variance = difficulty.mean_error.double(), difficulty.mean_error.double().square()
        losses = _count(difficulty.mean.double(), state, margin=2 * self.threshold * error, first=num_updates == 0)
        mean = losses["counted"]
        if num_updates == 0:
            first = {
                "fast": mean,
                "slow": mean,
                "fast_variance": variance,
                "slow_variance": variance,
                "covariance": variance,
                "share": weights,
                **losses,
            }
            return weights, state | first
        # t₀/(t + t₀), so that young averages remember a share of their age.
        young = self.warm_up / (num_updates + self.warm_up)
        # Fast must stay ahead of slow, or progress would be 0 by construction.
        slow, fast = max(self.slow, young), min(max(self.fast, 2 * young), 1.0)
        new = {
            "fast": state["fast"] + fast * (mean - state["fast"]),
            "slow": state["slow"] + slow * (mean - state["slow"]),
            # Both averages are sums over the same measurements, so their errors are correlated.
            "fast_variance": (1 - fast) ** 2 * state["fast_variance"] + fast**2 * variance,
            "slow_variance": (1 - slow) ** 2 * state["slow_variance"] + slow**2 * variance,
            "covariance": (1 - fast) * (1 - slow) * state["covariance"] + fast * slow * variance,
            "share": state["share"] + slow * (weights - state["share"]),
            **losses,
        }
        # The slow average lags behind: above the fast one it says that the loss has been falling.
        progress = new["slow"] - new["fast"]
        # Var(slow − fast); clamped because rounding can make it −1e−20.
        error = (new["fast_variance"] + new["slow_variance"] - 2 * new["covariance"]).clamp(min=0).sqrt()
        beyond = (progress - self.threshold * error).clamp(min=0) + self.doubt * error.mean()
        # A dataset that was never drawn has share 0; its preference becomes large, not infinite.
        share = new["share"].clamp(min=torch.finfo(torch.float64).tiny)
        return beyond / share**self.share_exponent, new


def _no_losses(num_datasets: int) -> State:
    """The parts of a rule's state that :func:`_count` keeps."""
    zeros = torch.zeros(num_datasets, dtype=torch.float64)
    return {"previous": zeros, "best": zeros, "counted": zeros}


def _count(loss: Tensor, state: State, *, margin: Tensor, first: bool) -> State:
    """The new ``previous``, ``best`` and ``counted`` of a rule's state, given the losses just measured."""
    if first:
        return {"previous": loss, "best": loss, "counted": loss}
    return {
        "previous": loss,
        "best": torch.minimum(state["best"], loss),
        "counted": counted_loss(
            loss, previous=state["previous"], best=state["best"], counted=state["counted"], margin=margin
        ),
    }


def check_ranges(*ranges: tuple[str, float | int, bool, str]) -> None:
    """Nothing, when each (name, value, whether it holds, what is allowed) holds and the value is finite.

    Raises:
        ConfigError: naming every value that does not.
    """
    faults = [
        f"{name} must {allowed}, got {value}."
        for name, value, holds, allowed in ranges
        if not (holds and math.isfinite(value))
    ]
    if faults:
        raise ConfigError(*faults)
