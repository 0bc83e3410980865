"""The methods of a run: the configured one and its baselines, trained one after another.

Every method starts from the same weights, draws from the same random streams and learns from the same number of tokens.
The first is the whole system. The baselines take one thing away each: the policy gradient (what is left is the mixture
rule), the rule (other rules and fixed mixtures), or all learning (the frozen policy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from preceptor.systems.curriculum.config import FIXED_RULES, CurriculumConfig, DifficultyOptions

FROZEN_POLICY = "frozen_policy"
"""Name of the baseline whose learning rates are 0."""


@dataclass(frozen=True)
class Method:
    """One way of training the model, compared with the others of the run.

    Attributes:
        name: as in every file of the run.
        rule: the mixture rule.
        settings: the rule's hyperparameters.
        weights: of the datasets, for the rule ``static``; not normalised.
        policy_gradient: True = rollouts, rewards and the policy gradient; False = cross-entropy alone.
        learns: False = all learning rates are 0.
        num_steps: of training; more than the configured ones where uniform gets what a rule pays for measuring.
    """

    name: str
    rule: str
    settings: Mapping[str, float] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    policy_gradient: bool = False
    learns: bool = True
    num_steps: int = 0

    @property
    def measures_difficulty(self) -> bool:
        """Whether difficulty is measured: a rule whose weights never move is spared the cost."""
        return self.rule not in FIXED_RULES

    def reads_gradients(self, options: DifficultyOptions) -> bool:
        """Whether the weights follow the gradients of the training batch itself."""
        return self.rule == "alignment" and not options.alignment_rows


def plan_methods(config: CurriculumConfig) -> list[Method]:
    """The methods that ``config`` asks for, the configured one first."""
    names = [dataset.name for dataset in config.data.datasets if dataset.train]
    mixture, controls = config.mixture, config.controls
    has_rollouts = config.ppo.weight > 0
    # Without cross-entropy, a baseline that has no policy gradient would learn nothing, so all of them have it.
    all_have_rollouts = config.update.cross_entropy_weight == 0
    own = Method(mixture.rule, mixture.rule, mixture.settings, mixture.weights, all_have_rollouts)
    methods = [own]
    if has_rollouts and not all_have_rollouts:
        methods.insert(0, Method(f"{own.name}+ppo", own.rule, own.settings, own.weights, True))
    if has_rollouts and controls.frozen_policy:
        methods.insert(1, Method(FROZEN_POLICY, own.rule, own.settings, own.weights, True, learns=False))
    methods += [Method(rule, rule, policy_gradient=all_have_rollouts) for rule in controls.rules if rule != own.name]
    if controls.static_grid != "none" and len(names) > 1:
        grid = static_grid(names, doubled=controls.static_grid == "omit_and_double")
        methods += [
            Method(name, "static", weights=weights, policy_gradient=all_have_rollouts) for name, weights in grid.items()
        ]
    methods += [
        Method(f"static_{name}", "static", weights=weights, policy_gradient=all_have_rollouts)
        for name, weights in controls.mixtures.items()
    ]
    methods = [replace(method, num_steps=config.update.steps) for method in methods]
    for currency in controls.equal_cost if own.measures_difficulty else ():
        name, num_steps = f"uniform_equal_{currency}", equal_cost_steps(config, currency)
        methods.append(Method(name, "uniform", policy_gradient=all_have_rollouts, num_steps=num_steps))
    return methods


def measured_rows(config: CurriculumConfig, rule: str) -> int:
    """Rows that ``rule`` reads at one measurement, at most."""
    options, datasets = config.difficulty, config.data.datasets
    num_mixed = sum(dataset.train for dataset in datasets)
    if rule == "alignment" and options.alignment_rows:
        return options.alignment_rows * (num_mixed + sum(dataset.target for dataset in datasets))
    if rule == "alignment":  # from the training batch
        return options.target_rows * sum(not dataset.train for dataset in datasets)
    return options.sample_size * num_mixed


def equal_cost_steps(config: CurriculumConfig, currency: str) -> int:
    """Steps that cost what the configured rule costs with its measurements, in ``rows`` or ``flops``.

    Every measured row counts as a full one, so uniform gets a little more than its due. A row costs one forward pass
    where a loss is measured and three where a gradient is taken, in measuring as in training.

    >>> equal_cost_steps(CurriculumConfig(), "rows"), equal_cost_steps(CurriculumConfig(), "flops")
    (132, 84)
    """
    steps, rule = config.update.steps, config.mixture.rule
    num_measurements = -(-steps // config.difficulty.every)
    cost = 1 / 3 if currency == "flops" and rule != "alignment" else 1.0  # of a measured row, in trained rows
    tokens = cost * num_measurements * measured_rows(config, rule) * config.data.block_tokens
    return steps + math.ceil(tokens / config.update.batch_tokens)


def static_grid(names: Sequence[str], *, doubled: bool) -> dict[str, tuple[float, ...]]:
    """Static mixtures around the uniform one: each dataset left out and, if ``doubled``, each at twice the weight.

    >>> static_grid(["code", "noise"], doubled=True)["static_no_noise"]
    (1.0, 0.0)
    """
    grid = {f"static_no_{left_out}": tuple(float(name != left_out) for name in names) for left_out in names}
    if doubled:
        grid |= {f"static_more_{more}": tuple(1.0 + (name == more) for name in names) for more in names}
    return grid
