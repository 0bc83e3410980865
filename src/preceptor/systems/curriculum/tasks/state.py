"""The rule in training and the outcomes so far; all of it is in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from preceptor.errors import CheckpointError
from preceptor.lm.generators.base import Generator
from preceptor.lm.model import LanguageModel
from preceptor.objectives.task_mixture import TaskMixture, make_task_mixture
from preceptor.runs.checkpoint import copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.guard import MicroBatch, NonFiniteGuard
from preceptor.runs.random import derived_seed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.state import build_optimizer
from preceptor.systems.curriculum.tasks.result import TaskOutcome
from preceptor.systems.curriculum.tasks.saved import load_teacher
from preceptor.systems.curriculum.tasks.sources import Source

if TYPE_CHECKING:
    from preceptor.runs.folder import Run


@dataclass(frozen=True)
class TaskSetup:
    """What all rules of a run share.

    Attributes:
        config: of the run.
        run: its folder, random streams and logs.
        rules: in the order in which they are trained; the configured one first.
        sources: levels of tasks.
        costs: nominal tokens of a group of each source.
        lm: the policy, trained in place.
        initial_weights: the policy's weights after the warm-up, by name.
        make_mixture: the mixture that a rule begins with, given its name.
        engine: writes the answers that are learned from; None is the policy's own decoder.
    """

    config: CurriculumConfig
    run: Run
    rules: Sequence[str]
    sources: Sequence[Source]
    costs: Sequence[float]
    lm: LanguageModel
    initial_weights: Mapping[str, Tensor]
    make_mixture: Callable[[str], TaskMixture]
    engine: Generator | None = None

    @property
    def counted(self) -> list[bool]:
        """Of each source, whether its success counts in the mean: not where a coin decides."""
        return [not source.random_reward for source in self.sources]


def mixture_of(config: CurriculumConfig, rule: str, *, folder: Path) -> TaskMixture:
    """The mixture that ``rule`` begins with under ``config``; a teacher is the one in the run's own ``folder``.

    Raises:
        ConfigError: an unknown rule or setting, or no trained teacher where it should be.
    """
    tasks = config.tasks
    settings = tasks.settings if rule == tasks.rule else {}
    policy = load_teacher(folder) if rule == "learned" else None
    return make_task_mixture(rule, num_levels=[task.levels for task in tasks.tasks], policy=policy, **settings)


class TaskState:
    """The policy, its optimizer, the mixture of sources and the outcomes; starts with the first rule."""

    def __init__(self, setup: TaskSetup) -> None:
        self._setup = setup
        self.lm = setup.lm
        self.outcomes: dict[str, TaskOutcome] = {}
        self.micro_batch = MicroBatch(setup.config.update.micro_batch_size)
        self.begin(setup.rules[0])

    def begin(self, rule: str) -> None:
        """Puts the policy back to its weights after the warm-up and makes everything else of ``rule`` anew."""
        setup, config = self._setup, self._setup.config
        self.rule = rule
        copy_tensors(setup.initial_weights, self.lm.trainable_parameters())
        self.optimizer = build_optimizer(self.lm, None, config.update, value_learning_rate=0.0, learns=True)
        self.mixture = setup.make_mixture(rule)
        self.guard = NonFiniteGuard()
        # Items are drawn with Python's generator, of the seed alone: all rules see the same random numbers.
        self.chooser = random.Random(derived_seed(config.seed, "items"))
        self.next_validation, self.next_oracle = 0, 0
        self.finished = False
        self.outcomes[rule] = TaskOutcome(drawn=[0.0] * len(setup.sources))

    @property
    def outcome(self) -> TaskOutcome:
        """Of the rule in training, so far."""
        return self.outcomes[self.rule]

    def state_dict(self) -> dict[str, Any]:
        """All of the above, as nested tensors and plain values."""
        version, numbers, gauss = self.chooser.getstate()
        return {
            "rule": self.rule,
            "policy": {name: parameter.detach() for name, parameter in self.lm.trainable_parameters().items()},
            "engine": self.lm.engine_state(),
            "optimizer": optimizer_state(self.optimizer),
            "mixture": self.mixture.state_dict(),
            "guard": self.guard.state_dict(),
            "micro_batch": self.micro_batch.state_dict(),
            "chooser": [version, list(numbers), gauss],
            "next_validation": self.next_validation,
            "next_oracle": self.next_oracle,
            "finished": self.finished,
            "outcomes": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the rule that ``state_dict`` was taken of.

        Raises:
            CheckpointError: it is of a rule that this configuration does not have.
        """
        if state["rule"] not in self._setup.rules:
            raise CheckpointError(
                f"the checkpoint is of the rule {state['rule']}, this run has {', '.join(self._setup.rules)}; "
                "resume with the same configuration"
            )
        self.begin(state["rule"])
        copy_tensors(state["policy"], self.lm.trainable_parameters())
        if "engine" in state:  # runs before it was kept have none
            self.lm.load_engine_state(state["engine"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.mixture.load_state_dict(state["mixture"])
        self.guard.load_state_dict(state["guard"])
        self.micro_batch.load_state_dict(state.get("micro_batch", {"found": 0}))  # runs before trials have none
        version, numbers, gauss = state["chooser"]
        self.chooser.setstate((version, tuple(numbers), gauss))
        self.next_validation, self.next_oracle = state["next_validation"], state["next_oracle"]
        self.finished = state["finished"]
        self.outcomes = {name: _outcome(saved) for name, saved in state["outcomes"].items()}


def _outcome(saved: Mapping[str, Any]) -> TaskOutcome:
    curve, weights = ([(int(tokens), list(values)) for tokens, values in saved[name]] for name in ("curve", "weights"))
    return TaskOutcome(curve, weights, list(saved["drawn"]), dict(saved["counts"]))
