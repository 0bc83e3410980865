"""What one step of each phase does: an update of the objective, an edit, or some updates and an edit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from preceptor.systems.surgery.patient import scheduled_rate
from preceptor.systems.surgery.plan import Stretch
from preceptor.systems.surgery.session import Session
from preceptor.systems.surgery.student import knowledge
from preceptor.systems.surgery.text import draw_windows


class StepOutcome(NamedTuple):
    """A step's metrics, the surgeon's decision if it took one, and what a person should be told."""

    metrics: dict[str, Any]
    decision: dict[str, Any] | None
    notices: list[str]


def one_step(session: Session, stretch: Stretch, local: int, step: int) -> StepOutcome:
    """Step ``local`` of ``stretch``, which is ``step`` of the run."""
    measured: dict[str, Any] = {}
    notices: list[str] = []
    decision = None
    for count in _updates(session, stretch, local):
        learned, notice = update(session, stretch, count, step)
        measured |= learned
        notices += [notice] if notice else []
    if stretch.surgeon is not None:
        # Where both learn, `reward` is the surgeon's and the student's own stands beside it.
        edited, decision = operate(session, stretch, local, step)
        measured = {f"student_{name}" if name in edited else name: value for name, value in measured.items()} | edited
    known, notice = measure(session, stretch, local)
    notices += [notice] if notice else []
    return StepOutcome(measured | known, decision, notices)


def _updates(session: Session, stretch: Stretch, local: int) -> range:
    """Numbers, from 1, of the updates that step ``local`` makes."""
    if stretch.phase == "bootstrap":
        return range(local, local + 1)
    per_edit = session.config.phases.updates_per_edit if stretch.phase == "joint" else 0
    return range((local - 1) * per_edit + 1, local * per_edit + 1)


def update(session: Session, stretch: Stretch, count: int, step: int) -> tuple[dict[str, Any], str | None]:
    """Update number ``count`` of a stretch, on windows that every arm of its phase sees alike; metrics and a notice."""
    config, materials = session.config, session.materials
    fresh = stretch.start == "initial"
    purpose = "gradient" if stretch.arm == "gradient" else stretch.phase
    windows = draw_windows(
        materials.corpus.train,
        num_windows=config.learning.batch_size,
        length=config.student.block_size + 1,
        generator=materials.generator(f"batch of {purpose}", count),
    )
    learning = session.learning(stretch)
    rate = scheduled_rate(count, stretch.num_steps, learning) if fresh else learning.final_learning_rate
    measured, notice = session.patient.learn(
        windows.to(session.device),
        learning=learning,
        learning_rate=rate,
        step=step,
        generator=materials.generator(f"group of {purpose}", count),
    )
    return measured, notice


def operate(session: Session, stretch: Stretch, local: int, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One edit: proposed, tried, perhaps tested and committed, learned from. Metrics, and the recorded decision."""
    surgery, surgeon, materials = session.surgery, session.surgeon, session.materials
    assert surgeon is not None, "a stretch with edits has a surgeon"
    draws = materials.generator(f"surgeon of {stretch.arm}", local)

    # a. The surgeon sees the student and proposes.
    common = session.draws(stretch, local)
    before = surgery.examine(common)
    state = session.features.state(loss=-before.log_prob)
    action = surgeon.propose(state, generator=draws)

    # b. The edit is tried and undone.
    trial = surgery.try_edit(action, before=before, draws=common)

    # c. What deserves it is tested on text that no reward saw, and committed if it passes.
    usable = math.isfinite(trial.reward)
    candidate = surgeon.candidate(action, trial.reward) if usable else None
    verdict = None
    if candidate is not None:
        windows = draw_windows(
            materials.corpus.train,
            num_windows=session.config.quality.acceptance_windows,
            length=session.config.student.block_size + 1,
            generator=materials.generator(f"acceptance of {stretch.phase}", local),
        )
        verdict = surgery.test(candidate, windows.to(session.device))
    committed = verdict is not None and verdict.passed

    # d. The surgeon learns.
    if usable:
        surgeon.observe(state, action, trial.reward, committed=committed, generator=draws)
        session.features.observe(action, reward=trial.reward, committed=committed)
    session.num_edits += 1
    session.num_committed += committed
    if stretch.arm == "learned":
        session.learned_actions.append(action.tolist())
    norm = float(action.norm())
    measured = {
        "reward": trial.reward,
        "loss_gain": trial.after.log_prob - before.log_prob,
        "quality": before.total,
        "action_norm": norm,
        "action_norm_maximum": math.sqrt(len(action)),
        "relative_norm": trial.relative_norm,
        "committed": session.num_committed,
        "committed_share": session.num_committed / session.num_edits,
        "acceptance_z": None if verdict is None else verdict.z,
        "theatre_bytes": trial.bytes_held,
        "deep_copy_bytes": session.patient.num_bytes,
        "evaluation_seconds": trial.seconds,
        **{f"surgeon_{name}": value for name, value in surgeon.metrics().items()},
    }
    decision = {
        "step": step,
        "arm": stretch.arm,
        "phase": stretch.phase,
        "edit": local,
        "action": action.tolist(),
        "reward": trial.reward,
        "quality_before": before._asdict(),
        "quality_after": trial.after._asdict(),
        "tested": None if candidate is None else candidate.tolist(),
        "acceptance": None if verdict is None else verdict._asdict(),
        "committed": committed,
    }
    return measured, decision


def measure(session: Session, stretch: Stretch, local: int) -> tuple[dict[str, Any], str | None]:
    """What the student knows of the watched part of the held-out text, now and then; looks for the plateau."""
    every = session.config.evaluation.every
    if stretch.phase != "bootstrap":
        every = max(1, every // 10)
    if local % every and local != stretch.num_steps:
        return {}, None
    known = knowledge(session.patient.model, session.materials.watched, block_size=session.config.student.block_size)
    measured = {
        "held_out_cross_entropy": known.cross_entropy,
        "held_out_accuracy": known.accuracy,
        "held_out_entropy": known.entropy,
    }
    notice = None
    if stretch.arm == "no_edit" and session.plateau.measure(local, known.cross_entropy):
        notice = f"a plateau at update {local}: {known.cross_entropy:.3f} nats on the held-out text"
    return measured, notice
