"""The whole system on a tiny student: what a run leaves behind, and that its figures are true."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from preceptor.config import to_dict
from preceptor.runs.folder import Run, create_run
from preceptor.systems.base import Services
from preceptor.systems.surgery import SYSTEM
from preceptor.systems.surgery.config import ARMS, LearningOptions, SurgeryConfig
from preceptor.systems.surgery.evaluate import TABLE, UNITS, score_text
from preceptor.systems.surgery.loop import edit, measure, scheduled_rate, train, update
from preceptor.systems.surgery.rewards import Acceptance
from preceptor.systems.surgery.setup import prepare
from preceptor.systems.surgery.state import State
from tests.systems.surgery.small import CPU, phase_of, small_config, small_state, write_text

SERVICES = Services(cache_dir=Path("nowhere"))


def start(config: SurgeryConfig, folder: Path) -> Run:
    return create_run(
        folder,
        system="surgery",
        config=to_dict(config),
        seed=config.seed,
        save_every=config.save_every,
        streams=SYSTEM.streams,
        device="cpu",
        threads=1,
        quiet=True,
    )


PRETRAINED = {"pretrained", "joint_pretrained"}
"""Methods of runs that are given a surgeon trained before; this run is given none."""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurgeryConfig, dict[str, Any]]:
    """A run of every phase and arm."""
    folder = tmp_path_factory.mktemp("surgery")
    config = small_config(write_text(folder))
    with start(config, folder / "run") as run:
        result = train(config, run, SERVICES)
        run.write_result(result)
    return folder / "run", config, result


def test_every_arm_and_rung_is_measured(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    _, _, result = finished
    assert set(result["arms"]) == {*ARMS, "cross_entropy", "unigram", "bigram", "trigram"} - PRETRAINED
    assert set(TABLE) <= set(UNITS)
    for arm, metrics in result["arms"].items():
        assert -math.log(100) < metrics["log_prob"]["mean"] < 0, arm
        assert 0 <= metrics["accuracy"]["mean"] <= 1
    edited = {
        arm: metrics["model_calls"]["mean"] for arm, metrics in result["arms"].items() if "model_calls" in metrics
    }
    assert {edited[arm] for arm in ("learned", "shuffled", "evolution", "random", "best_of_n")} == {6.0}
    assert edited["joint"] == 9.0
    assert edited["gradient"] == edited["training"] == edited["no_edit"] == 0.0
    tokens = {arm: metrics["tokens"]["mean"] for arm, metrics in result["arms"].items()}
    assert tokens["no_edit"] == tokens["learned"] == tokens["cross_entropy"] == 8 * 4 * 16
    assert tokens["joint"] == tokens["training"] == (8 + 3 * 2) * 4 * 16


def test_the_gradient_arm_costs_what_the_edits_cost_if_all_are_tested(
    finished: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    folder, _, result = finished
    flops = {arm: metrics["gflops"]["mean"] for arm, metrics in result["arms"].items() if "gflops" in metrics}
    spent = {arm: flops[arm] - flops["no_edit"] for arm in ("learned", "gradient")}
    step = flops["no_edit"] / 8
    decisions = [row for row in rows(folder / "decisions.jsonl") if row["arm"] == "learned"]
    num_tested = sum(row["tested"] is not None for row in decisions)
    # One update reads 4 · 16 positions thrice; a test reads 8 · 16 positions twice.
    test = step * (2 * 8 * 16) / (3 * 4 * 16)
    untested = (6 - num_tested) * test
    assert spent["learned"] + untested <= spent["gradient"] < spent["learned"] + untested + step


def test_the_record_of_an_arm_is_what_its_student_knows(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    """The student that the run keeps is that of the third phase, whatever control came after it."""
    folder, config, result = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    score = score_text(model, prepare(config, device=CPU, folder=folder).corpus.held_out, block_size=16)
    assert result["arms"]["joint"]["log_prob"]["mean"] == pytest.approx(-score.cross_entropy, abs=1e-6)
    assert result["arms"]["joint"]["accuracy"]["mean"] == pytest.approx(score.accuracy, abs=1e-9)


def test_each_phase_has_its_figures(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, _, result = finished
    logged = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, len(logged) + 1))
    first = logged[0]
    assert (first["arm"], first["phase"], first["stretch_step"]) == ("no_edit", "bootstrap", 1)
    assert {"loss", "reward", "accuracy", "entropy", "entropy_maximum"} <= first["no_edit"].keys()
    surgery = next(row for row in logged if row["arm"] == "learned" and row["stretch_step"] == 6)["learned"]
    assert {
        "reward", "loss_gain", "action_norm", "action_norm_maximum", "relative_norm", "committed_share",
        "theatre_bytes", "deep_copy_bytes", "evaluation_seconds", "surgeon_entropy", "surgeon_entropy_maximum",
    } <= surgery.keys()  # fmt: skip
    assert 0 < surgery["action_norm"] <= surgery["action_norm_maximum"]
    assert 0 < surgery["theatre_bytes"] < surgery["deep_copy_bytes"]
    joint = next(row for row in logged if row["arm"] == "joint")["joint"]
    assert {"reward", "student_reward", "loss", "surgeon_entropy"} <= joint.keys()
    charted = {column.split(".")[0] for chart in result["charts"] for column in chart["columns"]}
    assert charted - PRETRAINED <= set(result["arms"])


def test_no_arm_moves_the_student_that_others_start_from(
    finished: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    """The first examination of every arm of exclusive surgery is that of the bootstrapped student, bit for bit."""
    folder, _, _ = finished
    firsts = [row for row in rows(folder / "decisions.jsonl") if row["phase"] == "surgery" and row["edit"] == 1]
    assert {row["arm"] for row in firsts} == {"learned", "shuffled", "evolution", "random", "best_of_n"}
    assert len({json.dumps(row["quality_before"]) for row in firsts}) == 1


def test_the_random_arm_matches_norms_step_by_step(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, _, _ = finished
    actions: dict[str, list[list[float]]] = {}
    for row in rows(folder / "decisions.jsonl"):
        if row["phase"] == "surgery":
            actions.setdefault(row["arm"], []).append(row["action"])
    for learned, random in zip(actions["learned"], actions["random"], strict=True):
        assert sorted(map(abs, learned)) == sorted(map(abs, random))
        assert learned != random


def test_what_is_committed_lasts_and_what_is_not_leaves_no_trace(
    finished: tuple[Path, SurgeryConfig, dict[str, Any]],
) -> None:
    folder, _, _ = finished
    decisions = [row for row in rows(folder / "decisions.jsonl") if row["phase"] == "surgery"]
    assert {True, False} <= {row["committed"] for row in decisions}
    for row, following in itertools.pairwise(decisions):
        if row["arm"] == following["arm"]:
            before, after = row["quality_before"]["log_prob"], following["quality_before"]["log_prob"]
            assert (before == after) is not row["committed"]  # the windows are the same, the prompts are not
            if row["committed"] and row["tested"] == row["action"]:
                assert after == row["quality_after"]["log_prob"]
        assert not row["committed"] or (row["acceptance"]["passed"] and row["acceptance"]["gain"] > 0)


def test_committed_edits_are_counted_as_decided(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, _, result = finished
    decisions = rows(folder / "decisions.jsonl")
    logged = [row for row in rows(folder / "metrics.jsonl") if row["arm"] in {d["arm"] for d in decisions}]
    assert len(logged) == len(decisions)
    num_committed: dict[str, int] = {}
    for row, decision in zip(logged, decisions, strict=True):
        arm = decision["arm"]
        num_committed[arm] = num_committed.get(arm, 0) + decision["committed"]
        assert row[arm]["committed"] == num_committed[arm]
        assert row[arm]["committed_share"] == num_committed[arm] / decision["edit"]
    assert any(decision["tested"] and not decision["committed"] for decision in decisions)
    counted = {r["arm"]: r["committed"] for r in result["records"] if "committed" in r}
    assert counted == num_committed


def test_one_seed_claims_nothing(finished: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    _, _, result = finished
    assert "Whether the surgeon helps cannot be said from 1 seed" in result["verdict"]
    assert "By reinforcement alone" in result["verdict"]


def test_the_whole_is_the_same_every_time(finished: tuple[Path, SurgeryConfig, dict[str, Any]], tmp_path: Path) -> None:
    folder, config, result = finished
    torch.manual_seed(99)
    with start(config, tmp_path / "again") as run:
        torch.rand(7)
        again = train(config, run, SERVICES)
    assert again == result
    assert (tmp_path / "again" / "decisions.jsonl").read_bytes() == (folder / "decisions.jsonl").read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        ("controls.arms=[]", "controls.objectives=[]"),
        ("controls.arms=[learned]", "controls.objectives=[distil, avatarl]", "learning.objective=sampled"),
        ("student.architecture=llama", "controls.arms=[evolution]", "edit.kind=low_rank", "edit.layers=[0]"),
        ("data.tokens=bpe", "data.vocab_size=270", "controls.arms=[best_of_n]", "learning.partial_reward=0.5"),
        ("controls.arms=[evolution]", "edit.kind=head_scale", "edit.roles=[output]", "edit.moments=zero"),
    ],
    ids=" ".join,
)
def test_other_configurations_run(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = small_config(write_text(tmp_path), "evaluation.ladder_order=2", "save_every=50", *overrides)
    with start(config, tmp_path / "run") as run:
        result = train(config, run, SERVICES)
    assert "no_edit" in result["arms"]
    assert json.loads(json.dumps(result["verdict"]))


def test_the_learning_rate_ends_where_it_should() -> None:
    learning = LearningOptions(learning_rate=1.0, final_learning_rate=0.1, warm_up_steps=10)
    rates = [scheduled_rate(step, 110, learning) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)  # half the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_methods_of_a_phase_learn_from_the_same_batches(tmp_path: Path) -> None:
    """From the same weights the first update reads the same text: whatever the objective, as much of it is right."""
    state = small_state(tmp_path, "student.width=32")

    def accuracies(method: str) -> list[float]:
        state.student.reset()
        state.phase = phase_of(state, method)
        return [update(state, number, run_step=number)["accuracy"] for number in (1, 2)]

    assert accuracies("no_edit")[0] == accuracies("cross_entropy")[0]
    assert accuracies("joint") == accuracies("training")
    assert accuracies("training") != accuracies("gradient")


def test_every_edit_is_tested_on_text_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New windows at each edit, the same for every method, and none of those whose loss the reward is made of."""
    state = small_state(tmp_path)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for method in ("evolution", "shuffled"):
        state.phase = phase_of(state, method)
        state.surgeon = state.new_surgeon(state.phase)
        assert state.surgeon is not None
        monkeypatch.setattr(state.surgeon, "candidate", lambda action, reward: action)
        for local in (1, 2):

            def test(action: Any, windows: torch.Tensor, key: tuple[str, int] = (method, local)) -> Acceptance:
                seen[key] = windows
                return Acceptance(0.0, 0.0, False)

            monkeypatch.setattr(state.surgery, "test", test)
            edit(state, local, run_step=local)
    assert torch.equal(seen["evolution", 1], seen["shuffled", 1])
    assert torch.equal(seen["evolution", 2], seen["shuffled", 2])
    assert not torch.equal(seen["evolution", 1], seen["evolution", 2])
    rewarded = {tuple(window) for window in state.setup.examiner._windows.tolist()}
    assert seen["evolution", 1].shape == (8, 17)
    assert {tuple(window) for window in seen["evolution", 1].tolist()} != rewarded


def test_the_last_step_is_measured_and_only_bootstrapping_has_a_plateau(tmp_path: Path) -> None:
    notices: list[str] = []
    config = small_config(
        write_text(tmp_path), "evaluation.every=5", "phases.plateau_slope=100", "phases.plateau_window=2"
    )
    state = State(prepare(config, device=CPU, folder=tmp_path, notice=notices.append))
    state.phase = phase_of(state, "cross_entropy")
    for local in (5, 8):
        assert measure(state, local)
    assert notices == []
    assert state.plateau.state_dict() == {"points": [], "step": None}
    state.phase = phase_of(state, "no_edit")
    assert state.phase.num_steps == 8
    assert [bool(measure(state, local)) for local in range(1, 9)] == [False] * 4 + [True] + [False] * 2 + [True]
    assert state.plateau.step == 8  # hardly any loss falls by 100 nats in 100 steps
    assert [notice.partition(":")[0] for notice in notices] == ["a plateau at update 8"]
