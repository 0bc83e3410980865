"""The surgery system: a student learns next-token prediction from rewards alone, and a surgeon edits its attention.

1. Bootstrapping: the objective alone trains the student, and a plateau is looked for.
2. Exclusive surgery: the student is frozen but for edits. Each step
   a. the surgeon sees the student's state and proposes an edit,
   b. the edit is made in the theater, the edited student examined, the weights put back;
      the reward is the change in quality, measured on the same prompts, noise and windows,
   c. an edit with a positive reward is tested on windows that no reward has seen, and committed if it passes,
   d. the surgeon learns.
3. Joint: some updates of the objective, then an edit, again and again.
4. Every control does the same from where its phase began: other surgeons, gradient steps, training without surgery.

The steps of a run are counted through all phases. Each is logged, and a stop at any of them can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preceptor.config import to_dict
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.export import MODEL, save_model
from preceptor.systems.surgery import amortised
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.environment import scheduled_rate
from preceptor.systems.surgery.evaluate import evaluate, ladder_records, result, score_text
from preceptor.systems.surgery.rewards import Draws, draw_windows
from preceptor.systems.surgery.setup import prepare
from preceptor.systems.surgery.sites import Sites
from preceptor.systems.surgery.state import State

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

MAIN_METHODS = ("no_edit", "learned", "joint")
"""The methods of the three phases, not controls; the run folder keeps the student as the last of them leaves it."""

PROGRESS_COLUMNS = {
    "held_out_cross_entropy": "held-out nats",
    "reward": "reward",
    "committed": "committed",
    "tokens": "tokens",
}


def train(config: SurgeryConfig, run: Run, services: Services) -> dict[str, Any]:
    """Runs all three phases and every control inside ``run``; gives ``result.json``.

    With ``training: amortised`` it is the loop of :mod:`preceptor.systems.surgery.amortised` that runs.
    """
    if config.training == "amortised":
        return amortised.train(config, run, services)
    setup = prepare(config, device=run.device, folder=run.path, notice=run.notice, world=run.world)
    state = State(setup)
    run.restore(state)
    run.show_progress(sum(phase.num_steps for phase in state.phases), PROGRESS_COLUMNS)
    end = 0
    for phase in state.phases:
        start, end = end, end + phase.num_steps
        if run.step > end:
            continue  # its record is in the checkpoint
        if run.step == start:
            run.notice(f"{phase.method}: {phase.kind}, {phase.num_steps} steps")
            state.begin(phase)
        for n in run.loop(end, state):
            metrics, decisions = step(state, n - start, run_step=n)
            run.record(decisions)
            run.log(
                n,
                {
                    "arm": phase.method,
                    "phase": phase.kind,
                    "stretch_step": n - start,
                    **{name: metrics[name] for name in PROGRESS_COLUMNS if name in metrics},
                    "tokens": state.student.costs.tokens,
                    "peak_memory_mib": peak_memory_mib(run.device),
                    phase.method: metrics,
                },
            )
        # The phase's last checkpoint is from before this, so a resume there does it again.
        state.records.append(evaluate(state))
        if phase.method == "no_edit":
            state.bootstrapped = state.student.snapshot()
        if phase.method in MAIN_METHODS and run.writes:
            save_model(state.student.model, setup.corpus.tokenizer, run.path / MODEL)
        run.stop_if_requested()
    records = [*state.records, *ladder_records(setup)]
    return result(records, config=to_dict(config), seeds=[config.seed])


def step(state: State, local: int, *, run_step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Step ``local`` (from 1) of the current phase: its updates, its edit if there is a surgeon, its measurement.

    Gives the metrics, and the decision to record where there was one.
    """
    metrics: dict[str, Any] = {}
    decisions = []
    for number in updates_of(state, local):
        metrics |= update(state, number, run_step=run_step)
    if state.surgeon is not None:
        edit_metrics, decision = edit(state, local, run_step=run_step)
        decisions.append(decision)
        # Where both learn, `reward` is the surgeon's, and the student's own stands beside it.
        metrics = {f"student_{name}" if name in edit_metrics else name: value for name, value in metrics.items()}
        metrics |= edit_metrics
    return metrics | measure(state, local), decisions


def updates_of(state: State, local: int) -> Sequence[int]:
    """Numbers (from 1) of the updates in step ``local`` of the current phase."""
    if state.phase.kind == "bootstrap":
        return [local]
    per_edit = state.setup.config.phases.updates_per_edit if state.phase.kind == "joint" else 0
    return range((local - 1) * per_edit + 1, local * per_edit + 1)


