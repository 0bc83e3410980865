"""The amortised teacher: a policy over tasks' levels, trained by PPO over many students, for tasks that it never saw.

Each training step
1. takes some sets of tasks, and for each some students from the set's warm weights,
2. lets the teacher choose what each student learns from, batch by batch, until the student's tokens are spent,
3. pays it the student's success at each measurement, less that of the set's other students,
4. lets it learn.

Then, as a search at equal cost, the windows and thresholds of ``frontier_range`` teach as many students; and every rule
teaches a student of every unseen set, one a step. All three kinds of step are saved and resumed alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from preceptor.config import to_dict
from preceptor.objectives.learned_rule import source_features
from preceptor.objectives.task_mixture import TaskMixture, make_task_mixture
from preceptor.runs.checkpoint import copy_tensors
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.random import derived_seed
from preceptor.systems.base import Replayed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.policy import build_policy
from preceptor.systems.curriculum.tasks.config import COIN, TaskOptions
from preceptor.systems.curriculum.tasks.judged import judged_records, judged_result, success_area
from preceptor.systems.curriculum.tasks.loop import task_setup, task_step
from preceptor.systems.curriculum.tasks.result import TaskOutcome, success_curve
from preceptor.systems.curriculum.tasks.saved import TEACHER, save_teacher
from preceptor.systems.curriculum.tasks.state import TaskSetup, TaskState
from preceptor.systems.curriculum.tasks.teacher import Lesson, Teacher, lesson_rewards

if TYPE_CHECKING:
    from preceptor.lm.model import LanguageModel
    from preceptor.runs.folder import Run

LEARNERS = ("learned", "shuffled")
"""The teacher, and the same one paid with the rewards of other students."""
SEARCHED = "searched"
"""``frontier_range`` with the settings that the search found."""
CANDIDATES = tuple({"window": w, "threshold": t} for w, t in product((1.0, 2.0, 3.0), (0.3, 0.5, 0.7, 0.9)))
"""What the search tries."""

COLUMNS = {"success": "success", "entropy": "entropy"}


@dataclass(frozen=True)
class School:
    """Who is taught.

    Attributes:
        sets: to train on.
        unseen: to judge on.
        rules: that are judged.
        num_students: that the teacher has in training, and the search after it.
    """

    sets: list[TaskSetup]
    unseen: list[TaskSetup]
    rules: list[str]
    num_students: int


class State:
    """The two learners, what the second is paid next, the search so far, and what the judged students reached."""

    def __init__(self, config: CurriculumConfig) -> None:
        self._config = config
        self.teachers = {
            name: Teacher(
                config.amortised, generator=torch.Generator().manual_seed(derived_seed(config.seed, "teacher weights"))
            )
            for name in LEARNERS
        }
        self.last_rewards: list[list[float]] = []
        self.found: list[float] = []
        self.lm: LanguageModel | None = None
        self.engine: dict[str, int] = {}
        self.outcomes: list[dict[str, Any]] = []

    def mixture(self, rule: str, *, num_levels: Sequence[int]) -> TaskMixture:
        """The mixture that ``rule`` begins with: of a learner, of a candidate of the search, or made by hand."""
        if rule in LEARNERS:
            return TaskMixture(self.teachers[rule].rule, num_levels=num_levels)
        if rule.startswith(SEARCHED):
            number = rule.removeprefix(SEARCHED)
            settings = CANDIDATES[int(number)] if number else self.best_settings
            return make_task_mixture("frontier_range", num_levels=num_levels, policy=None, **settings)
        tasks = self._config.tasks
        settings = tasks.settings if rule == tasks.rule else {}
        return make_task_mixture(rule, num_levels=num_levels, policy=None, **settings)

    @property
    def best_settings(self) -> dict[str, float]:
        """Those of the candidate whose students had the highest success on average."""
        return CANDIDATES[max(range(len(self.found)), key=self.found.__getitem__)]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as nested tensors and plain values."""
        return {
            **{name: teacher.state_dict() for name, teacher in self.teachers.items()},
            "last_rewards": self.last_rewards,
            "found": self.found,
            "engine": self.engine if self.lm is None else self.lm.engine_state(),
            "outcomes": self.outcomes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        for name, teacher in self.teachers.items():
            teacher.load_state_dict(state[name])
        self.last_rewards = [list(rewards) for rewards in state["last_rewards"]]
        self.engine = dict(state["engine"])
        self.found, self.outcomes = list(state["found"]), list(state["outcomes"])


def train_teacher(config: CurriculumConfig, run: Run) -> dict[str, Any]:
    """Trains the teacher inside ``run`` and judges it on every unseen set; gives ``result.json``."""
    options, state = config.amortised, State(config)
    run.restore(state)  # before the warm-ups, so that a stop in them names the step that the run is at
    school = found_school(config, run, state)
    state.lm = school.sets[0].lm
    if state.engine:  # whether the fast path is still taken is what a resumed run must know
        state.lm.load_engine_state(state.engine)
    num_searched = options.steps + (len(CANDIDATES) if options.search else 0)
    items = list(product(range(len(school.unseen)), school.rules))
    for n in run.loop(num_searched + len(items), state, columns=COLUMNS):
        if n <= options.steps:
            metrics, decisions = step(config, school, state, n)
        elif n <= num_searched:
            metrics, decisions = search_step(school, state, n - options.steps - 1)
        else:
            number, rule = items[n - num_searched - 1]
            metrics, decisions = judge(school.unseen[number], state, rule)
        run.record({**decision, "step": n} for decision in decisions)
        run.log(n, metrics)
        if n == options.steps and run.writes:
            save_teacher(state.teachers["learned"].policy, run.path / TEACHER)
    records = judged_records(state.outcomes, seed=config.seed)
    result = judged_result(records, config=to_dict(config), seeds=[config.seed], outcomes=state.outcomes)
    return result | ({"searched": state.best_settings} if options.search else {})


def found_school(config: CurriculumConfig, run: Run, state: State) -> School:
    """Draws the sets of tasks and warms a student up on each."""
    options = config.amortised
    by_hand = list(dict.fromkeys((config.tasks.rule, *config.tasks.controls)))
    for rule in by_hand:
        state.mixture(rule, num_levels=[1])  # faults in settings are said before anything is trained
    lm = build_policy(config.model, device=run.device, seed=derived_seed(config.seed, "weights"))
    fresh = {name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()}
    pool = sets_of(config.tasks.tasks, options.tasks_per_set)
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "sets"))
    order = torch.randperm(len(pool), generator=generator).tolist()
    chosen = [pool[order[number % len(pool)]] for number in range(options.num_sets)]

    def founded(tasks: Sequence[TaskOptions], name: str, **changed: Any) -> TaskSetup:
        run.notice(f"warming a student up: {', '.join(task.name for task in tasks)}")
        copy_tensors(fresh, lm.trainable_parameters())
        setup = of_set(config, run, lm, state, tasks, seed=derived_seed(config.seed, name), **changed)
        run.stop_if_requested()
        return setup

    sets = [founded(tasks, f"set {number}", max_tokens=options.student_tokens) for number, tasks in enumerate(chosen)]
    unseen = [
        founded(
            tasks, f"unseen set {number}",
            max_tokens=options.judged_tokens, validation_prompts=options.judged_prompts,
        )
        for number, tasks in enumerate(sets_of(options.unseen, options.tasks_per_set))
    ]  # fmt: skip
    rules = [*LEARNERS, *([SEARCHED] if options.search else []), *by_hand]
    return School(sets, unseen, rules, options.steps * options.sets_per_step * options.students_per_set)


