"""The bandit from the command line: what a run leaves, what moves, where it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.cli import main
from preceptor.runs.folder import Run
from preceptor.systems.bandit import evaluate, history

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


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` or ``initial_model`` in the newest checkpoint."""
    saved = load_file(newest(folder) / f"{name}.safetensors")
    return {key.removeprefix(f"{name}."): tensor for key, tensor in saved.items()}


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


def test_the_share_of_the_best_words_pulls_is_that_of_the_decisions(whole: Path) -> None:
    decisions = rows(whole, "decisions.jsonl")
    for record in result(whole)["records"]:
        if record["arm"] == "learned" and "optimal_share" in record:
            own = [row["word"] for row in decisions if row["bandit"] == record["item"]]
            best = record["item"].split("/")[0]  # bean and lentil pay more
            assert record["optimal_share"] == pytest.approx(own.count(best) / len(own))


def test_whether_the_model_is_balanced_before_the_first_reward_is_said_of_each_bandits_own_best_word(
    whole: Path,
) -> None:
    (said,) = [line for line in (whole / "notices.log").read_text().splitlines() if "before the first reward: " in line]
    for best, bandit in (("bean", "bean/chickpea"), ("lentil", "lentil/rice")):
        assert f"{bandit} (training templates): P({best}) " in said
        assert f"{bandit} (held-out templates): P({best}) " in said


def test_the_loss_of_held_out_lines_is_measured_now_and_then_and_at_the_end(whole: Path, tmp_path: Path) -> None:
    assert [row["step"] for row in rows(whole) if "validation_loss" in row] == [3, 6]
    assert run(tmp_path / "other", "pretraining.validate_every=4", "update.epochs=1") == 0
    assert [row["step"] for row in rows(tmp_path / "other") if "validation_loss" in row] == [4, 6]


def test_history_is_played_by_the_model_before_and_after_beside_every_baseline(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *HISTORY) == 0
    calls = {
        (r["arm"], r["split"]): r["model_calls"] for r in result(tmp_path / "run")["records"] if "model_calls" in r
    }
    for arm in ("learned", "pretrained"):
        assert calls[arm, "train"] == calls[arm, "held_out"] == 3  # rounds
    assert calls["thompson", "train"] == calls["uniform", "train"] == 0


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
    tensors, before = (weights(tmp_path / "run", name) for name in ("model", "initial_model"))
    assert tensors.keys() == before.keys()
    assert all(tensors[name].equal(before[name]) for name in tensors)


def test_every_weight_moves(whole: Path) -> None:
    tensors, before = (weights(whole, name) for name in ("model", "initial_model"))
    assert tensors.keys() == before.keys()
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


MODES = pytest.mark.parametrize("settings", [("update.dropout=true",), HISTORY], ids=["prompt", "history"])


def assert_same(folder: Path, whole: Path) -> None:
    """The rows, the result and every tensor of the last checkpoint are equal to the last bit."""
    for name in ("metrics.jsonl", "decisions.jsonl"):
        assert rows(folder, name) == rows(whole, name)
    assert result(folder) == result(whole)
    files = sorted(path.name for path in newest(whole).glob("*.safetensors"))
    assert files == ["initial_model.safetensors", "model.safetensors", "optimizer.safetensors"]
    for name in files:
        ours, theirs = (load_file(newest(run_) / name) for run_ in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


@MODES
@pytest.mark.parametrize("stop_at", [3, 6, 9])  # in pretraining, at its last step, in the middle of an epoch
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], stop_at: int
) -> None:
    assert run(tmp_path / "whole", *settings) == 0
    log = Run.log

    def log_and_stop(self: Run, step: int, row: dict[str, Any]) -> None:
        log(self, step, row)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        assert run(tmp_path / "part", *settings) == 143
    assert rows(tmp_path / "part")[-1]["step"] == stop_at
    assert newest(tmp_path / "part").name == f"step-{stop_at:06d}"
    assert main(["resume", str(tmp_path / "part"), "--no-report"]) == 0
    assert_same(tmp_path / "part", tmp_path / "whole")


class Crash(RuntimeError):
    pass


@MODES
@pytest.mark.parametrize("crash_at", [3, 6, 7, 10])  # the checkpoints are of steps 4, 6 (the last of a phase) and 8
def test_steps_after_the_last_checkpoint_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], crash_at: int
) -> None:
    assert run(tmp_path / "whole", *settings) == 0
    log = Run.log

    def log_and_crash(self: Run, step: int, row: dict[str, Any]) -> None:
        log(self, step, row)
        if step == crash_at:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_crash)
        assert run(tmp_path / "part", *settings) == 1
    assert rows(tmp_path / "part")[-1]["step"] == crash_at
    assert main(["resume", str(tmp_path / "part"), "--no-report"]) == 0
    assert_same(tmp_path / "part", tmp_path / "whole")


@MODES
def test_a_run_stopped_during_the_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    assert run(tmp_path / "whole", *settings) == 0
    stopped = []

    def stop_after(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            stopped.append(os.kill(os.getpid(), signal.SIGTERM)) if not stopped else None
            return value

        return call

    with monkeypatch.context() as patch:
        # The first bandit's baselines have drawn from their stream by then; a resume must draw the same again.
        patch.setattr(evaluate.baselines, "play_all", stop_after(evaluate.baselines.play_all))
        assert history.baselines is evaluate.baselines
        assert run(tmp_path / "part", *settings) == 143
    assert not (tmp_path / "part" / "result.json").exists()
    assert main(["resume", str(tmp_path / "part"), "--no-report"]) == 0
    assert_same(tmp_path / "part", tmp_path / "whole")


# ---- what was learned comes out --------------------------------------------------------------------------------------


def test_transformers_loads_the_trained_model(whole: Path) -> None:
    """The mean probability of the best word in its training prompts, from the model folder and Transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    record = next(
        r
        for r in result(whole)["records"]
        if (r["arm"], r["item"], r["split"]) == ("learned", "bean/chickpea", "train")
    )
    prompts = sorted({row["prompt"] for row in rows(whole, "decisions.jsonl") if row["bandit"] == "bean/chickpea"})
    p_best = [softmax_of(model, tokenizer, prompt, ("bean", "chickpea"))[0] for prompt in prompts]
    assert len(p_best) == 6
    assert sum(p_best) / 6 == pytest.approx(record["best_word"], abs=1e-5)


def softmax_of(model: Any, tokenizer: Any, prompt: str, words: tuple[str, ...]) -> list[float]:
    """The probability of each word among ``words``, each encoded alone after the prompt."""
    scores = []
    for word in words:
        context = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        option = tokenizer.encode(f" {word}", add_special_tokens=False)
        with torch.no_grad():
            log_probs = model(torch.tensor([[*context, *option]])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[len(context) - 1 + at, token]) for at, token in enumerate(option)))
    probabilities: list[float] = torch.tensor(scores).softmax(0).tolist()
    return probabilities


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("bandits=[{words: [bean, beanstalk], success: [1, 0]}]", "cannot be told apart"),
        ("bandits=[{words: [bean, rice], success: [1, 2]}]", "`bandits[0].success[1]` must lie in [0, 1], got 2"),
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
