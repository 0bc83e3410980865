"""The arms of a run: the configured learner and its controls, each a stretch of the same run.

Every arm starts from the same weights, draws from the same streams and learns from the same number of tokens. The first
is the whole system. Take away its policy gradient, and what is left is its mixture rule; swap the rule, and there are
the other mixtures; take away its learning, and there is the frozen policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preceptor.systems.curriculum.choices import FIXED_RULES
from preceptor.systems.curriculum.config import CurriculumConfig

FROZEN = "frozen_policy"
"""The arm that learns nothing."""


@dataclass(frozen=True)
class Arm:
    """One stretch of the run.

    Attributes:
        name: in every file of the run.
        rule: of the mixture.
        settings: the rule's hyperparameters.
        weights: of the datasets, for the rule ``static``; not normalised.
        writes: True = rollouts and policy gradient.
        learns: False = all learning rates are 0.
    """

    name: str
    rule: str
    settings: Mapping[str, float] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    writes: bool = False
    learns: bool = True

    @property
    def measures(self) -> bool:
        """Whether difficulty is measured: a control whose weights never move is spared the cost."""
        return self.rule not in FIXED_RULES


def plan_arms(config: CurriculumConfig) -> list[Arm]:
    """The arms of ``config``, the configured one first."""
    names = [dataset.name for dataset in config.data.datasets]
    mixture, controls = config.mixture, config.controls
    writes = config.ppo.weight > 0
    # Without cross-entropy the controls of the mixture learn by policy gradient too; else they would learn nothing.
    controls_write = config.update.cross_entropy_weight == 0
    own = Arm(mixture.rule, mixture.rule, mixture.settings, mixture.weights, controls_write)
    arms = [own]
    if writes and not controls_write:
        arms.insert(0, Arm(f"{own.name}+ppo", own.rule, own.settings, own.weights, True))
    if writes and controls.frozen_policy:
        arms.insert(1, Arm(FROZEN, own.rule, own.settings, own.weights, True, learns=False))
    arms += [Arm(rule, rule, writes=controls_write) for rule in controls.rules if rule != own.name]
    if controls.static_grid != "none" and len(names) > 1:
        grid = static_grid(names, doubled=controls.static_grid == "omit_and_double")
        arms += [Arm(name, "static", weights=weights, writes=controls_write) for name, weights in grid.items()]
    return arms


def static_grid(names: Sequence[str], *, doubled: bool) -> dict[str, tuple[float, ...]]:
    """Static mixtures around the uniform one: each dataset left out, and each with twice the weight.

    >>> static_grid(["code", "noise"], doubled=True)["static_no_noise"]
    (1.0, 0.0)
    """
    grid = {f"static_no_{left_out}": tuple(float(name != left_out) for name in names) for left_out in names}
    if doubled:
        grid |= {f"static_more_{more}": tuple(1.0 + (name == more) for name in names) for more in names}
    return grid