def update(state: State, number: int, *, run_step: int) -> dict[str, Any]:
    """Update ``number`` (from 1) of the current phase, on the windows that every method sees at this number."""
    setup, phase = state.setup, state.phase
    learning = setup.config.learning
    # Gradient steps in place of edits must not learn from the batches of bootstrapping a second time.
    purpose = "gradient" if phase.method == "gradient" else phase.kind
    windows = draw_windows(
        setup.corpus.train,
        num_windows=learning.batch_size,
        length=setup.config.student.block_size + 1,
        generator=setup.generator(f"batch of {purpose}", number),
    )
    fresh = phase.start == "initial"
    return state.student.learn(
        windows.to(setup.device),
        objective=phase.objective,
        learning_rate=scheduled_rate(number, phase.num_steps, learning) if fresh else learning.final_learning_rate,
        step=run_step,
        generator=setup.generator(f"group of {purpose}", number),
        notice=setup.notice,
    )


def draws(state: State, local: int) -> Draws:
    """Prompts and noise for the edit of step ``local``, the same for every method of the phase's kind."""
    return state.setup.examiner.draw(state.setup.generator(f"prompts of {state.phase.kind}", local))


def edit(state: State, local: int, *, run_step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One edit: proposed, tried, perhaps tested and committed, learned from. Gives metrics and the decision."""
    setup, phase, surgery, surgeon = state.setup, state.phase, state.surgery, state.surgeon
    assert surgeon is not None, "a phase with edits has a surgeon"
    generator = setup.generator(f"surgeon of {phase.method}", local)

    # a. The surgeon sees the student and proposes.
    common = draws(state, local)
    before = surgery.examine(common)
    observation = state.features.state(loss=-before.log_prob)  # [state]
    action = surgeon.propose(observation, generator=generator)  # [action], in [−1, 1]

    # b. The edit is tried and undone.
    trial = surgery.try_edit(action, before=before, draws=common)

    # c. What deserves it is tested on text that no reward has seen, and committed if it passes.
    usable = math.isfinite(trial.reward)
    candidate = surgeon.candidate(action, trial.reward) if usable else None
    acceptance = None
    if candidate is not None:
        windows = draw_windows(
            setup.corpus.train,
            num_windows=setup.config.quality.acceptance_windows,
            length=setup.config.student.block_size + 1,
            generator=setup.generator(f"acceptance of {phase.kind}", local),
        )
        acceptance = surgery.test(candidate, windows.to(setup.device))
    committed = acceptance is not None and acceptance.passed

    # d. The surgeon learns.
    if usable:
        surgeon.observe(observation, action, trial.reward, committed=committed, generator=generator)
        state.features.observe(action, reward=trial.reward, committed=committed)
    state.num_edits += 1
    state.num_committed += committed
    if phase.method == "learned":
        state.learned_actions.append(action.tolist())
    metrics = {
        "reward": trial.reward,
        "loss_gain": trial.after.log_prob - before.log_prob,
        "quality": before.total,
        "action_norm": float(action.norm()),
        "action_norm_maximum": math.sqrt(len(action)),
        "relative_norm": trial.relative_norm,
        "committed": state.num_committed,
        "committed_share": state.num_committed / state.num_edits,
        "acceptance_z": None if acceptance is None else acceptance.z,
        "theatre_bytes": trial.bytes_held,
        "deep_copy_bytes": state.student.num_bytes,
        "evaluation_seconds": trial.seconds,
        **{f"surgeon_{name}": value for name, value in surgeon.metrics().items()},
    }
    decision = {
        "step": run_step,
        "arm": phase.method,
        "phase": phase.kind,
        "edit": local,
        "action": action.tolist(),
        "reward": trial.reward,
        "quality_before": before._asdict(),
        "quality_after": trial.after._asdict(),
        "tested": None if candidate is None else candidate.tolist(),
        "acceptance": None if acceptance is None else acceptance._asdict(),
        "committed": committed,
    }
    if isinstance(surgery.edit, Sites):
        decision["sites"] = surgery.edit.names  # the action has other numbers than the configuration's edit
    return metrics, decision


def measure(state: State, local: int) -> dict[str, Any]:
    """Now and then, how well the student predicts the watched part of the held-out text; looks for the plateau."""
    setup, phase = state.setup, state.phase
    every = setup.config.evaluation.every
    if phase.kind != "bootstrap":
        every = max(1, every // 10)  # these phases have far fewer steps
    if local % every and local != phase.num_steps:
        return {}
    block_size = setup.config.student.block_size
    score = score_text(state.student.model, setup.watched, block_size=block_size, world=setup.world)
    if phase.method == "no_edit" and state.plateau.measure(local, score.cross_entropy):
        setup.notice(f"a plateau at update {local}: {score.cross_entropy:.3f} nats on the held-out text")
    return {
        "held_out_cross_entropy": score.cross_entropy,
        "held_out_accuracy": score.accuracy,
        "held_out_entropy": score.entropy,
    }
