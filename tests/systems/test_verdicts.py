"""What the verdicts of all systems say: how they begin, and how often they claim what is not there, over made records.

A thousand sweeps are drawn for each system in which nothing differs but by chance, and a thousand in which its own arm
is one standard deviation (of a paired difference) better. Both texts are read, that of the system's own result and that
of ``comparison.json``, which the page of a sweep shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.api import compared
from preceptor.comparison import result as comparison_result
from preceptor.comparison.result import comparison_of, merged_result
from preceptor.comparison.runs import FinishedRun, Group, read_finished
from preceptor.evaluation import summary
from preceptor.evaluation.intervals import Interval
from preceptor.systems.bandit.result import result as bandit_result
from preceptor.systems.curriculum.result import MACRO
from preceptor.systems.curriculum.result import result as curriculum_result
from preceptor.systems.reading.evaluate import result as reading_result
from preceptor.systems.surgery.evaluate import result as surgery_result

Records = list[dict[str, Any]]
Draw = Callable[..., Records]

CLAIMS = (
    r"^[^.;]*(?:\.\d+[^.;]*)* (?:beats|trails) (?:[^;]|;(?! (?:one|\d+) seeds?))* over \d+ seeds\.",
    r" is [-\d.e]+ [^;]*? (?:above|below) ",
    r"passes the (?!.*no rung)",
    r"The surgeon helps:",
    r"Learning with surgery is [-+][^;]*?without\.",
    r"explains? most",
    r"is query text;",
    r"which is order\.",
)
"""What a sentence that claims looks like."""


def claims_something(text: str) -> bool:
    """Whether a verdict claims any difference at all."""
    if any(re.search(pattern, text) for pattern in CLAIMS):
        return True
    # The curriculum lists its differences and marks those that chance could have made.
    listings = re.findall(r"(?:nats per token|frozen policy|adds to that fall): ([^:]*?)\.(?= [A-Z]|$)", text)
    enough = "no difference can be claimed, for that takes at least" not in text
    return enough and any("not to be told from chance" not in item for text in listings for item in text.split("; "))


def noise(generator: np.random.Generator) -> float:
    """Of one arm, such that a difference of two arms has a standard deviation of 1."""
    return float(generator.normal(scale=np.sqrt(0.5)))


def reading(
    generator: np.random.Generator, num_seeds: int, effect: float, articles: Sequence[str] = ("bees",)
) -> Records:
    records = []
    for seed, article in product(range(num_seeds), articles):
        for arm in ("learned", "random", "untrained", "beam"):
            shift = effect * (arm == "learned") + 5 * (arm == "beam")
            reward, text = noise(generator) + shift, noise(generator)
            records.append({
                "arm": arm, "item": article, "split": "train", "seed": seed, "reward": reward, "order_gain": reward,
                "order_gain_with_queries": reward + text,
            })  # fmt: skip
    return records


def bandit(generator: np.random.Generator, num_seeds: int, effect: float) -> Records:
    records = []
    for seed in range(num_seeds):
        for arm in ("learned", "pretrained", "uniform", "thompson"):
            records.append({
                "arm": arm, "item": "bean/rice", "split": "train", "seed": seed,
                **{metric: noise(generator) + effect * (arm == "learned")
                   for metric in ("best_word", "reward", "optimal_share")},
            })  # fmt: skip
        for pair in range(4):
            records.append({
                "arm": "learned", "item": f"a{pair} / b{pair}", "split": "train", "seed": seed,
                "first_word": float(generator.uniform(0.1, 0.9)), "first_word_named_first": 0.5,
                "first_word_named_second": 0.5, "template_spread": 0.1,
                **{name: float(generator.random() < 0.3) for name in ("value", "winner", "prompt")},
            })  # fmt: skip
    return records


def curriculum(generator: np.random.Generator, num_seeds: int, effect: float) -> Records:
    rules, own = ("learning_progress", "exp3", "ado", "uniform", "static_a"), "learning_progress+ppo"
    records = []
    for seed in range(num_seeds):
        for arm in (own, *rules, "frozen_policy"):
            shift = effect * (arm == own)
            metrics = {"loss_fall": noise(generator) + shift, "loss_auc": noise(generator) - shift}
            if arm in (own, "frozen_policy"):
                metrics |= {name: noise(generator) + shift for name in ("reward", "repetition", "overlap")}
            records.append({"arm": arm, "item": MACRO, "split": "held_out", "seed": seed, **metrics})
    return records


def surgery(generator: np.random.Generator, num_seeds: int, effect: float) -> Records:
    def record(arm: str, seed: int | None, **metrics: float) -> dict[str, Any]:
        return {"arm": arm, "item": "bees", "split": "held_out", "seed": seed, **metrics}

    records = [record(rung, None, log_prob=0.0, accuracy=0.0) for rung in ("unigram", "bigram", "trigram")]
    for seed in range(num_seeds):
        for arm in ("learned", "no_edit", "shuffled", "evolution", "random", "joint", "training"):
            metrics = {
                name: noise(generator) + effect * (arm in ("learned", "joint")) for name in ("quality", "log_prob")
            }
            records.append(record(arm, seed, accuracy=noise(generator), **metrics))
    return records


SYSTEMS: dict[str, tuple[Draw, Callable[..., dict[str, Any]]]] = {
    "reading": (reading, reading_result),
    "bandit": (bandit, bandit_result),
    "curriculum": (curriculum, curriculum_result),
    "surgery": (surgery, surgery_result),
}


def verdicts(records: Records, make_result: Callable[..., dict[str, Any]], system: str) -> tuple[str, str]:
    """That of the system, and that of ``comparison.json``."""
    seeds = sorted({record["seed"] for record in records} - {None})
    own = make_result(records, config={}, seeds=seeds)["verdict"]
    runs = [FinishedRun(Path(f"seed{seed}"), system, {}, seed, "c0ffee", {}, [], None) for seed in seeds]
    runs[0] = runs[0]._replace(records=records)
    groups = [Group("", runs)]
    noun = "article" if system == "reading" else ""
    return own, comparison_of(groups, merged_result(groups, make_result), noun=noun)["verdict"]


@pytest.fixture
def without_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims rest on p-values; intervals, which cost a thousand times as much, are made up."""
    monkeypatch.setattr(summary, "paired_bootstrap", lambda *args, **options: Interval(-1.0, 1.0))
    monkeypatch.setattr(summary, "crossed_sums", lambda *grids, **options: np.ones((len(grids), 40)))
    monkeypatch.setattr(comparison_result, "improvement", lambda *args, **options: {})
    monkeypatch.setattr(comparison_result, "aggregate", lambda *args, **options: {})


