"""The surgery system: a student learns to speak by reinforcement alone, and a surgeon edits its attention.

1. Bootstrapping: the objective alone teaches the student, and a plateau is looked for.
2. Exclusive surgery: the student is frozen but for edits. Each step
   a. the surgeon sees the student's state and proposes an edit,
   b. the edit is made in the theatre, the edited student examined, the weights put back;
      the reward is the change in quality, measured on the same prompts, noise and windows,
   c. an edit that earned something is tested on windows that no reward saw; if it passes it is committed,
   d. the surgeon learns.
3. Joint: updates of the objective, then an edit, again and again.
4. Every control does the same from where its phase began: other surgeons, gradient steps, training without surgery.

Steps of the run are counted through all stretches; each is logged, and a stop at any of them can be resumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preceptor.config import to_dict
from preceptor.run.device import peak_memory_mib
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.materials import ladder, prepare
from preceptor.systems.surgery.phases import one_step
from preceptor.systems.surgery.result import arm_record, ladder_records, surgery_result
from preceptor.systems.surgery.session import Session
from preceptor.systems.surgery.student import save_student

if TYPE_CHECKING:
    from preceptor.run.folder import Run
    from preceptor.systems.base import Services

STREAMS: tuple[str, ...] = ()
"""None: every draw has a generator of its own, named by purpose and step (:meth:`Materials.generator`)."""

PHASE_ARMS = ("no_edit", "learned", "joint")
"""What the student goes through; the run folder keeps it as the last of these leaves it."""

PROGRESS_COLUMNS = {
    "held_out_cross_entropy": "held-out nats",
    "reward": "reward",
    "committed": "committed",
    "tokens": "tokens",
}


def train(config: SurgeryConfig, run: Run, services: Services) -> dict[str, Any]:
    """Run all three phases and every control of ``config`` inside ``run``; gives ``result.json``."""
    materials = prepare(config, device=run.device)
    session = Session(config, materials, device=run.device, folder=run.path)
    run.restore(session)
    run.show_progress(sum(stretch.num_steps for stretch in session.plan), PROGRESS_COLUMNS)
    end = 0
    for stretch in session.plan:
        start, end = end, end + stretch.num_steps
        if run.step > end:
            continue  # its record is in the checkpoint
        if run.step == start:
            run.notice(f"{stretch.arm}: {stretch.phase}, {stretch.num_steps} steps")
            session.begin(stretch)
        for step in run.loop(end, session):
            local = step - start
            outcome = one_step(session, stretch, local, step)
            for notice in outcome.notices:
                run.notice(notice)
            if outcome.decision is not None:
                run.record([outcome.decision])
            shown = {name: outcome.metrics[name] for name in PROGRESS_COLUMNS if name in outcome.metrics}
            position = {"arm": stretch.arm, "phase": stretch.phase, "stretch_step": local}
            tokens = {"tokens": session.patient.costs.tokens, "peak_memory_mib": peak_memory_mib(run.device)}
            run.log(step, position | shown | tokens | {stretch.arm: outcome.metrics})
        session.records.append(arm_record(session, stretch))
        if stretch.arm == "no_edit":
            session.bootstrapped = session.patient.snapshot()
        if stretch.arm in PHASE_ARMS:
            save_student(session.patient.model, materials.corpus.tokenizer, run.path / "student")
        run.stop_if_requested()
    records = [
        *session.records,
        *ladder_records(materials, ladder(materials.corpus, order=config.evaluation.ladder_order)),
    ]
    return surgery_result(records, config=to_dict(config), seeds=[config.seed])
