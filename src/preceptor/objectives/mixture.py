"""Weights of a mixture of datasets that follow what a model can learn from next.

A :class:`Mixture` holds the weights; a rule (:mod:`preceptor.objectives.mixture_rules`) says which datasets it prefers
after each measurement of their difficulty. Nothing here knows a model or a file, so it fits any training loop::

    mixture = make_mixture("learning_progress", num_datasets=3)
    for ...:
        sampler.weights = mixture.weights
        ...                                    # train for a while on what the sampler draws
        difficulty = document_difficulty(losses_on_a_sample_of_each_dataset)
        mixture.update(difficulty)

Everything is float64 on the CPU, whatever the model computes in: a run draws the same data on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError, did_you_mean
from preceptor.objectives.mixture_controls import Ado, ByDifficulty, Exp3, Fixed
from preceptor.objectives.mixture_rules import (
    Difficulty,
    LearningProgress,
    MixtureRule,
    SecondOrder,
)
from preceptor.objectives.mixture_targets import Alignment, ProgressOnTargets

MIXTURE_RULES: dict[str, str] = {
    "second_order": "weights move along a velocity, the smoothed fall over time of mean loss plus variance",
    "learning_progress": "in proportion to slow minus fast running loss, where that exceeds its error",
    "progress_on_targets": "in proportion to how much the losses of the targets move; the others are only explored",
    "alignment": "in proportion to how far the gradient of each dataset agrees with that of the targets",
    "difficulty": "in proportion to the mean loss: chases noise, a control",
    "exp3": "Online Data Mixing: an Exp3 bandit whose reward is the loss of what was trained on",
    "ado": "Adaptive Data Optimization: a scaling law fitted to each dataset forecasts how fast its loss falls",
    "proportional": "in proportion to the datasets' sizes, never moving",
    "uniform": "all alike, never moving",
    "targets": "the targets alike and nothing else, never moving",
    "static": "as given, never moving",
}
"""What :func:`make_mixture` makes, with a line on each."""

_ADAPTIVE: dict[str, type[MixtureRule]] = {
    "second_order": SecondOrder,
    "learning_progress": LearningProgress,
    "progress_on_targets": ProgressOnTargets,
    "alignment": Alignment,
    "difficulty": ByDifficulty,
    "exp3": Exp3,
    "ado": Ado,
}

TARGET_SHARE = 0.5
"""Of the weight, kept on the targets by the rules whose preferences say nothing about which datasets are targets."""


def document_difficulty(
    losses: Sequence[Float[Tensor, " _"]], *, previous: Sequence[Float[Tensor, " _"]] | None = None
) -> Difficulty:
    """Mean and variance of the document losses of each dataset, with the error that chance leaves in them.

    Two ways of sampling documents, and the error that belongs to each:

    - *fresh* documents at each measurement (``previous`` is None): the standard error of the mean, √(variance/n), and
      that of a variance, variance·√(2/(n−1)) (exact for normal losses);
    - *the same* documents each time (``previous`` holds their losses at the last measurement; at the first, pass
      ``losses`` again): the standard error of the mean *change* over the documents. What makes one document harder
      than another cancels, so the error is several times smaller and much weaker progress is seen.

    Args:
        losses: for each dataset, the loss of each sampled document in nats per token; at least one document each. One
            alone leaves nothing to estimate an error from, which is then 0.
        previous: losses of the very same documents, in the same order, at the measurement before.

    Raises:
        ShapeError: a dataset without documents, or ``previous`` of another shape.

    >>> d = document_difficulty([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])])
    >>> d.mean.tolist(), d.variance.tolist(), d.mean_error.tolist()
    ([2.0, 2.0], [2.0, 0.0], [1.0, 0.0])
    """
    # Float64 on the CPU, so that every device arrives at the same weights.
    now = [values.detach().to("cpu", torch.float64) for values in losses]
    if empty := [index for index, values in enumerate(now) if values.numel() == 0]:
        raise ShapeError(f"datasets {empty} have no measured documents; each needs at least one")
    mean = torch.stack([values.mean() for values in now])
    variance = torch.stack([_variance(values) for values in now])
    counts = torch.tensor([values.numel() for values in now], dtype=torch.float64)
    if previous is None:
        # Independent samples: the textbook errors.
        mean_error = (variance / counts).sqrt()
        return Difficulty(mean, variance, mean_error, variance * (2 / (counts - 1).clamp(min=1)).sqrt())
    before = [values.detach().to("cpu", torch.float64) for values in previous]
    if [values.shape for values in before] != [values.shape for values in now]:
        raise ShapeError(
            f"previous has {[len(values) for values in before]} documents a dataset and losses "
            f"{[len(values) for values in now]}; they must be losses of the same documents"
        )
    # Per document: its change in loss, and its change in squared distance from the mean.
    changes = [new - old for new, old in zip(now, before, strict=True)]
    spread_changes = [_squares(new) - _squares(old) for new, old in zip(now, before, strict=True)]
    return Difficulty(
        mean,
        variance,
        (torch.stack([_variance(values) for values in changes]) / counts).sqrt(),
        (torch.stack([_variance(values) for values in spread_changes]) / counts).sqrt(),
    )


def _variance(values: Float[Tensor, " text"]) -> Float[Tensor, ""]:
    return _squares(values).sum() / max(values.numel() - 1, 1)


def _squares(values: Float[Tensor, " text"]) -> Float[Tensor, " text"]:
    return (values - values.mean()).square()


class Mixture:
    """The weights of ``num_datasets`` datasets and the rule that moves them.

    After each update w = (1 − ε)·p + ε/K, with p the rule's preferences scaled to sum to 1 and ε ``exploration``: a
    dataset that is out of favour is still seen, so that the rule can notice when it becomes worth learning again.
    Where the rule prefers nothing at all, the weights are uniform and ``fell_back`` says so. If it is known which
    datasets are targets, a share τ of the mixture stays on them, evenly: (1 − τ)·w + τ·(1/T on each of T targets).

    Args:
        rule: what is preferred after a measurement; any object with the two methods of :class:`MixtureRule`.
        num_datasets: K, at least 1.
        exploration: ε in [0, 1], the share of the mixture that is spread evenly.
        initial_weights: before the first update, any scale; ``None``: uniform.
        targets: True = the dataset is judged in the end; ``None``: nobody said. It is passed on to the rule.
        target_share: τ in [0, 1]; spread evenly over all datasets where none is a target, and without effect where
            nobody said.

    Attributes:
        num_updates: how many measurements the weights have seen.
        fell_back: the last update had nothing to go by and made the weights uniform.

    Raises:
        ConfigError: an argument out of its range.

    >>> mixture = Mixture(ByDifficulty(), num_datasets=2, exploration=0.5)
    >>> zeros = torch.zeros(2)
    >>> mixture.update(Difficulty(torch.tensor([3.0, 1.0]), zeros, zeros, zeros))
    tensor([0.6250, 0.3750], dtype=torch.float64)
    """

    def __init__(
        self,
        rule: MixtureRule,
        *,
        num_datasets: int,
        exploration: float = 0.1,
        initial_weights: Sequence[float | int] | None = None,
        targets: Sequence[bool] | None = None,
        target_share: float = 0.0,
    ) -> None:
        if num_datasets < 1:
            raise ConfigError(f"a mixture needs at least one dataset, got {num_datasets}")
        if not 0 <= exploration <= 1:
            raise ConfigError(f"exploration must lie in [0, 1], got {exploration}")
        if not 0 <= target_share <= 1:
            raise ConfigError(f"target_share must lie in [0, 1], got {target_share}")
        if targets is not None and len(targets) != num_datasets:
            raise ConfigError(f"{num_datasets} datasets need as many targets (true or false), got {len(targets)}")
        self.targets = None if targets is None else torch.tensor([bool(target) for target in targets])
        self.target_share = target_share
        self.rule = rule
        self.num_datasets = num_datasets
        self.exploration = exploration
        self.num_updates = 0
        self.fell_back = False
        self._state = rule.initial_state(num_datasets)
        start = [1.0] * num_datasets if initial_weights is None else initial_weights
        self._weights = _checked_weights(start, num_datasets)

    @property
    def weights(self) -> Float[Tensor, " choices"]:
        """The share of each dataset in what is drawn next; a copy, which sums to 1."""
        return self._weights.clone()

    def update(
        self, difficulty: Difficulty, *, tokens: Float[Tensor, " choices"] | None = None
    ) -> Float[Tensor, " choices"]:
        """The weights after ``difficulty`` was measured.

        Args:
            difficulty: of each dataset, now.
            tokens: how many of each dataset the model was trained on since the update before, for the rules that count
                them (``exp3``, ``ado``). ``None``: as many as the weights say, and none before the first update.

        Raises:
            ShapeError: one number a dataset is needed everywhere.
            NumericError: a number that is not finite, measured or preferred, or a negative variance, error or count;
                nothing has changed then.
        """
        # Before the first update nothing was trained on; afterwards weights are as good as counts, for only ratios
        # matter.
        if tokens is None:
            tokens = self.weights if self.num_updates else torch.zeros_like(self._weights)
        tokens = tokens.detach().to("cpu", torch.float64)
        if difficulty.targets is None:
            difficulty = replace(difficulty, targets=self.targets)
        _check(difficulty, tokens, num_datasets=self.num_datasets)
        # A copy of the state's dictionary: a rule that raises must not have changed half of it.
        given: tuple[Any, dict[str, Tensor]] = self.rule.preferences(
            difficulty, dict(self._state), tokens=tokens, weights=self.weights, num_updates=self.num_updates
        )
        preferences, state = given  # of a user's rule, which may give anything
        # Checked before anything is assigned, so that the caller may catch the error and go on.
        if not isinstance(preferences, Tensor) or preferences.shape != (self.num_datasets,):
            got = tuple(preferences.shape) if isinstance(preferences, Tensor) else type(preferences).__name__
            raise ShapeError(
                f"{type(self.rule).__name__}.preferences must give a number for each of {self.num_datasets} datasets, "
                f"got {got}"
            )
        if not torch.isfinite(preferences).all():
            raise NumericError(
                f"{type(self.rule).__name__} prefers {preferences.tolist()}; a rule must give finite numbers"
            )
        # All preferences at or below 0 say nothing; dividing by their sum would be 0/0.
        self.fell_back = not bool((preferences > 0).any())
        shares = torch.ones_like(preferences) if self.fell_back else preferences.clamp(min=0)
        weights = (1 - self.exploration) * shares / shares.sum() + self.exploration / self.num_datasets
        if self.targets is not None and self.target_share:
            kept = self.targets.double() if self.targets.any() else torch.ones_like(weights)
            kept = kept / kept.sum()
            weights = (1 - self.target_share) * weights + self.target_share * kept
        self._weights = weights
        self._state = state
        self.num_updates += 1
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as JSON numbers and lists; exact."""
        return {
            "weights": self._weights.tolist(),
            "num_updates": self.num_updates,
            "fell_back": self.fell_back,
            # Python writes a float64 so that it reads back bit for bit.
            "rule": {name: values.tolist() for name, values in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken, under the same rule and the same datasets.

        Raises:
            CheckpointError: the state is of another rule or another number of datasets; nothing has changed then.
        """
        # Names of parts identify the rule; checked before anything is taken over.
        own = self.state_dict()
        rule = state.get("rule", {})
        if state.keys() != own.keys() or rule.keys() != own["rule"].keys():
            raise CheckpointError(
                f"the mixture's state has the parts {sorted({**state, **rule})}, its rule "
                f"{type(self.rule).__name__} has {sorted({**own, **own['rule']})}; "
                "resume with the rule it was saved with"
            )
        if len(state["weights"]) != self.num_datasets:
            raise CheckpointError(
                f"the mixture's state is of {len(state['weights'])} datasets, this mixture has {self.num_datasets}"
            )
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._state = {
            # An empty history, (0, num_datasets), is [] in JSON and would come back with one axis.
            name: torch.tensor(values, dtype=torch.float64).reshape(-1, self.num_datasets)
            if self._state[name].ndim == 2
            else torch.tensor(values, dtype=torch.float64)
            for name, values in rule.items()
        }
        self.num_updates = int(state["num_updates"])
        self.fell_back = bool(state["fell_back"])


def make_mixture(
    name: str,
    *,
    num_datasets: int,
    sizes: Sequence[float | int] | None = None,
    weights: Sequence[float | int] | None = None,
    exploration: float = 0.1,
    targets: Sequence[bool] | None = None,
    target_share: float | None = None,
    **options: Any,
) -> Mixture:
    """The mixture called ``name`` in :data:`MIXTURE_RULES`.

    Args:
        name: of a rule.
        num_datasets: how many are mixed.
        sizes: of the datasets in any unit; ``proportional`` needs them, ``ado`` takes them as its prior.
        weights: shares on any scale; ``static`` needs them, the others start from them (``None``: uniform).
        exploration: share that is spread evenly, in [0, 1]; the mixtures that never move are kept exact.
        targets: True = the dataset is judged in the end; the rule ``targets`` needs them.
        target_share: of the weight, kept on the targets; ``None``: a half under ``learning_progress``, ``alignment``
            and ``second_order`` with its guard, else none.
        **options: fields of the rule, such as ``momentum`` of :class:`SecondOrder`.

    Raises:
        ConfigError: an unknown name or option, or what the rule needs is missing or of the wrong length.

    >>> make_mixture("proportional", num_datasets=2, sizes=[30, 10]).weights
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if name not in MIXTURE_RULES:
        raise ConfigError(
            f"unknown mixture rule '{name}'{did_you_mean(name, MIXTURE_RULES)}; use one of {', '.join(MIXTURE_RULES)}"
        )
    rule_class = _ADAPTIVE.get(name, Fixed)
    # `prior` comes from `sizes` and is no option of its own.
    allowed = [field.name for field in fields(rule_class) if field.name != "prior"]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(allowed)):
        hint = did_you_mean(unknown[0], allowed)
        raise ConfigError(
            f"the mixture rule '{name}' has no option '{unknown[0]}'{hint}; "
            f"its options are {', '.join(allowed) or 'none'}"
        )
    if rule_class is Fixed:
        needed = {"proportional": "sizes", "static": "weights", "targets": "targets"}
        given = {"sizes": sizes, "weights": weights, "targets": targets}
        shares = [1.0] * num_datasets if name == "uniform" else given[needed[name]]
        if shares is None:
            raise ConfigError(f"the mixture rule '{name}' needs `{needed[name]}`")
        return Mixture(Fixed(), num_datasets=num_datasets, exploration=0.0, initial_weights=shares)
    if name == "ado" and sizes is not None:
        options["prior"] = tuple(_checked_weights(sizes, num_datasets).tolist())
        weights = sizes if weights is None else weights
    if target_share is None:
        keeps_targets = name in ("learning_progress", "alignment", "second_order") and options.get("guard", 1)
        if name == "alignment" and not any(targets or ()):
            keeps_targets = False  # gradients say all there is to know about a target that no dataset holds
        target_share = TARGET_SHARE if keeps_targets else 0.0
    return Mixture(
        rule_class(**options),
        num_datasets=num_datasets,
        exploration=exploration,
        initial_weights=weights,
        targets=targets,
        target_share=target_share,
    )


def _checked_weights(values: Sequence[float | int], num_datasets: int) -> Float[Tensor, " choices"]:
    weights = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if len(weights) != num_datasets:
        raise ConfigError(f"{num_datasets} datasets need as many weights, got {len(weights)}")
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ConfigError(f"weights must be finite, at least 0 and not all 0, got {weights.tolist()}")
    return weights / weights.sum()


def _check(difficulty: Difficulty, tokens: Float[Tensor, " choices"], *, num_datasets: int) -> None:
    measured = {field.name: getattr(difficulty, field.name) for field in fields(difficulty)}
    given = {name: values for name, values in {**measured, "tokens": tokens}.items() if values is not None}
    for name, values in given.items():
        if values.shape != (num_datasets,):
            raise ShapeError(
                f"{name} has shape {tuple(values.shape)}; this mixture has {num_datasets} datasets, "
                "one number for each is needed"
            )
        low = -math.inf if name in ("mean", "alignment") else 0.0
        if name == "alignment":
            values = values.nan_to_num(nan=0.0)  # not measured this time
        if faulty := [i for i, x in enumerate(values.tolist()) if not math.isfinite(x) or x < low]:
            raise NumericError(
                f"{name} of dataset {faulty[0]} is {values[faulty[0]].item()}; "
                "the mixture cannot follow it, leave this measurement out"
            )
