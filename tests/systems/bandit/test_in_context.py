"""Mode ``in-context`` from the command line: what it learns, where it goes on, what moves nothing, what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.cli import main
from preceptor.config import from_dict, to_dict
from preceptor.runs.folder import Run, create_run
from preceptor.systems.bandit import SYSTEM, in_context
from preceptor.systems.bandit.config import BanditConfig, InContextOptions
from preceptor.systems.bandit.environment import BanditFamily
from preceptor.systems.bandit.in_context import sampled_tables, shown_tables, statistics_before
from preceptor.systems.bandit.setup import prepare_in_context
from preceptor.systems.bandit.state import InContextState
from tests.systems.bandit.test_loop import result, rows

TINY = (
    "model.width=16", "model.num_layers=1", "model.num_heads=2", "model.context_length=128",
    "in_context.rounds=5", "in_context.first_rounds=3", "in_context.batch_size=16", "in_context.steps=6",
    "in_context.evaluation_bandits=80", "in_context.horizons=[1, 2]", "save_every=4",
)  # fmt: skip
WORDS = (
    "in_context.text=words",
    "in_context.words=[bal, ber, din, dor, gan]",
    "in_context.held_out_words=[kal, ken]",
    "in_context.warm_start=thompson",
    "in_context.warm_steps=5",
)


def run(folder: Path, *settings: str) -> int:
    words = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return main(
        ["run", "bandit", "--preset", "in-context", "--out", str(folder), "--threads", "1", "--no-report", *words]
    )


def regret(folder: Path, player: str, metric: str = "regret") -> float:
    return float(result(folder)["arms"][player][metric]["mean"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with words and a warm start."""
    folder = tmp_path_factory.mktemp("in-context") / "run"
    assert run(folder, *WORDS) == 0
    return folder


def test_every_player_is_judged_on_unseen_bandits(trained: Path) -> None:
    curves = result(trained)["regret"]
    assert {"learned", "thompson", "ucb1", "optimal", "greedy", "uniform", "untrained", "warm_start"} <= curves.keys()
    for curve in curves.values():
        assert list(curve) == ["1", "2", "3", "5"]
        for estimate in curve.values():
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
        assert curve["5"]["mean"] >= curve["1"]["mean"] > 0
    # Uniform choice between two uniform means forgoes E|p − q| / 2 = 1/6 a round; 80 bandits.
    assert curves["uniform"]["5"]["mean"] == pytest.approx(5 / 6, abs=0.25)
    assert curves["optimal"]["5"]["mean"] < curves["uniform"]["5"]["mean"]
    metrics = result(trained)["arms"]["learned"]
    assert {
        "regret_2x",
        "regret_low",
        "suffix_failure",
        "greediness",
        "regret_second",
        "carried_place",
    } <= metrics.keys()
    assert "held_out_regret" in metrics, "words that were never trained on"
    ratio = result(trained)["of_thompson"]["regret"]
    assert ratio["mean"] == pytest.approx(regret(trained, "learned") / regret(trained, "thompson"))
    assert ratio["low"] <= ratio["mean"] <= ratio["high"]
    # More regret is worse: the sentence says so.
    relation = "trails" if ratio["mean"] > 1 else "beats"
    assert result(trained)["verdict"].startswith(f"The trained model {relation} thompson by ")


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 5 is the last of the warm start, after which the optimizer changes; step 8 is among the updates on rewards.
    log = Run.log
    for stop in (5, 8):
        folder = tmp_path / f"stopped-{stop}"

        def stopping(self: Run, n: int, row: dict[str, Any], stop: int = stop) -> None:
            log(self, n, row)
            if n == stop:
                self._signals.signal_number = 2  # as Ctrl-C does

        monkeypatch.setattr(Run, "log", stopping)
        assert run(folder, *WORDS) == 130
        monkeypatch.setattr(Run, "log", log)
        assert main(["resume", str(folder), "--no-report"]) == 0
        for name in ("metrics.jsonl", "decisions.jsonl"):
            assert rows(folder, name) == rows(trained, name)
        assert result(folder)["records"] == result(trained)["records"]


