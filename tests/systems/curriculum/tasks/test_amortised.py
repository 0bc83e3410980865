"""A teacher trained in seconds: what its run writes, that it resumes bit for bit, and that it can be used."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.cli import main
from preceptor.config import load_config
from preceptor.objectives.learned_rule import source_features
from preceptor.runs.random import derived_seed
from preceptor.runs.record import seal_faults
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.kinds import verify
from preceptor.systems.curriculum.tasks import amortised
from preceptor.systems.curriculum.tasks.amortised import CANDIDATES, State
from preceptor.systems.curriculum.tasks.config import AmortisedOptions
from preceptor.systems.curriculum.tasks.judged import judged_result
from preceptor.systems.curriculum.tasks.saved import load_teacher
from preceptor.systems.curriculum.tasks.teacher import Teacher
from tests.systems.curriculum.small import SERVICES

SMALL = (
    "tasks.tokens_per_step=48",
    "tasks.warm_up_steps=40",  # until a student is right sometimes: a teacher whose rewards are all 0 learns nothing
    "tasks.warm_up_learning_rate=0.02",
    "tasks.warm_up_rows=8",
    "tasks.validate_every=60",
    "tasks.validation_prompts=4",
    "model.width=16",
    "ppo.group_size=2",
)
SETTINGS = (
    *SMALL,
    "tasks.tasks=[{name: count, source: count, levels: 2}, {name: coin, source: coin, levels: 1}]",
    "tasks.controls=[uniform, oracle]",
    "amortised.steps=2",
    "save_every=1",
    "amortised.num_sets=2",
    "amortised.tasks_per_set=1",
    "amortised.decision_batches=2",
    "amortised.students_per_set=2",
    "amortised.student_tokens=150",
    "amortised.judged_tokens=100",
    "amortised.judged_prompts=2",
    "amortised.unseen=[{name: sort, source: sort, levels: 2}, {name: largest, source: largest, levels: 2}]",
)
NUM_RULES = 6  # learned, shuffled, searched, frontier_range, uniform, oracle


def command(*settings: str, preset: str, out: Path) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["run", "curriculum", "--preset", preset, "--threads", "1", "--no-report", "--out", str(out), *sets]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert main(command(*SETTINGS, preset="teacher", out=folder)) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_rule_is_judged_on_every_unseen_set(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert list(result["arms"]) == ["learned", "shuffled", "searched", "frontier_range", "uniform", "oracle"]
    assert list(result["taught"]) == ["sort", "largest"]
    assert set(result["taught"]["sort"]["learned"]) == {"mean", "low", "high"}
    assert {c["baseline"] for c in result["comparisons"]} == set(result["arms"]) - {"learned"}
    assert result["searched"] in CANDIDATES
    assert "Weights of the levels: learned, sort" in [chart["title"] for chart in result["charts"]]
    assert "one seed proves nothing yet" in result["verdict"]
    # Rules on a schedule go through it: the steps of a judged student are as many as its tokens suffice for.
    decisions = [json.loads(line) for line in (finished / "decisions.jsonl").read_text().splitlines()]
    assert max(row["progress"] for row in decisions if row["kind"] == "groups") > 0.5
    rows = metrics(finished)
    assert all(row["learned"]["gradient_norm"] > 0 for row in rows[:2])  # it does learn
    first = Teacher(AmortisedOptions(), generator=torch.Generator().manual_seed(derived_seed(0, "teacher weights")))
    assert not torch.equal(load_teacher(finished).score.weight, first.policy.score.weight)
    assert [row["kind"] for row in rows] == ["training"] * 2 + ["search"] * len(CANDIDATES) + [
        "judging"
    ] * 2 * NUM_RULES
    assert rows[0]["learned"]["entropy"] > 0.9  # of its maximum: it begins as uniform


@pytest.mark.parametrize(("name", "calls"), [("step", 1), ("search_step", 3), ("judge", 4)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    name: str, calls: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, done = getattr(amortised, name), []

    def breaks(*arguments: Any) -> Any:
        if len(done) == calls:
            raise OSError("the machine went away")
        done.append(1)
        return whole(*arguments)

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(amortised, name, breaks)
        assert main(command(*SETTINGS, preset="teacher", out=folder)) != 0
    assert 0 < len(metrics(folder)) < len(metrics(finished))
    assert main(["resume", str(folder), "--no-report"]) == 0
    assert metrics(folder) == metrics(finished)
    for file in ("decisions.jsonl", "teacher/teacher.safetensors"):
        assert (folder / file).read_bytes() == (finished / file).read_bytes()
    ours, whole_result = (json.loads((run / "result.json").read_text()) for run in (folder, finished))
    assert ours["records"] == whole_result["records"]


def test_a_decision_lasts_for_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the lesson, here: one decision of two draws, however many batches and measurements follow it."""
    seen = []
    monkeypatch.setattr(
        amortised, "source_features", lambda state, tasks: seen.append(tasks) or source_features(state, tasks)
    )
    settings = ("amortised.decision_batches=100", "amortised.student_tokens=400", "amortised.search=false")
    assert main(command(*SETTINGS, *settings, preset="teacher", out=tmp_path / "run")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/decisions.jsonl").read_text().splitlines()]
    lessons = [row for row in rows if row["kind"] == "lesson"]
    assert [[len(draws) for draws in row["drawn"]] for row in lessons] == [[2]] * len(lessons)
    assert min(len(row["success"]) for row in lessons) >= 3
    assert len(seen) == len(lessons)


def test_the_shuffled_teacher_is_told_the_rewards_of_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[list[float]]] = []
    learn = Teacher.learn

    def listening(teacher: Teacher, lessons: Any, rewards: Any) -> dict[str, float]:
        told.append([list(row) for row in rewards])
        return learn(teacher, lessons, rewards)

    numbers = itertools.count(1)  # so small a student is never right, and all rewards would be 0
    monkeypatch.setattr(
        amortised, "lesson_rewards", lambda lessons: [[float(next(numbers)) for _ in row.measured] for row in lessons]
    )
    monkeypatch.setattr(Teacher, "learn", listening)
    assert main(command(*SETTINGS, "amortised.search=false", preset="teacher", out=tmp_path / "run")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/decisions.jsonl").read_text().splitlines()]
    earned = [
        [row["rewards"] for row in rows if (row["kind"], row.get("arm"), row["step"]) == ("lesson", arm, step)]
        for step in (1, 2)
        for arm in ("learned", "shuffled")
    ]
    assert told == [earned[0], [[0.0]] * len(earned[1]), earned[2], earned[1]]


def test_a_student_is_measured_when_its_tokens_are_spent_and_no_two_are_the_same(tmp_path: Path) -> None:
    settings = ("tasks.validate_every=10000", "amortised.num_sets=1", "amortised.search=false", "amortised.steps=1")
    assert main(command(*SETTINGS, *settings, preset="teacher", out=tmp_path / "run")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/decisions.jsonl").read_text().splitlines()]
    lessons = [row for row in rows if (row["kind"], row["arm"]) == ("lesson", "learned")]
    assert [len(row["success"]) for row in lessons] == [1] * 4  # 150 tokens, long before 10,000
    # One set twice in a step: four students all the same, each with draws of its own.
    assert len({json.dumps(row["drawn"]) for row in lessons}) > 2
    for outcome in json.loads((tmp_path / "run/result.json").read_text())["records"]:
        assert 100 <= outcome["rollout_tokens"] < 100 + 2 * 60


def test_the_search_takes_the_best() -> None:
    state = State(CurriculumConfig())
    state.found = [0.1] * len(CANDIDATES)
    state.found[5] = 0.2
    assert state.best_settings == CANDIDATES[5]
    assert state.mixture("searched", num_levels=[3]).rule == state.mixture("searched5", num_levels=[3]).rule


def test_rewards_are_recomputed(finished: Path) -> None:
    config = load_config(CurriculumConfig, file=finished / "config.yaml")
    replayed = list(verify(config, finished, SERVICES))
    assert len(replayed) >= 2 * 2 * 2 * 2  # learners, steps, sets, students, one measurement at least
    assert any(entry.recorded for entry in replayed)
    assert all(entry.recorded == pytest.approx(entry.recomputed) for entry in replayed)


def test_a_trained_teacher_is_a_rule_like_others(finished: Path, tmp_path: Path) -> None:
    settings = (
        *SMALL,
        "tasks.tasks=[{name: count, source: count, levels: 2}]",
        "tasks.rule=learned",
        f"tasks.policy={tmp_path / 'taught'}",
        "update.steps=2",
    )
    shutil.copytree(finished / "teacher", tmp_path / "taught")
    folder = tmp_path / "run"
    assert main(command(*settings, preset="tasks", out=folder)) == 0
    assert list(json.loads((folder / "result.json").read_text())["arms"]) == ["learned", "uniform"]
    shutil.rmtree(tmp_path / "taught")  # the run has a copy of its own, which is sealed
    config = load_config(CurriculumConfig, file=folder / "config.yaml")
    replayed = list(verify(config, folder, SERVICES))
    assert any(abs(entry.recorded - 0.5) > 1e-6 for entry in replayed if entry.where.startswith("learned"))
    assert all(entry.recorded == entry.recomputed for entry in replayed)
    assert seal_faults(folder) == []
    (folder / "teacher/teacher.json").write_text("{}")
    assert any("teacher.json" in fault for fault in seal_faults(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("tasks.tasks=[{name: c, source: coin, levels: 1}]",), "must hold a task that can be learned, got coin alone"),
        (("tasks.rule=learned",), "`tasks.policy` and the rule learned need each other"),
        (("tasks.settings={treshold: 0.5}",), "has no option 'treshold' (did you mean 'threshold'?)"),
        (("tasks.controls=[uniform, learned]", "tasks.policy=x"), "cannot hold learned while a teacher is trained"),
        (("amortised.steps=1", "amortised.unseen=[]"), "`amortised.unseen` needs at least"),
        (("amortised.steps=1", "ppo.generator=transformers"), "`ppo.generator` must be own"),
        (
            ("amortised.steps=1", "amortised.unseen=[{name: reverse, source: copy}, {name: sort, source: sort}]"),
            "`amortised.unseen` must hold other tasks than `tasks.tasks`, got 'reverse' in both",
        ),
    ],
)
def test_what_does_not_go_together(
    settings: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(*settings, preset="teacher", out=tmp_path / "run")) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_claims_over_seeds_in_one_family() -> None:
    def record(rule: str, seed: int, item: str, success: float) -> dict[str, Any]:
        zeros = {"last_success": 0.5, "groups_that_teach": 0.2, "rollout_tokens": 100}
        return {"arm": rule, "item": item, "split": "held_out", "seed": seed, "mean_success": success, **zeros}

    noise = random.Random(0)
    records = [
        record(rule, seed, item, 0.3 + gain + noise.gauss(0, 0.01))
        for rule, gain in (("learned", 0.2), ("uniform", 0.0), ("frontier_range", 0.2))
        for seed in range(8)
        for item in ("a", "bb", "ccc")
    ]
    judged = judged_result(records, config={}, seeds=range(8))
    assert judged["comparisons"][0]["baseline"] == "uniform"
    # Sets share tasks: they are one item, so that what is claimed is of these sets, over seeds.
    assert {c["num_items"] for c in judged["comparisons"]} == {1}
    assert {record["item"] for record in judged["paired_records"]} == {"all unseen sets"}
    verdict = judged["verdict"]
    assert verdict.startswith("The learned teacher beats uniform by 0.")
    assert "frontier range" in verdict
    assert "not to be told from chance" in verdict.split("frontier range")[1]
