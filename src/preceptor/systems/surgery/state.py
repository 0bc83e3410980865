"""What changes in a run and is in every checkpoint: the student, the surgeon, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from preceptor.lm.edit_targets import attention_targets
from preceptor.systems.surgery.baselines import Surgeon, make_surgeon
from preceptor.systems.surgery.environment import StateFeatures, Student, build_student
from preceptor.systems.surgery.rewards import draw_windows, needs_reference
from preceptor.systems.surgery.setup import Phase, Setup, plan_phases
from preceptor.systems.surgery.site_policy import PretrainedSurgeon, SiteFeatures, TrainedSurgeon
from preceptor.systems.surgery.sites import Sites
from preceptor.systems.surgery.trial import ActionSpace, Edit, Surgery, gradient_steps


class State:
    """The state of a run, at the beginning as ``setup`` says.

    Attributes:
        setup: what does not change.
        student: the one student; methods take turns with it.
        surgery: tries and commits edits of the student.
        phases: all of them, in order.
        phase: the current one.
        bootstrapped: the student at the end of bootstrapping, as :meth:`Student.snapshot` gives it.
        surgeon: of the current phase, or None.
        features: what the surgeon sees.
        learned_actions: SAC's actions in exclusive surgery, which the random baseline imitates.
        plateau: of bootstrapping.
        records: of the methods so far.
        num_edits, num_committed: in the current phase.
    """

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        self.setup = setup
        model = build_student(
            config.student,
            vocab_size=setup.corpus.vocab_size,
            seed=setup.generator("student").initial_seed(),
            device=setup.device,
        )
        self.student = Student(model, config.learning, setup.reference_lm, world=setup.world)
        targets = attention_targets(model, roles=config.edit.roles, layers=config.edit.layers or None)
        own = Edit(config.edit.kind, targets, rank=config.edit.rank, max_relative_norm=config.edit.max_relative_norm)
        # Two action spaces: the run's own, and the sites of a surgeon that was trained elsewhere.
        self._own_surgery = self.surgery = self._new_surgery(own)
        self._pretrained = TrainedSurgeon.load(Path(config.pretrained_run)) if config.pretrained_run else None
        self._sites = None if self._pretrained is None else self._pretrained.sites(model)
        # The lengths of some phases follow from what an update and an examination cost.
        self.phases = plan_phases(
            phases=config.phases,
            controls=config.controls,
            objective=config.learning.objective,
            gradient_steps=gradient_steps(
                self.student,
                setup.examiner,
                num_edits=config.phases.surgery_edits,
                acceptance_tokens=config.quality.acceptance_windows * config.student.block_size,
                step_flops=self.step_flops(config.learning.objective),
            ),
            equal_flops_steps=self.equal_flops_steps,
            pretrained=self._pretrained is not None,
        )
        self.phase = self.phases[0]
        self.bootstrapped: dict[str, Any] | None = None
        self.surgeon: Surgeon | None = None
        self.features = self._new_features()
        self.plateau = PlateauWatch(window=config.phases.plateau_window, slope=config.phases.plateau_slope)
        self.learned_actions: list[list[float]] = []
        self.records: list[dict[str, Any]] = []
        self.num_edits = 0
        self.num_committed = 0

    def begin(self, phase: Phase) -> None:
        """Puts the student where ``phase`` starts, and its surgeon in charge."""
        if phase.start == "initial":
            self.student.reset()
        elif phase.start == "bootstrapped":
            assert self.bootstrapped is not None, "a control before bootstrapping"
            self.student.load_state_dict(self.bootstrapped)
        self.equip(phase)
        if not phase.continues:
            self.features = self._new_features()  # before the surgeon, whose networks are as large as they are many
            self.surgeon = self.new_surgeon(phase)
        self.phase = phase
        self.num_edits = self.num_committed = 0

    def equip(self, phase: Phase) -> None:
        """The action space of the surgeon of ``phase``."""
        self.surgery = self._own_surgery
        if phase.surgeon == "pretrained":
            assert self._sites is not None, "a phase of a surgeon that was not loaded"
            self.surgery = self._new_surgery(self._sites)

    def _new_surgery(self, edit: ActionSpace) -> Surgery:
        quality = self.setup.config.quality
        return Surgery(
            self.student,
            edit,
            self.setup.examiner,
            required_z=quality.acceptance_z,
            moments=self.setup.config.edit.moments,
            world=self.setup.world,
        )

    def new_surgeon(self, phase: Phase) -> Surgeon | None:
        """The surgeon that ``phase`` begins with."""
        if phase.surgeon == "pretrained":
            assert self._pretrained is not None, "a phase of a surgeon that was not loaded"
            return PretrainedSurgeon(self._pretrained)
        return make_surgeon(
            phase.surgeon,
            state_dim=self.features.dim,
            action_dim=self.surgery.edit.action_dim,
            learned_actions=self.learned_actions,
            best_of=self.setup.config.controls.best_of,
            agent=self.setup.config.agent,
            generator=self.setup.generator("agent weights"),
            spill_folder=self.setup.folder,
        )

    def step_flops(self, objective: str) -> int:
        """Operations of one update."""
        config = self.setup.config
        return self.student.step_flops(objective, num_tokens=config.learning.batch_size * config.student.block_size)

    def reference_flops(self, objective: str) -> int:
        """Operations of training the reference model, for a student whose objective uses it."""
        uses_reference = needs_reference(self.setup.config.learning, objective)
        return self.setup.reference_lm.training_flops if uses_reference else 0

    def equal_flops_steps(self, objective: str) -> int:
        """Updates of ``objective`` that cost as much as bootstrapping."""
        config = self.setup.config
        own = config.learning.objective
        budget = config.phases.bootstrap_steps * self.step_flops(own) + self.reference_flops(own)
        return max(1, (budget - self.reference_flops(objective)) // self.step_flops(objective))

    def state_dict(self) -> dict[str, Any]:
        """All that the run has changed so far.

        Raises:
            ModelError: a theater is open.
        """
        return {
            "student": self.student.state_dict(),
            "bootstrapped": self.bootstrapped,
            "phase": self.phases.index(self.phase),
            "surgeon": None if self.surgeon is None else self.surgeon.state_dict(),
            "features": self.features.state_dict(),
            "plateau": self.plateau.state_dict(),
            "learned_actions": self.learned_actions,
            "records": self.records,
            "counts": [self.num_edits, self.num_committed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`.

        Raises:
            CheckpointError: it belongs to another student or surgeon.
        """
        self.phase = self.phases[state["phase"]]
        self.learned_actions = state["learned_actions"]  # before the surgeon: the random baseline is made of them
        self.student.load_state_dict(state["student"])
        self.bootstrapped = state["bootstrapped"]
        # Phase before surgeon: the action space decides how large its networks are.
        self.equip(self.phase)
        self.features = self._new_features()
        self.surgeon = self.new_surgeon(self.phase)
        if self.surgeon is not None:
            self.surgeon.load_state_dict(state["surgeon"])
        self.features.load_state_dict(state["features"])
        self.plateau.load_state_dict(state["plateau"])
        self.records = state["records"]
        self.num_edits, self.num_committed = state["counts"]

    def _new_features(self) -> StateFeatures | SiteFeatures:
        edit, surgeon = self.surgery.edit, self._pretrained
        if isinstance(edit, Sites):
            assert surgeon is not None, "only its action space has sites"

            def windows(number: int) -> Tensor:
                return draw_windows(
                    self.setup.corpus.train,
                    num_windows=surgeon.num_windows,
                    length=self.setup.config.student.block_size + 1,
                    generator=self.setup.generator("sites", number),
                ).to(self.setup.device)

            return SiteFeatures(edit, windows=windows, gradients=surgeon.gradients)
        return StateFeatures(
            self.student.model,
            self.surgery.edit.targets,
            windows=self.setup.feature_windows,
            action_dim=self.surgery.edit.action_dim,
        )


