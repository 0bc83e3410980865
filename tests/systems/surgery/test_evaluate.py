from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from preceptor.systems.surgery.evaluate import result, score_text
from preceptor.systems.surgery.rewards import next_token_logits
from tests.systems.surgery.small import small_model

SEEDS = range(10)


def record(
    arm: str, seed: int | None, *, log_prob: float, quality: float = 0.0, accuracy: float = 0.3
) -> dict[str, Any]:
    cell = {"arm": arm, "item": "bees", "split": "held_out", "seed": seed, "log_prob": log_prob, "accuracy": accuracy}
    return cell if seed is None else {**cell, "quality": quality}


def records(*, learned: float, evolution: float, shuffled: float) -> list[dict[str, Any]]:
    """Ten seeds; qualities and log-probabilities of the arms differ by constants plus a little noise of their own."""
    generator = np.random.default_rng(0)

    def jitter() -> float:
        return float(generator.normal(scale=1e-3))

    found = [
        record("unigram", None, log_prob=-3.0, accuracy=0.15),
        record("bigram", None, log_prob=-2.5, accuracy=0.25),
    ]
    found.append(record("trigram", None, log_prob=-2.0, accuracy=0.35))
    for seed in SEEDS:
        noise = 0.001 * (seed % 3)
        found.append(record("no_edit", seed, log_prob=-2.2 + noise, quality=noise, accuracy=0.3 + jitter()))
        for arm, quality in (("learned", learned), ("evolution", evolution), ("shuffled", shuffled)):
            found.append(record(arm, seed, log_prob=-2.2 + noise + quality, quality=quality + jitter()))
        found.append(record("cross_entropy", seed, log_prob=-2.0 + noise, quality=noise, accuracy=0.4))
        found.append(record("joint", seed, log_prob=-2.1 + jitter()))
        found.append(record("training", seed, log_prob=-2.15 + noise))
    return found


def result_of(given: list[dict[str, Any]]) -> dict[str, Any]:
    found = result(given, config={}, seeds=list(SEEDS))
    json.dumps(found)
    return found


def test_the_surgeon_helps_only_above_both_deciding_arms() -> None:
    # To catch: any instead of all.
    assert "The surgeon helps" in result_of(records(learned=0.1, evolution=0.05, shuffled=0.05))["verdict"]
    for qualities in ((0.1, 0.15, 0.05), (0.1, 0.05, 0.15), (0.1, 0.1, 0.05), (-0.1, -0.05, -0.05)):
        measured = dict(zip(("learned", "evolution", "shuffled"), qualities, strict=True))
        verdict = result_of(records(**measured))["verdict"]
        assert "That the surgeon helps cannot be claimed" in verdict


def test_few_seeds_say_nothing_about_the_surgeon() -> None:
    given = [r for r in records(learned=0.1, evolution=0.05, shuffled=0.05) if r["seed"] in (None, 0, 1, 2)]
    assert "cannot be said from 3 seeds" in result(given, config={}, seeds=[0, 1, 2])["verdict"]


def test_the_student_stands_on_the_ladder_where_it_beats_both_figures() -> None:
    verdict = result_of(records(learned=0.1, evolution=0.05, shuffled=0.05))["verdict"]
    assert "the student reaches 2.199 nats per held-out token and 30.0 % accuracy." in verdict
    assert "The student passes the unigram in nats and accuracy. The student passes the bigram in nats and" in verdict
    assert "passes the trigram" not in verdict


def test_the_share_of_the_gap_runs_from_the_unigram() -> None:
    gaps = result_of(records(learned=0.1, evolution=0.05, shuffled=0.05))["gap_to_other_objectives"]["cross_entropy"]
    # nats: (3.0 − 2.2) / (3.0 − 2.0), with noise on both; accuracy: (0.3 − 0.15) / (0.4 − 0.15)
    assert gaps["log_prob_at_equal_tokens"]["mean"] == pytest.approx(0.8, abs=1e-3)
    assert gaps["accuracy_at_equal_flops"]["mean"] == pytest.approx(0.6, abs=5e-3)


def test_the_gap_at_equal_flops_is_that_to_the_run_of_equal_flops() -> None:
    given = records(learned=0.1, evolution=0.05, shuffled=0.05)
    given += [record("cross_entropy_equal_flops", seed, log_prob=-1.4, accuracy=0.65) for seed in SEEDS]
    gaps = result_of(given)["gap_to_other_objectives"]["cross_entropy"]
    # nats: (3.0 − 2.2) / (3.0 − 1.4), noise on the student's; accuracy: (0.3 − 0.15) / (0.65 − 0.15)
    assert gaps["log_prob_at_equal_flops"]["mean"] == pytest.approx(0.5, abs=1e-3)
    assert gaps["accuracy_at_equal_flops"]["mean"] == pytest.approx(0.3, abs=5e-3)
    assert gaps["log_prob_at_equal_tokens"]["mean"] == pytest.approx(0.8, abs=1e-3)


def test_joint_learning_is_compared_with_the_same_training() -> None:
    verdict = result_of(records(learned=0.1, evolution=0.05, shuffled=0.05))["verdict"]
    assert "Learning with surgery is +0.0" in verdict
    assert "from the same training without." in verdict


def test_rungs_of_several_runs_are_one() -> None:
    given = records(learned=0.1, evolution=0.05, shuffled=0.05)
    rungs = [dict(r) for r in given if r["seed"] is None]
    found = result_of([*given, *rungs])
    assert len(found["records"]) == len(given)
    assert found["arms"]["bigram"]["log_prob"]["n"] == 1
    assert found["arms"]["learned"]["quality"]["n"] == 10


def test_a_run_without_controls_has_a_result() -> None:
    given = [r for r in records(learned=0.1, evolution=0.05, shuffled=0.05) if r["arm"] in ("no_edit", "unigram")]
    found = result_of(given)
    assert found["comparisons"] == []
    assert found["verdict"].startswith("By reinforcement alone")


@pytest.mark.parametrize("length", [49, 44, 10])
def test_score_text_predicts_every_token_once(length: int) -> None:
    # To catch: the last, shorter block left out.
    student = small_model()
    tokens = torch.randint(7, (length,), generator=torch.Generator().manual_seed(0))
    nats, hits, entropies = [], 0, []
    for start in range(0, length - 1, 16):
        block = tokens[start : start + 17]
        logits = next_token_logits(student, block[None, :-1]).detach()[0]
        for row, target in zip(logits, block[1:], strict=True):
            log_probs = row.log_softmax(-1)
            nats.append(-log_probs[target].item())
            entropies.append(-(log_probs.exp() * log_probs).sum().item())
            hits += int(row.argmax() == target)
    assert len(nats) == length - 1
    found = score_text(student, tokens, block_size=16)
    assert found.cross_entropy == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found.entropy == pytest.approx(sum(entropies) / len(nats), rel=1e-5)
    assert found.accuracy == hits / len(nats)
