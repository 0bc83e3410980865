"""The bandit from the command line: what a run leaves, what moves, where it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from preceptor.cli import main
from preceptor.config import from_dict
from preceptor.run.folder import Run
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.replay import replay

TINY = (
    "model.width=16", "model.num_layers=1", "model.num_heads=2", "pretraining.steps=6", "pretraining.batch_size=2",
    "pretraining.validate_every=3", "update.epochs=3", "update.batch_size=5", "save_every=4",
    "prompts.templates=['Pick {options}:', '{options}? I take', 'Say {options}:']",
    "prompts.held_out=['Now {options}:']",
)  # fmt: skip
HISTORY = (
    "mode=history",
    "history.rounds=3",
    "history.batch_size=4",
    "history.steps=5",
    "history.evaluation_episodes=4",
)
CLOCK = {"seconds", "peak_memory_mib"}


def run(folder: Path, *settings: str) -> int:
    words = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return main(["run", "bandit", "--out", str(folder), "--threads", "1", "--no-report", *words])


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return loaded


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bandit") / "whole"
    assert run(folder, "update.dropout=true", "update.kl_coefficient=0.1") == 0
    return folder


def test_a_run_leaves_everything(whole: Path) -> None:
    steps = rows(whole)
    # Six prompts a bandit in batches of five: two batches a bandit, four steps an epoch.
    assert [row["step"] for row in steps] == list(range(1, 6 + 3 * 4 + 1))
    learning = steps[6:]
    assert [row["epoch"] for row in learning] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["bandit"] for row in learning[:4]] == ["bean/chickpea", "lentil/rice"] * 2
    assert all(0 <= row["entropy"] <= 1 + 1e-6 and row["kl"] >= 0 for row in learning)
    decisions = rows(whole, "decisions.jsonl")
    assert len(decisions) == 2 * 6 * 3
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in decisions)
    assert all(row["word"] in row["words"] and row["word"] in row["prompt"] for row in decisions)
    arms = result(whole)["arms"]
    assert {"learned", "pretrained", "uniform", "greedy", "ucb1", "thompson", "gradient_bandit", "optimum"} == set(arms)
    assert arms["optimum"]["regret"]["mean"] == 0
    assert len(result(whole)["crossing"]) == 4 * 2 * 2  # pairs, models, splits
    assert "crossed pairs" in result(whole)["verdict"]
    assert (whole / "pretrained" / "config.json").is_file()


def test_every_epoch_plays_every_prompt_once(whole: Path) -> None:
    decisions = rows(whole, "decisions.jsonl")
    for bandit in ("bean/chickpea", "lentil/rice"):
        own = [row for row in decisions if row["bandit"] == bandit]
        assert [row["pull"] for row in own] == list(range(18))
        for epoch in range(3):
            assert len({row["prompt"] for row in own[6 * epoch : 6 * epoch + 6]}) == 6


def test_the_same_seed_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "again", "update.dropout=true", "update.kl_coefficient=0.1") == 0
    assert rows(tmp_path / "again") == rows(whole)
    assert result(tmp_path / "again")["records"] == result(whole)["records"]
    assert run(tmp_path / "other", "update.dropout=true", "update.kl_coefficient=0.1", "seed=1") == 0
    assert rows(tmp_path / "other") != rows(whole)


@pytest.mark.parametrize("settings", [(), HISTORY], ids=["prompt", "history"])
def test_a_learning_rate_of_zero_leaves_every_weight(tmp_path: Path, settings: tuple[str, ...]) -> None:
    assert run(tmp_path / "run", "update.learning_rate=0", *settings) == 0
    tensors = load_file(newest(tmp_path / "run") / "model.safetensors")
    before = load_file(newest(tmp_path / "run") / "pretrained.safetensors")
    assert tensors.keys() == before.keys()
    assert all(tensors[name].equal(before[name]) for name in tensors)


def test_every_weight_moves(whole: Path) -> None:
    tensors, before = (load_file(newest(whole) / f"{name}.safetensors") for name in ("model", "pretrained"))
    unmoved = [name for name in tensors if tensors[name].equal(before[name])]
    assert unmoved == []


def test_the_model_before_the_first_reward_is_kept_and_can_be_started_from(whole: Path, tmp_path: Path) -> None:
    settings = (f"model.name={whole / 'pretrained'}", "pretraining.steps=0", "update.epochs=1")
    assert run(tmp_path / "run", *settings) == 0
    ours, theirs = (
        {(r["item"], r["split"]): r["best_word"] for r in result(folder)["records"]
         if r["arm"] == "pretrained" and "best_word" in r}
        for folder in (tmp_path / "run", whole)
    )  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("baseline", ["none", "running_mean", "bandit_mean"])
def test_each_baseline_runs(tmp_path: Path, baseline: str) -> None:
    assert run(tmp_path / "run", f"update.baseline={baseline}", "pretraining.steps=1", "update.epochs=1") == 0


def test_gaussian_arms_and_three_words(tmp_path: Path) -> None:
    bandits = "bandits=[{words: [red, green, blue], kind: gaussian, mean: [0, 1, 2], deviation: 0.5}]"
    assert run(tmp_path / "run", bandits, "pretraining.steps=1", "update.epochs=1") == 0
    assert result(tmp_path / "run")["crossing"] == []
    assert len(rows(tmp_path / "run", "decisions.jsonl")) == 9  # three templates, three rotations


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [("update.dropout=true",), HISTORY], ids=["prompt", "history"])
@pytest.mark.parametrize("stop_at", [3, 6, 9])  # in pretraining, between the phases, in the middle of an epoch
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], stop_at: int
) -> None:
    """Steps after the last checkpoint are lost and taken again; ends that were asked for save first."""
    assert run(tmp_path / "whole", *settings) == 0
    original = Run.log

    def interrupted(self: Run, step: int, row: dict[str, Any]) -> None:
        original(self, step, row)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.stop_requested:
                time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        assert run(tmp_path / "part", *settings) == 143
    assert rows(tmp_path / "part")[-1]["step"] == stop_at
    assert main(["resume", str(tmp_path / "part"), "--no-report"]) == 0
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    assert rows(tmp_path / "part", "decisions.jsonl") == rows(tmp_path / "whole", "decisions.jsonl")
    assert result(tmp_path / "part") == result(tmp_path / "whole")
    for name in ("model", "optimiser", "pretrained"):
        ours, theirs = (load_file(newest(tmp_path / run_) / f"{name}.safetensors") for run_ in ("part", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), HISTORY], ids=["prompt", "history"])
def test_recorded_words_are_paid_again_and_a_changed_one_is_found(tmp_path: Path, settings: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    assert run(folder, *settings) == 0
    config = from_dict(BanditConfig, json.loads((folder / "manifest.json").read_text())["config"])
    replayed = list(replay(config, folder))
    assert len(replayed) == (36 if not settings else 5 * 4 * 3)
    assert all(entry.recorded == entry.recomputed for entry in replayed)
    path = folder / "decisions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    if settings:
        row["rewards"][0] += 1.0
    else:
        row["reward"] += 1.0
    path.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n", encoding="utf-8")
    assert sum(entry.recorded != entry.recomputed for entry in replay(config, folder)) == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("bandits=[{words: [bean, beanstalk], success: [1, 0]}]", "cannot be told apart"),
        ("bandits=[{words: [bean, rice], success: [1, 2]}]", "success` must lie in [0, 1], got 2"),
        ("model.context_length=16", "shorten `prompts.templates`"),
        ("model.tokenizer=nowhere/at/all", "does not exist"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    extra = ("pretraining.window=8",) if "context" in setting else ()
    long = "prompts.templates=['What, of all things in the world that there are, would you choose of {options}:']"
    assert run(tmp_path / "run", setting, *extra, *((long,) if "context" in setting else ())) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