def test_the_warm_start_gets_harder_at_its_pace_and_not_beyond_the_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_context, "AGREEMENT", -1.0)  # the model is always good enough
    assert run(tmp_path / "run", *WORDS, "in_context.warm_pace=0.4", "in_context.steps=0") == 0
    difficulties = [row["difficulty"] for row in rows(tmp_path / "run", "metrics.jsonl") if "difficulty" in row]
    assert difficulties == pytest.approx([0.0, 0.4, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("learning_rate", [0.0, 0.01])
def test_at_learning_rate_0_nothing_moves_and_words_are_never_learned(tmp_path: Path, learning_rate: float) -> None:
    config = from_dict(
        BanditConfig,
        {
            "mode": "in-context",
            "model": {"width": 16, "num_layers": 1, "num_heads": 2, "context_length": 128},
            "in_context": {
                "text": "words", "warm_start": "best_arm", "warm_steps": 2, "steps": 2, "rounds": 5, "first_rounds": 3,
                "batch_size": 16, "learning_rate": learning_rate, "warm_learning_rate": learning_rate,
            },
        },
    )  # fmt: skip
    made = create_run(
        tmp_path / "run", system="bandit", config=to_dict(config), seed=0, save_every=9, streams=SYSTEM.streams,
        quiet=True,
    )  # fmt: skip
    with made as opened:
        setup = prepare_in_context(config, opened)
        state = InContextState(setup)
        in_context.learn(setup, state)
    # Words' vectors are drawn anew for every update and never learned: drawing the last ones again changes nothing.
    words = setup.token_vectors[setup.fresh_tokens].clone()
    assert len(words) == len(config.in_context.words) + len(config.in_context.held_out_words)
    # Of width 16: a length of 0.8, all of it in the first four dimensions.
    assert torch.allclose(words.norm(dim=1), torch.full((len(words),), 0.8))
    assert (words[:, :4] != 0).all()
    assert (words[:, 4:] == 0).all()
    in_context.draw_words(setup, 4)
    assert torch.equal(setup.token_vectors[setup.fresh_tokens], words)
    in_context.draw_words(setup, 5)
    assert not torch.equal(setup.token_vectors[setup.fresh_tokens], words)
    # Nothing else moves at 0, everything else does above it.
    begun, ended = (
        {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
        for lm in (setup.initial_model, setup.lm)
    )
    for parameters in (begun, ended):
        parameters["model.embed_tokens.weight"][setup.fresh_tokens] = 0
    moved = [name for name in begun if not torch.equal(begun[name], ended[name])]
    assert len(moved) == (0 if learning_rate == 0 else len(begun))


PLANTED = (
    "in_context.prior=certain", "in_context.steps=40", "in_context.batch_size=64", "in_context.first_rounds=3",
    "in_context.learning_rate=0.01", "in_context.minibatches=1", "in_context.horizons=[1]",
    "in_context.evaluation_bandits=200", "save_every=100",
)  # fmt: skip


def test_a_planted_world_is_solved(tmp_path: Path) -> None:
    # One arm always pays, the other never: the first choice forgoes 1/2 on average, and after it all is known.
    folder = tmp_path / "certain"
    assert run(folder, *PLANTED) == 0
    assert regret(folder, "uniform") == pytest.approx(2.5, abs=0.25)
    assert regret(folder, "thompson") == pytest.approx(0.5, abs=0.1), "knows the prior, and so does what is optimal"
    assert regret(folder, "learned") < 0.7
    assert regret(folder, "learned", "greediness") > 0.9 or regret(folder, "learned", "optimal_share") > 0.85


def test_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "shuffled"
    assert run(folder, *PLANTED, "in_context.shuffle_rewards=true") == 0
    assert regret(folder, "learned") > 2.0


def test_a_flipped_sign_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: a policy that is rewarded for its regret ends worse than chance."""
    monkeypatch.setattr(in_context, "VALUE_SCALE", -in_context.VALUE_SCALE)
    folder = tmp_path / "flipped"
    assert run(folder, *PLANTED) == 0
    assert regret(folder, "learned") > 3.5


def test_reinforce_learns_too(tmp_path: Path) -> None:
    folder = tmp_path / "reinforce"
    assert run(folder, *PLANTED, "in_context.algorithm=reinforce") == 0
    assert regret(folder, "learned") < 1.5


def test_other_families_run(tmp_path: Path) -> None:
    folder = tmp_path / "gaussian"
    settings = ("in_context.kind=gaussian", "in_context.prior=normal", "in_context.num_arms=3", "in_context.steps=2")
    assert run(folder, *settings) == 0
    assert "optimal" not in result(folder)["regret"], "solved for two Bernoulli arms alone"


def test_the_page_of_a_prior_whose_optimal_player_is_unknown_shows_the_others(tmp_path: Path) -> None:
    """The optimal player is solved for the other priors on which such a run is judged, and not for its own."""
    folder = tmp_path / "quarter"
    assert run(folder, "in_context.prior=three_in_four", "in_context.steps=2") == 0
    assert "optimal" not in result(folder)["regret"]
    assert "optimal" in result(folder)["arms"]
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Choices of the best arm" in page


def test_recorded_rewards_are_paid_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trained)]) == 0
    capsys.readouterr()
    path = trained / "decisions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    first["rewards"][1] = 1 - first["rewards"][1]
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n", encoding="utf-8")
    assert main(["replay", str(trained)]) != 0
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_page_shows_curves_and_an_episode(trained: Path) -> None:
    assert main(["report", str(trained)]) == 0
    text = (trained / "report.html").read_text(encoding="utf-8")
    for expected in ("Regret so far", "Choices of the best arm", "An episode, step by step", "optimal player"):
        assert expected in text


def test_counts_before_a_round_by_hand() -> None:
    actions, paid = torch.tensor([[1, 1, 0]]), torch.tensor([[1.0, 0.0, 1.0]])
    sums, counts = statistics_before(actions, paid, 2)
    assert counts[0].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert sums[0].tolist() == [[0, 0], [0, 1], [0, 1]], "the third round's reward comes after its choice"


def test_a_step_has_its_own_bandits() -> None:
    config, family = BanditConfig(seed=3), BanditFamily()
    first, again, second = (sampled_tables(config, family, n, num_episodes=4, num_rounds=3).rewards for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_shuffled_tables_are_the_next_bandits() -> None:
    tables = BanditFamily().sample(3, 2, torch.Generator().manual_seed(0))
    shuffled = shown_tables(BanditConfig(in_context=InContextOptions(shuffle_rewards=True)), tables)
    assert torch.equal(shuffled.rewards[1], tables.rewards[0])
    assert torch.equal(shuffled.expected, tables.expected)
    assert shown_tables(BanditConfig(), tables) is tables


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("in_context.prior=normal", "`in_context.prior` normal is for `in_context.kind` gaussian"),
        ("in_context.warm_steps=3", "`in_context.warm_steps` needs a `in_context.warm_start`"),
        ("in_context.first_rounds=9", "`in_context.first_rounds` must be at most `in_context.rounds` 5"),
        ("in_context.horizons=[1, 50]", "the longest episode takes 251 tokens"),
    ],
)
def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    assert run(tmp_path / "refused", setting) == 2
    assert message in capsys.readouterr().err