class PlateauWatch:
    """Finds the step at which the held-out loss first falls more slowly than a threshold.

    The slope is that of the least-squares line through the last ``window`` measurements.

    Args:
        window: number of measurements, at least 2.
        slope: threshold, nats per 100 steps.

    Attributes:
        step: where the plateau was found, or None.

    >>> watch = PlateauWatch(window=2, slope=0.1)
    >>> for step, loss in ((100, 3.0), (200, 2.0), (300, 1.95)):
    ...     _ = watch.measure(step, loss)
    >>> watch.step  # from 2.0 to 1.95 is 0.05 in 100 steps
    300
    """

    def __init__(self, *, window: int, slope: float) -> None:
        self._window = window
        self._slope = slope
        self._points: list[tuple[int, float]] = []
        self.step: int | None = None

    def measure(self, step: int, loss: float) -> bool:
        """Takes in a measurement; whether it is the one that shows the plateau."""
        self._points = [*self._points, (step, loss)][-self._window :]
        if self.step is not None or len(self._points) < self._window or 100 * _slope(self._points) < -self._slope:
            return False
        self.step = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """The last measurements and what was found, as plain values."""
        return {"points": [list(point) for point in self._points], "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self._points = [(int(step), float(loss)) for step, loss in state["points"]]
        self.step = state["step"]


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Slope of the least-squares line, nats per step."""
    # Centred first: steps are in the thousands, and their squares would eat the loss's digits.
    mean_step = sum(step for step, _ in points) / len(points)
    mean_loss = sum(loss for _, loss in points) / len(points)
    covariance = sum((step - mean_step) * (loss - mean_loss) for step, loss in points)
    return covariance / sum((step - mean_step) ** 2 for step, _ in points)
