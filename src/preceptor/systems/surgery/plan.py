"""The stretches of a run: the three phases, then every control, each from where its phase began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from preceptor.systems.surgery.config import EDITING_ARMS, ControlOptions, PhaseOptions

EQUAL_WITHIN = 0.01
"""Share of its updates by which a run at equal FLOPs must differ from the one at equal tokens to be worth making."""

Start = Literal["initial", "bootstrapped", "as_it_is"]


@dataclass(frozen=True)
class Stretch:
    """Some steps of one kind on one patient.

    Attributes:
        arm: whose result its end is.
        phase: ``bootstrap`` (updates), ``surgery`` (edits of a frozen student) or ``joint`` (updates and edits).
        start: the random weights, the end of bootstrapping, or the end of the stretch before.
        num_steps: updates, or edits where there are any.
        objective: of the updates.
        surgeon: whose edits are tried; None tries none.
        continues: the surgeon of the stretch before goes on.
    """

    arm: str
    phase: Literal["bootstrap", "surgery", "joint"]
    start: Start
    num_steps: int
    objective: str
    surgeon: str | None = None
    continues: bool = False


def make_plan(
    *,
    phases: PhaseOptions,
    controls: ControlOptions,
    objective: str,
    gradient_steps: int,
    equal_flops_steps: Callable[[str], int],
) -> tuple[Stretch, ...]:
    """Every stretch, in order.

    Args:
        phases: lengths.
        controls: which arms and further objectives.
        objective: of the run.
        gradient_steps: updates that cost what an arm's edits cost.
        equal_flops_steps: from another objective to the updates that cost what bootstrapping costs.
    """
    edits, arms = phases.surgery_edits, controls.arms

    def surgery(arm: str) -> Stretch:
        return Stretch(arm, "surgery", "bootstrapped", edits, objective, surgeon=arm)

    plan = [Stretch("no_edit", "bootstrap", "initial", phases.bootstrap_steps, objective)]
    if "learned" in arms:
        plan.append(surgery("learned"))
    if "joint" in arms:
        plan.append(
            Stretch("joint", "joint", "as_it_is", phases.joint_edits, objective, surgeon="learned", continues=True)
        )
    plan += [surgery(arm) for arm in EDITING_ARMS if arm in arms and arm != "learned"]
    if "gradient" in arms:
        plan.append(Stretch("gradient", "bootstrap", "bootstrapped", gradient_steps, objective))
    if "training" in arms:
        plan.append(Stretch("training", "joint", "bootstrapped", phases.joint_edits, objective))
    for other in controls.objectives:
        plan.append(Stretch(other, "bootstrap", "initial", phases.bootstrap_steps, other))
        steps = equal_flops_steps(other)
        if abs(steps - phases.bootstrap_steps) > EQUAL_WITHIN * phases.bootstrap_steps:
            plan.append(Stretch(f"{other}_equal_flops", "bootstrap", "initial", steps, other))
    return tuple(stretch for stretch in plan if stretch.num_steps)


def find(plan: Sequence[Stretch], step: int) -> tuple[int, int]:
    """Number of the stretch that ``step`` (from 1) lies in, and the step within it (from 1).

    >>> plan = [Stretch(arm, "bootstrap", "initial", steps, "expected") for arm, steps in (("a", 2), ("b", 3))]
    >>> [find(plan, step) for step in (1, 2, 3, 5)]
    [(0, 1), (0, 2), (1, 1), (1, 3)]
    """
    for number, stretch in enumerate(plan):
        if step <= stretch.num_steps:
            return number, step
        step -= stretch.num_steps
    raise AssertionError("a step beyond the plan")
