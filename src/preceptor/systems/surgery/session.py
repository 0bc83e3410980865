"""Everything of a run that changes: patient, surgeon, what was measured; all of it is in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preceptor.run.checkpoint import Checkpoint
from preceptor.run.folder import Run
from preceptor.run.tensors import join_state, split_state
from preceptor.systems.surgery.agent import SacAgent
from preceptor.systems.surgery.config import LearningOptions, SurgeryConfig
from preceptor.systems.surgery.edits import Edit
from preceptor.systems.surgery.features import StateFeatures
from preceptor.systems.surgery.materials import Materials
from preceptor.systems.surgery.objective import needs_referee
from preceptor.systems.surgery.operation import Surgery, gradient_steps
from preceptor.systems.surgery.patient import Patient, Snapshot
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

# The groups of a snapshot's tensors in a checkpoint.
_NOW, _BOOTSTRAPPED = "now", "bootstrapped"


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
        targets = attention_targets(model, roles=config.edit.roles, layers=config.edit.layers or None)
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
        self.bootstrapped: Snapshot | None = None
        self.surgeon: Surgeon | None = None
        self.features = self._new_features()
        self.plateau = PlateauWatch(window=config.phases.plateau_window, slope=config.phases.plateau_slope)
        self.learned_actions: list[list[float]] = []
        self.records: list[dict[str, Any]] = []
        self.num_edits = 0
        self.num_committed = 0

    def step_flops(self, learning: LearningOptions) -> int:
        """Operations of one update."""
        return self.patient.step_flops(learning, num_tokens=learning.batch_size * self.config.student.block_size)

    def learning(self, stretch: Stretch) -> LearningOptions:
        """The numbers of learning, with the objective of ``stretch``."""
        return self.config.learning.model_copy(update={"objective": stretch.objective})

    def begin(self, stretch: Stretch) -> None:
        """Put the patient where ``stretch`` starts, and its surgeon to work."""
        if stretch.start == "initial":
            self.patient.reset()
        elif stretch.start == "bootstrapped":
            assert self.bootstrapped is not None, "a control before bootstrapping"
            self.patient.restore(self.bootstrapped)
        if not stretch.continues:
            self.surgeon = self.new_surgeon(stretch)
            self.features = self._new_features()
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

    def save(self, run: Run, step: int) -> None:
        """Write a checkpoint of ``run`` at ``step``.

        Raises:
            ModelError: a surgery is open.
        """
        now = self.patient.snapshot()
        surgeon, surgeon_state = split_state(None if self.surgeon is None else self.surgeon.state_dict())
        tensors = {**_grouped(_NOW, now), "surgeon": surgeon}
        state: dict[str, Any] = {
            "patient": now.state,
            "bootstrapped": None,
            "surgeon": surgeon_state,
            "features": self.features.state_dict(),
            "plateau": self.plateau.state_dict(),
            "learned_actions": self.learned_actions,
            "records": self.records,
            "counts": [self.num_edits, self.num_committed],
        }
        if self.bootstrapped is not None:
            tensors |= _grouped(_BOOTSTRAPPED, self.bootstrapped)
            state["bootstrapped"] = self.bootstrapped.state
        run.save(step, {name: group for name, group in tensors.items() if group}, state)

    def load(self, checkpoint: Checkpoint, stretch: Stretch) -> None:
        """Restore :meth:`save`, which was made within ``stretch``.

        Raises:
            CheckpointError: it is a checkpoint of another student or surgeon.
        """
        state: Mapping[str, Any] = checkpoint.state
        self.learned_actions = [list(action) for action in state["learned_actions"]]
        self.patient.restore(_snapshot(_NOW, checkpoint, state["patient"]))
        if state["bootstrapped"] is not None:
            self.bootstrapped = _snapshot(_BOOTSTRAPPED, checkpoint, state["bootstrapped"])
        self.surgeon = self.new_surgeon(stretch)
        if self.surgeon is not None:
            self.surgeon.load_state_dict(join_state(checkpoint.tensors.get("surgeon", {}), state["surgeon"]))
        self.features.load_state_dict(state["features"])
        self.plateau.load_state_dict(state["plateau"])
        self.records = [dict(record) for record in state["records"]]
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
        own = self.config.learning
        other = own.model_copy(update={"objective": objective})
        budget = self.config.phases.bootstrap_steps * self.step_flops(own) + self.referee_flops(own)
        return max(1, (budget - self.referee_flops(other)) // self.step_flops(other))

    def referee_flops(self, learning: LearningOptions) -> int:
        """What the referee's training counts for in an arm of this objective."""
        return self.materials.referee.training_flops if needs_referee(learning) else 0


def _grouped(prefix: str, snapshot: Snapshot) -> dict[str, Any]:
    return {f"{prefix}_{group}": tensors for group, tensors in snapshot.tensors.items()}


def _snapshot(prefix: str, checkpoint: Checkpoint, state: Mapping[str, Any]) -> Snapshot:
    # An optimiser that has not stepped yet has no tensors, and so no file.
    groups = {group: checkpoint.tensors.get(f"{prefix}_{group}", {}) for group in ("student", "optimiser")}
    return Snapshot(groups, state)