def sets_of(tasks: Sequence[TaskOptions], size: int) -> list[tuple[TaskOptions, ...]]:
    """All sets of ``size`` different tasks, but those in which nothing can be learned."""
    return [tasks for tasks in combinations(tasks, size) if any(task.source != COIN for task in tasks)]


def of_set(
    config: CurriculumConfig,
    run: Run,
    lm: LanguageModel,
    state: State,
    tasks: Sequence[TaskOptions],
    *,
    seed: int,
    **changed: Any,
) -> TaskSetup:
    """The set of ``tasks``, with ``lm`` warmed up on it."""
    # A student learns until its tokens are spent, whatever it has reached.
    of_tasks = config.tasks.model_copy(update={"tasks": tuple(tasks), "stop_at": math.inf, **changed})
    # Rules on a schedule follow the share of the steps taken; these are as many as the tokens suffice for.
    steps = math.ceil(of_tasks.max_tokens / of_tasks.tokens_per_step)
    update = config.update.model_copy(update={"steps": steps})
    own = config.model_copy(update={"seed": seed, "tasks": of_tasks, "update": update})
    make = partial(state.mixture, num_levels=[task.levels for task in tasks])
    return task_setup(own, run, lm, rules=("uniform",), make_mixture=make)


def set_name(setup: TaskSetup) -> str:
    """As in tables: the names of its tasks."""
    return " + ".join(task.name for task in setup.config.tasks.tasks)