def shares_claiming(
    system: str, *, num_sweeps: int, num_seeds: int, effect: float, **options: Any
) -> tuple[float, float]:
    """Of the system's own texts, and of those of ``comparison.json``."""
    draw, make_result = SYSTEMS[system]
    generator = np.random.default_rng(7)
    texts = [verdicts(draw(generator, num_seeds, effect, **options), make_result, system) for _ in range(num_sweeps)]
    own, compared = zip(*texts, strict=True)
    return sum(map(claims_something, own)) / num_sweeps, sum(map(claims_something, compared)) / num_sweeps


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("num_sweeps", "most"),
    [
        (120, 13 / 120),  # 6 expected at most, standard error 2.4
        # Holm's bound is 5 % whatever the correlations, nearly reached by t-tests of four degrees of freedom; twice the
        # standard error of a share of 1,000 is 1.4 points.
        pytest.param(1_000, 0.064, marks=pytest.mark.slow),
    ],
)
def test_of_sweeps_in_which_nothing_differs_one_in_twenty_claims_something(
    system: str, num_sweeps: int, most: float, without_intervals: None
) -> None:
    shares = shares_claiming(system, num_sweeps=num_sweeps, num_seeds=5, effect=0.0)
    assert max(shares) <= most


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("num_sweeps", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_an_effect_of_one_standard_deviation_is_found_over_ten_seeds(
    system: str, num_sweeps: int, without_intervals: None
) -> None:
    """In the text that a sweep shows. A sweep of reading is over several articles; one alone finds it in 72 %."""
    options = {"articles": ("bees", "ants", "wasps", "moths", "flies")} if system == "reading" else {}
    assert shares_claiming(system, num_sweeps=num_sweeps, num_seeds=10, effect=1.0, **options)[1] >= 0.8


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("num_seeds", [1, 4])
def test_nothing_is_claimed_from_few_seeds(system: str, num_seeds: int, without_intervals: None) -> None:
    draw, make_result = SYSTEMS[system]
    for effect in (0.0, 50.0, -50.0):
        for text in verdicts(draw(np.random.default_rng(3), num_seeds, effect), make_result, system):
            assert not claims_something(text), text


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("num_seeds", [1, 4, 10])
def test_a_verdict_begins_with_one_short_sentence(system: str, num_seeds: int, without_intervals: None) -> None:
    draw, make_result = SYSTEMS[system]
    subjects = {
        "reading": "the learned order", "bandit": "the trained model", "curriculum": "learning progress with PPO",
        "surgery": "the surgeon",
    }  # fmt: skip
    for effect in (0.0, 3.0, -3.0):
        for text in verdicts(draw(np.random.default_rng(3), num_seeds, effect), make_result, system):
            first = re.split(r"(?<=[.]) (?=[A-Z])", text)[0]
            assert len(first.split()) <= 20, first
            assert subjects[system].lower() in first.lower()


def test_the_page_of_a_sweep_shows_the_verdict_of_the_comparison(tmp_path: Path) -> None:
    """And not that of the system, whose claims are another family."""
    records = curriculum(np.random.default_rng(3), 5, 0.0)
    for seed in range(5):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        manifest = {
            "schema": 1, "system": "curriculum", "seed": seed, "streams": [], "save_every": 1, "keep_last": 1,
            "trackers": [], "device": "cpu", "code": {}, "config": {"seed": seed}, "environment": {},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
        own = [record for record in records if record["seed"] == seed]
        (folder / "metrics.jsonl").touch()
        (folder / "result.json").write_text(json.dumps({"system": "curriculum", "records": own}))
    compared([read_finished(tmp_path / f"seed{seed}") for seed in range(5)], out=tmp_path / "all")
    shown = json.loads((tmp_path / "all" / "result.json").read_text())["verdict"]
    assert shown == json.loads((tmp_path / "all" / "comparison.json").read_text())["verdict"]
