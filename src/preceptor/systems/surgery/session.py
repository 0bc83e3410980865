"""Everything of a run that changes: patient, surgeon, what was measured; all of it is in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preceptor.systems.surgery.agent import SacAgent
from preceptor.systems.surgery.config import LearningOptions, SurgeryConfig
from preceptor.systems.surgery.edits import Edit
from preceptor.systems.surgery.features import StateFeatures
from preceptor.systems.surgery.materials import Materials
from preceptor.systems.surgery.objective import needs_referee
from preceptor.systems.surgery.operation import Surgery, gradient_steps
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.plan import Stretch, make_plan
from preceptor.systems.surgery.plateau import PlateauWatch
from preceptor.systems.surgery.quality import Draws
from preceptor.systems.surgery.replay_buffer import ReplayBuffer
from preceptor.systems.surgery.student import build_student
from preceptor.systems.surgery.surgeons import (
    BestOfNSurgeon,
    EvolutionSurgeon,
    RandomSurgeon,
    SacSurgeon,
    Surgeon,
)
from preceptor.systems.surgery.targets import attention_targets

class Session:
    """The state of a run.

    Args:
        config: the whole configuration.
        materials: what does not change.
        device: where the student lives.
        folder: where an agent's buffer may spill.

    Attributes:
        patient: the one student; arms take turns with it.
        plan: the stretches to come.
        surgery: tries and commits edits of the patient.
        surgeon: at work, or None.
        features: the surgeon's view.
        learned_actions: what SAC did in exclusive surgery, for the random arm.
        plateau: of bootstrapping.
        records: of the arms so far.
        num_edits, num_committed: of the arm at work.
    """

    def __init__(self, config: SurgeryConfig, materials: Materials, *, device: torch.device, folder: Path) -> None:
        self.config = config
        self.materials = materials
        self.device = device
        self._folder = folder
        model = build_student(
            architecture=config.student.architecture,
            vocab_size=materials.corpus.vocab_size,
            num_layers=config.student.num_layers,
            num_heads=config.student.num_heads,
            width=config.student.width,
            block_size=config.student.block_size,
            seed=materials.generator("student").initial_seed(),
            device=device,
        )
        self.patient = Patient(model, config.learning, materials.referee)
        targets = attention_targets(model, roles=config.edit.roles, layers=config.edit.layers or None)  # type: ignore[arg-type]
        self.surgery = Surgery(
            self.patient,
            Edit(config.edit.kind, targets, rank=config.edit.rank, max_relative_norm=config.edit.max_relative_norm),
            materials.examiner,
            required_z=config.quality.acceptance_z,
            moments=config.edit.moments,
        )
        self.plan = make_plan(
            phases=config.phases,
            controls=config.controls,
            objective=config.learning.objective,
            gradient_steps=gradient_steps(
                self.patient,
                materials.examiner,
                num_edits=config.phases.surgery_edits,
                acceptance_tokens=config.quality.acceptance_windows * config.student.block_size,
                step_flops=self.step_flops(config.learning),
            ),
            equal_flops_steps=self._equal_flops_steps,
        )
        self.bootstrapped: dict[str, Any] | None = None
        self.surgeon: Surgeon | None = None
        self.features = self._new_features()
        self.plateau = PlateauWatch(window=config.phases.plateau_window, slope=config.phases.plateau_slope)
        self.learned_actions: list[list[float]] = []
        self.records: list[dict[str, Any]] = []
        self.stretch = self.plan[0]
        self.num_edits = 0
        self.num_committed = 0

    def step_flops(self, learning: LearningOptions) -> int:
        """Operations of one update."""
        return self.patient.step_flops(learning, num_tokens=learning.batch_size * self.config.student.block_size)

    def learning(self, stretch: Stretch) -> LearningOptions:
        """The numbers of learning, with the objective of ``stretch``."""
        return dataclasses.replace(self.config.learning, objective=stretch.objective)  # type: ignore[arg-type]

    def begin(self, stretch: Stretch) -> None:
        """Put the patient where ``stretch`` starts, and its surgeon to work."""
        if stretch.start == "initial":
            self.patient.reset()
        elif stretch.start == "bootstrapped":
            assert self.bootstrapped is not None, "a control before bootstrapping"
            self.patient.load_state_dict(self.bootstrapped)
        if not stretch.continues:
            self.surgeon = self.new_surgeon(stretch)
            self.features = self._new_features()
        self.stretch = stretch
        self.num_edits = self.num_committed = 0

    def new_surgeon(self, stretch: Stretch) -> Surgeon | None:
        """The surgeon that ``stretch`` begins with."""
        action_dim = self.surgery.edit.action_dim
        if stretch.surgeon == "evolution":
            return EvolutionSurgeon(action_dim)
        if stretch.surgeon == "best_of_n":
            return BestOfNSurgeon(action_dim, n=self.config.controls.best_of)
        if stretch.surgeon == "random":
            return RandomSurgeon(torch.tensor(self.learned_actions))
        if stretch.surgeon is None:
            return None
        agent = self.config.agent
        return SacSurgeon(
            SacAgent(
                self.features.dim,
                action_dim,
                buffer=ReplayBuffer(
                    agent.capacity, state_dim=self.features.dim, action_dim=action_dim, spill_folder=self._folder
                ),
                generator=self.materials.generator("agent weights"),
                hidden_dim=agent.hidden_dim,
                learning_rate=agent.learning_rate,
                discount=agent.discount,
                target_step=agent.target_step,
                batch_size=agent.batch_size,
                initial_temperature=agent.initial_temperature,
                random_steps=agent.random_edits,
            ),
            updates_per_edit=agent.updates_per_edit,
            shuffled=stretch.surgeon == "shuffled",
        )

    def draws(self, stretch: Stretch, local: int) -> Draws:
        """Prompts and noise of the edit that step ``local`` tries, the same in every arm of its phase."""
        return self.materials.examiner.draw(self.materials.generator(f"prompts of {stretch.phase}", local))

    def state_dict(self) -> dict[str, Any]:
        """All that the run has changed so far.

        Raises:
            ModelError: a surgery is open.
        """
        return {
            "patient": self.patient.state_dict(),
            "bootstrapped": self.bootstrapped,
            "stretch": self.plan.index(self.stretch),
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
            CheckpointError: it is of another student or surgeon.
        """
        self.stretch = self.plan[state["stretch"]]
        self.learned_actions = state["learned_actions"]
        self.patient.load_state_dict(state["patient"])
        self.bootstrapped = state["bootstrapped"]
        self.surgeon = self.new_surgeon(self.stretch)
        if self.surgeon is not None:
            self.surgeon.load_state_dict(state["surgeon"])
        self.features.load_state_dict(state["features"])
        self.plateau.load_state_dict(state["plateau"])
        self.records = state["records"]
        self.num_edits, self.num_committed = state["counts"]

    def _new_features(self) -> StateFeatures:
        return StateFeatures(
            self.patient.model,
            self.surgery.edit.targets,
            windows=self.materials.feature_windows,
            action_dim=self.surgery.edit.action_dim,
        )

    def _equal_flops_steps(self, objective: str) -> int:
        """Updates of ``objective`` that cost what bootstrapping costs."""
        own, other = self.config.learning, dataclasses.replace(self.config.learning, objective=objective)  # type: ignore[arg-type]
        budget = self.config.phases.bootstrap_steps * self.step_flops(own) + self.referee_flops(own)
        return max(1, (budget - self.referee_flops(other)) // self.step_flops(other))

    def referee_flops(self, learning: LearningOptions) -> int:
        """What the referee's training counts for in an arm of this objective."""
        return self.materials.referee.training_flops if needs_referee(learning) else 0