# ---- training -------------------------------------------------------------------------------------------------------


def step(config: CurriculumConfig, school: School, state: State, n: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Training step ``n`` (from 1): students of some sets under both learners. Gives metrics and decisions."""
    options = config.amortised
    metrics: dict[str, Any] = {"kind": "training"}
    decisions: list[dict[str, Any]] = []
    for name, teacher in state.teachers.items():
        lessons: list[Lesson] = []
        rewards: list[list[float]] = []
        for place in range(options.sets_per_step):
            number = ((n - 1) * options.sets_per_step + place) % len(school.sets)
            setup = school.sets[number]
            # The same students for both learners: their items and answers are functions of these numbers alone.
            names = [f"student {n} {place} {student}" for student in range(options.students_per_set)]
            group = [watched(reseeded(setup, own), name) for own in names]
            earned = lesson_rewards(group)
            lessons += group
            rewards += earned
            decisions += [
                {
                    "arm": name,
                    "kind": "lesson",
                    "set": set_name(setup),
                    "set_number": number,
                    "drawn": lesson.drawn,
                    "success": [success for _, success in lesson.measured],
                    "rewards": own,
                }
                for lesson, own in zip(group, earned, strict=True)
            ]
        told = rewards
        if name == "shuffled":
            # Those of the step before: a permutation of its own would leave some in their place. They are differences
            # between students of one set already, so their mean does not tell how well the policy does as a whole.
            told, state.last_rewards = state.last_rewards or [[0.0]] * len(rewards), rewards
        learned = teacher.learn(lessons, told)
        success = [sum(value for _, value in lesson.measured) / max(len(lesson.measured), 1) for lesson in lessons]
        metrics[name] = {"success": sum(success) / len(success), **learned}
    return metrics | {key: metrics["learned"][key] for key in ("success", "entropy")}, decisions


def reseeded(setup: TaskSetup, name: str) -> TaskSetup:
    """``setup`` with items and answers of its own, a function of its seed and ``name`` alone."""
    config = setup.config.model_copy(update={"seed": derived_seed(setup.config.seed, name)})
    return replace(setup, config=config)


def taught(setup: TaskSetup, rule: str, lesson: Lesson | None = None) -> tuple[TaskState, list[dict[str, Any]]]:
    """A student of ``setup`` that learned under ``rule`` until its tokens were spent, and the decisions on the way.

    With a ``lesson`` the rule decides for several batches at once: it draws a few sources, which these batches come
    from, and what it saw and drew is appended. Drawn anew for every group, choices would average out within a batch,
    and every student would have learned from the same: nothing to tell good choices from bad ones by.
    """
    options = setup.config.amortised
    state = TaskState(setup)
    state.begin(rule)
    for name, generator in setup.run.streams.items():
        generator.manual_seed(derived_seed(setup.config.seed, name))
    counts, max_tokens = state.outcome.counts, setup.config.tasks.max_tokens
    rows: list[dict[str, Any]] = []
    held = None
    while not state.finished:
        number = counts["steps"]
        if lesson is not None and number % options.decision_batches == 0:
            weights = state.mixture.weights
            drawn = torch.multinomial(
                weights, options.decision_draws, replacement=True, generator=setup.run.streams["prompt"]
            )
            held = drawn.bincount(minlength=len(weights)).double() / len(drawn)
            lesson.features.append(source_features(state.mixture.state, state.mixture.tasks))
            lesson.left.append(max(0.0, 1 - counts["rollout_tokens"] / max_tokens))
            lesson.drawn.append(drawn.tolist())
        metrics, decisions = task_step(setup, state, number + 1, last=False, held=held)
        rows += decisions
        if lesson is not None and "success" in metrics and number:
            lesson.measured.append(((number - 1) // options.decision_batches, metrics["success"]))
    if lesson is not None:
        # What was decided after the last measurement is paid nothing.
        paid = lesson.measured[-1][0] + 1 if lesson.measured else 0
        lesson.features, lesson.left, lesson.drawn = lesson.features[:paid], lesson.left[:paid], lesson.drawn[:paid]
    return state, rows


def watched(setup: TaskSetup, learner: str) -> Lesson:
    """A student's lesson under a learner."""
    lesson = Lesson()
    taught(setup, learner, lesson)
    return lesson


def search_step(school: School, state: State, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Candidate ``number`` of the search teaches its share of the students. Gives metrics and no decisions."""
    num_students = math.ceil(school.num_students / len(CANDIDATES))
    successes = []
    for student in range(num_students):  # the same students for every candidate
        setup = reseeded(school.sets[student % len(school.sets)], f"searched student {student}")
        outcome = taught(setup, f"{SEARCHED}{number}")[0].outcome
        successes.append(mean_height(outcome, setup))
    state.found.append(sum(successes) / len(successes))
    return {"kind": "search", "searched": {"success": state.found[-1], **CANDIDATES[number]}}, []


def judge(setup: TaskSetup, state: State, rule: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A student of an unseen set under ``rule``; the same items and random numbers for every rule."""
    taught_state, rows = taught(setup, rule)
    outcome = taught_state.outcome
    state.outcomes.append(
        {
            "set": set_name(setup),
            "rule": rule,
            "curve": outcome.curve,
            "weights": outcome.weights,
            "counted": setup.counted,
            "names": [source.name for source in setup.sources],
            "counts": outcome.counts,
            "max_tokens": setup.config.tasks.max_tokens,
        }
    )
    metrics = {"kind": "judging", "set": set_name(setup), "judged": {rule: mean_height(outcome, setup)}}
    return metrics, [{**row, "set": set_name(setup), "batch": row["step"]} for row in rows]


def mean_height(outcome: TaskOutcome, setup: TaskSetup) -> float:
    """Mean success on the way, over the student's tokens; see :func:`success_area`."""
    return success_area(success_curve(outcome, setup.counted), max_tokens=setup.config.tasks.max_tokens)


# ---- computed again -------------------------------------------------------------------------------------------------


def verify_teacher(config: CurriculumConfig, folder: Path) -> Iterator[Replayed]:
    """Every recorded reward of training beside the same number computed again from the successes of its set."""
    options = config.amortised
    rows = [row for row in read_jsonl(folder / "decisions.jsonl") if row["kind"] == "lesson"]
    for first in range(0, len(rows), options.students_per_set):
        group = rows[first : first + options.students_per_set]
        lessons = [Lesson(measured=list(enumerate(row["success"]))) for row in group]
        for row, rewards in zip(group, lesson_rewards(lessons), strict=True):
            for number, (recorded, again) in enumerate(zip(row["rewards"], rewards, strict=True), start=1):
                yield Replayed(f"step {row['step']}, {row['arm']}, {row['set']}, reward {number}", recorded, again)
