"""A search as Optuna proposes, prunes and remembers it; its trials are cells, run by any launcher.

Everything is in the folder: Optuna's journal has the trials, and each trial's folder its run. So a search that was
killed at any moment is started again with the same words, takes its unfinished trials up again and proposes the rest.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preceptor.comparison.cells import Cell, CellFailed, Launcher
from preceptor.comparison.sweep import carry_out, missing
from preceptor.errors import ConfigError, MissingExtraError, NumericError, did_you_mean, short_repr
from preceptor.runs.files import FolderLock, replace_file, storage_errors
from preceptor.runs.watching import MetricsTail, numbers
from preceptor.tuning.space import Dimension

WINDOW = 10
"""Rows whose mean is a trial's value: the last ones, since single rows are noisy."""

NUM_FREE = 5
"""Trials that run to their end before any is pruned; so does each trial's first :data:`WINDOW` steps."""

JOURNAL = "trials.journal"


class Plan(NamedTuple):
    """What makes two searches the same one."""

    system: str
    metric: str
    maximise: bool
    space: tuple[Dimension, ...]
    arguments: tuple[str, ...]  # of `preceptor run`, the same for every trial
    seed: int  # of every trial, and of what is proposed

    def recorded(self) -> dict[str, Any]:
        """The plan as plain values, by name."""
        searched = {f"search {dimension.key}": dimension.text() for dimension in self.space}
        named = {"system": self.system, "metric": self.metric, "direction": "max" if self.maximise else "min"}
        return {**named, **searched, "arguments": list(self.arguments), "seed": self.seed}


class Outcome(NamedTuple):
    """A trial and what came of it."""

    number: int
    state: str  # finished, pruned, failed or unfinished
    value: float | None  # the mean of the metric over the last WINDOW rows
    values: Mapping[str, Any]  # by key
    steps: int  # done


class _AtWork(NamedTuple):
    trial: Any
    cell: Cell
    tail: MetricsTail
    told: set[int]  # steps that Optuna has heard of


