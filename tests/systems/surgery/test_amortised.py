"""The whole loop on students of a few thousand weights: what it measures, that it resumes, that it replays."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.errors import ConfigError, Interrupted
from preceptor.report.run_folder import read_run
from preceptor.report.sections import Matrix
from preceptor.runs.folder import Run, open_run
from preceptor.systems.surgery import amortised
from preceptor.systems.surgery.amortised import admit
from preceptor.systems.surgery.config import REPAIRS, SurgeryConfig
from preceptor.systems.surgery.loop import train
from preceptor.systems.surgery.report import sections
from preceptor.systems.surgery.setup import prepare
from preceptor.systems.surgery.site_policy import TrainedSurgeon
from preceptor.systems.surgery.verify import verify
from tests.systems.surgery.small import CPU, small_config, write_text
from tests.systems.surgery.test_loop import SERVICES, start

AMORTISED = (
    "training=amortised", "learning.objective=cross_entropy", "controls.objectives=[]", "edit.kind=head_scale",
    "edit.roles=[output]", "agent.discount=0", "agent.random_edits=4", "amortised.steps=3",
    "amortised.damages_per_step=2", "amortised.updates_per_step=2", "amortised.edits_per_damage=2",
    "amortised.num_students=2", "amortised.sizes=[1x2x16, 2x2x16]", "amortised.unseen_sizes=[1x2x16, 1x4x16]",
    "amortised.unseen_damages=[wiped_head]", "amortised.patients=2", "amortised.sac_patients=1",
    "amortised.search_evaluations=10", "amortised.test_windows=4", "amortised.search_windows=2",
    "amortised.probe_windows=2",
)  # fmt: skip
METHODS = tuple(method for method in REPAIRS if method != "cma_es")  # its package is an extra
TIMING = "peak_memory_mib"


def config_of(folder: Path, *overrides: str) -> SurgeryConfig:
    repairs = f"amortised.repairs=[{', '.join(METHODS)}]"
    return small_config(write_text(folder), *AMORTISED, repairs, *overrides)


def trained(config: SurgeryConfig, folder: Path) -> tuple[Path, SurgeryConfig, dict[str, Any]]:
    """The folder of a run that went through, its configuration, and its result."""
    with start(config, folder / "run") as run:
        return folder / "run", config, train(config, run, SERVICES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurgeryConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("amortised")
    return trained(config_of(folder), folder)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != TIMING} for row in rows(folder, "metrics.jsonl")]


def test_what_is_known_holds_exactly(whole: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    _, _, result = whole
    for item, repair in result["repair_by_item"].items():
        assert repair["inverse"]["1"]["mean"] == pytest.approx(1.0, abs=1e-3), item
        assert repair["no_edit"]["1"]["mean"] == 0.0, item
        assert set(repair) == set(METHODS), item
        assert list(repair["amortised"]) == ["1", "2", "3"]
        assert list(repair["evolution"]) == ["1", "2", "3", "10"]
    items = ["unseen_0_1x2x16/head_scale", "unseen_1_1x4x16/head_scale", "unseen_0_1x2x16/wiped_head"]
    assert list(result["repair_by_item"]) == items
    # Only the unseen student whose size was trained on, under the damage that was trained on, is in the main table.
    assert result["repair"]["amortised"] == result["repair_by_item"][items[0]]["amortised"]
    assert "nothing yet" in result["verdict"]


def test_both_learners_meet_the_same_damage(whole: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, config, _ = whole
    decisions = [row for row in rows(folder, "decisions.jsonl") if "item" not in row]
    options = config.amortised
    assert len(decisions) == options.steps * options.damages_per_step * options.edits_per_damage * 2
    first = [row for row in decisions if row["edit"] == 0]
    for learned, shuffled in zip(first[::2], first[1::2], strict=True):
        assert (learned["arm"], shuffled["arm"]) == ("amortised", "shuffled")
        assert learned["loss_before"] == shuffled["loss_before"]
    assert {len(row["action"]) for row in decisions} == {2, 4}  # students with one and two layers of two heads


def test_shuffled_rewards_say_nothing_of_the_edit_nor_of_how_well_the_policy_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[list[float]]] = {"amortised": [], "shuffled": []}
    earned: list[list[float]] = []
    learn_from = amortised.learn_from

    def listening(setup: Any, ward: Any, agent: Any, seen: Any, rewards: list[float], *, n: int) -> dict[str, float]:
        name = ("amortised", "shuffled")[len(told["shuffled"]) < len(told["amortised"])]
        told[name].append(list(rewards))
        if name == "shuffled":
            earned.append([reward for _, _, reward in seen])
        return learn_from(setup, ward, agent, seen, rewards, n=n)

    monkeypatch.setattr(amortised, "learn_from", listening)
    config = config_of(tmp_path, "amortised.patients=1", "amortised.repairs=[no_edit, amortised]")
    with start(config, tmp_path / "run") as run:
        train(config, run, SERVICES)
    assert told["shuffled"][0] == [0.0] * 4
    for before, rewards in zip(earned, told["shuffled"][1:], strict=False):
        mean = sum(before) / len(before)
        assert rewards == pytest.approx([reward - mean for reward in before])
        assert sum(rewards) == pytest.approx(0.0, abs=1e-9)
        assert max(rewards) > 0.0
    assert any(abs(sum(rewards)) > 1e-6 for rewards in told["amortised"])


@pytest.mark.parametrize("learner", ["sac", "ppo"])
def test_a_stop_leaves_no_trace(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: str
) -> None:
    folder, config, result = whole
    if learner == "ppo":
        folder, config = tmp_path / "whole", config_of(tmp_path, "amortised.learner=ppo")
        with start(config, folder) as run:
            result = train(config, run, SERVICES)
    log = Run.log

    def logging(run: Run, at: int, row: Mapping[str, Any]) -> None:
        if at in (2, 4):  # in training, and among the repairs
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, at, row)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logging)
        with start(config, tmp_path / "run") as run, pytest.raises(Interrupted):
            train(config, run, SERVICES)
        with open_run(tmp_path / "run", quiet=True, threads=1) as run, pytest.raises(Interrupted):
            train(config, run, SERVICES)
    with open_run(tmp_path / "run", quiet=True, threads=1) as run:
        assert train(config, run, SERVICES) == result
    assert metrics(tmp_path / "run") == metrics(folder)
    for name in ("decisions.jsonl", "surgeon/surgeon.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_every_reward_is_earned_again_and_a_changed_action_is_found(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], tmp_path: Path
) -> None:
    folder, config, _ = whole
    replayed = list(verify(config, folder, SERVICES))
    options = config.amortised
    assert len(replayed) == 2 * 2 * options.steps * options.damages_per_step * options.edits_per_damage
    # The loss before is the mean over tokens at training and over windows here: equal but for float32 rounding.
    assert all(abs(row.recorded - row.recomputed) < 1e-5 for row in replayed)
    changed = rows(folder, "decisions.jsonl")
    changed[0]["action"][0] = -changed[0]["action"][0]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    os.symlink(folder / "students", tmp_path / "students")
    assert any(abs(row.recorded - row.recomputed) > 1e-5 for row in verify(config, tmp_path, SERVICES))


def test_the_surgeon_is_saved_and_acts_on_other_models(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    folder, config, _ = whole
    surgeon = TrainedSurgeon.load(folder)
    patient = admit(prepare(config, device=CPU, folder=folder)).unseen[1]
    features, _ = patient.sites.features(patient.windows(2, torch.Generator().manual_seed(0)))
    action = surgeon.act(features)
    assert action.shape == (4,)
    assert bool((action.abs() < 1).all())


def test_the_page_shows_damage_and_what_was_left_site_by_site(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    folder, _, result = whole
    section = sections(read_run(folder))[0]
    assert len(section.figures) == len(result["repair_by_item"])
    (first, *_) = section.figures
    assert isinstance(first, Matrix)
    assert first.rows == ["layer 0 output head 1", "layer 0 output head 2"]
    assert list(first.columns) == ["after damage", "after edit 1", "after edit 2", "after edit 3"]
    # What an edit did is the difference of two columns: at most the largest factor of an edit.
    for row in first.values:
        assert all(abs(b - a) <= math.log(6) + 1e-5 for a, b in pairwise(row) if a is not None and b is not None)
    assert any(abs(row[0] or 0.0) > 0.1 for row in first.values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("amortised.sizes=[2x3x16]", "LAYERSxHEADSxWIDTH"),
        ("amortised.unseen_sizes=[big]", "got big"),
        ("amortised.damages=[]", "name at least one"),
        ("amortised.sizes=[]", "give at least one"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, override)
