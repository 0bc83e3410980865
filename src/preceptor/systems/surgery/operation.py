"""One operation: an edit is tried in the theatre, paid for, and committed if it passes the acceptance test."""

from __future__ import annotations

import time
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from preceptor.systems.surgery.edits import Edit
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.quality import Acceptance, Draws, Examiner, Quality, acceptance
from preceptor.systems.surgery.student import window_losses
from preceptor.systems.surgery.theatre import Moments, SurgicalTheater


class Trial(NamedTuple):
    """What an edit was worth.

    Attributes:
        reward: quality after minus before.
        before: of the student as it is.
        after: of the edited student.
        relative_norm: largest ‖ΔW‖ / ‖W‖ of a target.
        bytes_held: by the theatre.
        seconds: of edit, examination and restore.
    """

    reward: float
    before: Quality
    after: Quality
    relative_norm: float
    bytes_held: int
    seconds: float


class Surgery:
    """Tries, tests and commits edits of one patient.

    Args:
        patient: whose weights are edited.
        edit: the action space.
        examiner: measures quality.
        required_z: of the acceptance test.
        moments: what becomes of Adam's moments of an edited matrix.
    """

    def __init__(
        self, patient: Patient, edit: Edit, examiner: Examiner, *, required_z: float, moments: Moments
    ) -> None:
        self.edit = edit
        self._patient = patient
        self._examiner = examiner
        self._required_z = required_z
        self._moments = moments

    def examine(self, draws: Draws) -> Quality:
        """The quality of the student as it is."""
        self._patient.costs.flops += examination_flops(self._patient, self._examiner)
        return self._examiner.examine(self._patient.model, draws)

    def try_edit(self, action: Float[Tensor, " action"], *, before: Quality, draws: Draws) -> Trial:
        """Examine the student under ``action``; afterwards its weights are bit for bit what they were.

        Args:
            action: in [−1, 1].
            before: of the unedited student, on the same ``draws``.
            draws: prompts and noise.
        """
        began = time.perf_counter()
        with SurgicalTheater(self._patient.model, self.edit.targets) as theatre:
            size = self.edit.apply_(action)
            after = self.examine(draws)
            bytes_held = theatre.bytes_held
        seconds = time.perf_counter() - began
        self._patient.costs.evaluations += 1
        return Trial(after.total - before.total, before, after, size.max, bytes_held, seconds)

    def test(self, action: Float[Tensor, " action"], windows: Int[Tensor, "window time"]) -> Acceptance:
        """Compare losses on ``windows``, which no reward saw, with and without the edit; commit it if it passes."""
        model = self._patient.model
        losses = window_losses(model, windows)
        with SurgicalTheater(model, self.edit.targets) as theatre:
            self.edit.apply_(action)
            verdict = acceptance(losses, window_losses(model, windows), required_z=self._required_z)
            if verdict.passed:
                theatre.commit(self._patient.optimiser, moments=self._moments)
        self._patient.costs.flops += 2 * windows[:, 1:].numel() * self._patient.flops_per_token
        return verdict

    def commit(self, action: Float[Tensor, " action"]) -> None:
        """Make an edit for good without a test, as a replay does."""
        with SurgicalTheater(self._patient.model, self.edit.targets) as theatre:
            self.edit.apply_(action)
            theatre.commit(self._patient.optimiser, moments=self._moments)


def examination_flops(patient: Patient, examiner: Examiner) -> int:
    """Operations of one examination: the student reads windows and writes continuations, the referee reads those."""
    student_tokens, referee_tokens = examiner.num_tokens
    return student_tokens * patient.flops_per_token + referee_tokens * patient.referee_flops_per_token


def gradient_steps(
    patient: Patient, examiner: Examiner, *, num_edits: int, acceptance_tokens: int, step_flops: int
) -> int:
    """Updates that cost what ``num_edits`` edits cost if each is tested, rounded up; at least 1."""
    edit_flops = 2 * examination_flops(patient, examiner) + 2 * acceptance_tokens * patient.flops_per_token
    return max(1, -(-num_edits * edit_flops // step_flops))