class Search:
    """The search of ``plan`` in ``root``, which it holds for this process until ``close``.

    ``cell_of`` makes the cell of a trial from its number and its values.

    Raises:
        MissingExtraError: Optuna is not installed.
        ConfigError: the folder holds another search.
        LockedError: another process is at work on it.
    """

    def __init__(self, plan: Plan, root: Path, cell_of: Callable[[int, Mapping[str, Any]], Cell]) -> None:
        self._optuna = optuna = _imported()
        with storage_errors(f"create {root}"):
            root.mkdir(parents=True, exist_ok=True)
        self.plan, self.root, self._cell_of = plan, root, cell_of
        self._lock = FolderLock(root)
        # The folder is ours alone, so that a lock of the journal is one that a killed process left.
        (root / f"{JOURNAL}.lock").unlink(missing_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(root / JOURNAL))
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="tune",
            direction="maximize" if plan.maximise else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=NUM_FREE, n_warmup_steps=WINDOW),
            load_if_exists=True,
        )
        trials = self._study.get_trials(deepcopy=False)
        # Another seed after each restart: the same one would propose the first trials once more.
        self._study.sampler = optuna.samplers.TPESampler(seed=plan.seed * 1_000_003 + len(trials))
        self._check_plan()
        self._distributions = {dimension.key: _distribution(optuna, dimension) for dimension in plan.space}
        self._unfinished = [trial for trial in trials if not trial.state.is_finished()]
        self._at_work: dict[str, _AtWork] = {}  # by name of the cell
        self._pruned: set[str] = set()

    def close(self) -> None:
        """Let the next process have the folder."""
        self._lock.release()

    def run(self, num_trials: int, launcher: Launcher, *, say: Callable[[str], None] = lambda text: None) -> None:
        """Run trials until ``num_trials`` have been tried, those of earlier starts among them.

        A trial whose numbers stayed NaN or infinite, or whose values do not go together, counts as failed. Any other
        failure ends the search as it ends a sweep.

        Raises:
            ConfigError: the trials have no such metric.
            CellFailed, Interrupted: as :func:`preceptor.comparison.sweep.carry_out` says.
        """
        missing([], self.root)  # makes the folder of logs
        num_known = len(self._study.get_trials(deepcopy=False))
        say(f"{num_known - len(self._unfinished)} of {num_trials} trials are done")

        def take() -> Cell | None:
            while (proposed := self._propose(num_trials)) is not None:
                trial, told = proposed
                try:
                    cell = self._cell_of(trial.number, trial.params)
                except ConfigError as error:
                    # Each value is allowed by itself; some do not go together, which the sampler is told by a failure.
                    self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                    say(f"trial {trial.number} is no configuration: {error}")
                    continue
                tail = MetricsTail(self.root / cell.name / "metrics.jsonl")
                self._at_work[cell.name] = _AtWork(trial, cell, tail, told)
                return cell
            return None

        def look() -> None:
            for name, work in self._at_work.items():
                if work.tail.look():
                    self._tell_rows(work)
                    if name not in self._pruned and work.trial.should_prune():
                        self._pruned.add(name)
                        launcher.stop(work.cell, signal.SIGTERM)

        def ended(cell: Cell, failure: CellFailed | None) -> None:
            say(self._conclude(self._at_work.pop(cell.name), failure))

        carry_out(launcher, take, ended, look=look)

    def _propose(self, num_trials: int) -> tuple[Any, set[int]] | None:
        """A trial that an earlier start left, or a new one, and the steps that are told of it; None at the end."""
        if self._unfinished:
            left = self._unfinished.pop(0)
            return self._optuna.trial.Trial(self._study, left._trial_id), set(left.intermediate_values)
        if len(self._study.get_trials(deepcopy=False)) < num_trials:
            return self._study.ask(self._distributions), set()
        return None

    def _tell_rows(self, work: _AtWork) -> float | None:
        """Tell Optuna the trial's value after each new row; the newest value, None where no row has the metric."""
        values: list[float] = []
        value = None
        for row in work.tail.rows:
            if (number := numbers(row).get(self.plan.metric)) is None:
                continue
            values.append(number)
            value = sum(values[-WINDOW:]) / len(values[-WINDOW:])
            if row["step"] not in work.told:
                work.told.add(row["step"])
                work.trial.report(value, row["step"])
        return value

    def _conclude(self, work: _AtWork, failure: CellFailed | None) -> str:
        state = self._optuna.trial.TrialState
        work.tail.look()
        value = self._tell_rows(work)
        if failure is not None and work.cell.name in self._pruned:
            self._study.tell(work.trial, state=state.PRUNED)
            return f"{work.cell.name} is pruned after {len(work.tail.rows)} steps"
        if failure is not None and failure.exit_code == NumericError.exit_code:
            self._study.tell(work.trial, state=state.FAIL)
            return f"{work.cell.name} failed: {failure}"
        if failure is not None:
            raise failure  # the trial stays unfinished, and the next start takes it up again
        if value is None:
            known = sorted({name for row in work.tail.rows for name in numbers(row)})
            hint = did_you_mean(self.plan.metric[:100], known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"no row of {work.tail.path} has the metric {short_repr(self.plan.metric)}{hint}")
        self._study.tell(work.trial, value)
        return f"{work.cell.name} is finished: {self.plan.metric} {value:.4g}"

    def outcomes(self) -> list[Outcome]:
        """Every trial, the best first; those without a value come last."""
        names = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        found = [
            Outcome(
                trial.number,
                names.get(trial.state.name, "unfinished"),
                # Also of a pruned trial, whose last value is told but not what it is ranked by.
                trial.intermediate_values[trial.last_step] if trial.last_step is not None else trial.value,
                dict(trial.params),
                trial.last_step or 0,
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]
        sign = -1.0 if self.plan.maximise else 1.0

        def rank(outcome: Outcome) -> tuple[Any, ...]:
            ends = ("finished", "pruned", "unfinished", "failed").index(outcome.state)
            return ends, outcome.value is None, sign * (outcome.value or 0.0), outcome.number

        return sorted(found, key=rank)

    def write(self) -> Path:
        """``tune.json``: the plan and every trial, the best first."""
        path = self.root / "tune.json"
        content = {"plan": self.plan.recorded(), "window": WINDOW, "trials": [o._asdict() for o in self.outcomes()]}
        replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return path

    def _check_plan(self) -> None:
        wanted, recorded = self.plan.recorded(), self._study.user_attrs.get("plan")
        if recorded is None:
            self._study.set_user_attr("plan", wanted)
        elif differing := [key for key in {**recorded, **wanted} if recorded.get(key) != wanted.get(key)]:
            key = differing[0]
            self.close()
            raise ConfigError(
                f"{self.root} holds another search ({key}: {_shown(recorded.get(key))} → {_shown(wanted.get(key))}); "
                "choose another --out"
            )


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best of the trials that ran to their end, if there is one."""
    return next((outcome for outcome in outcomes if outcome.state == "finished"), None)


def _shown(value: Any) -> str:
    return "nothing" if value is None else short_repr(value)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if dimension.choices:
        return kinds.CategoricalDistribution(dimension.choices)
    low, high = dimension.corners()
    kind = kinds.IntDistribution if dimension.whole else kinds.FloatDistribution
    return kind(low, high, log=dimension.log)


def _imported() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise MissingExtraError("preceptor tune", package="optuna", extra="tune") from error
    # Its own lines about every trial are ours to say.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
