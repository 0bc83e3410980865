"""What each rule must close of the gap from uniform to the best schedule, in worlds where that is known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preceptor.cli import main
from preceptor.config import load_config
from preceptor.objectives import make_mixture
from preceptor.systems.curriculum import config as curriculum_config
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.kinds import result, verify
from preceptor.systems.curriculum.planted import UPDATES, WORLDS, World
from tests.systems.curriculum.small import SERVICES


def gap_closed(world: World, rule: str, *, seed: int = 0, **options: float) -> float:
    mixture = make_mixture(rule, num_datasets=len(world.targets), targets=world.targets, sizes=None, **options)
    return world.share(world.under(mixture, seed=seed))


def best_schedule(world: World, *, pieces: int = 8, steps: int = 300) -> float:
    """The macro loss under the best schedule of so many pieces that Adam finds from three starts."""
    results = []
    for start in range(3):
        generator = torch.Generator().manual_seed(start)
        logits = (0.1 if start == 0 else 1.5) * torch.randn(
            pieces, len(world.targets), generator=generator, dtype=torch.float64
        )
        if start == 1:  # one dataset after another
            order = torch.linspace(0, len(world.targets) - 1e-6, pieces).long()
            logits = 4 * torch.eye(len(world.targets), dtype=torch.float64)[order]
        logits.requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(steps):
            weights = logits.softmax(-1)
            loss = world.follow(lambda update, _, weights=weights: weights[update * pieces // UPDATES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            results.append(float(loss.detach()))
    return min(results)


@pytest.mark.parametrize("rule", WORLDS["chain"].least)
@pytest.mark.parametrize("world", WORLDS)
def test_share_of_the_gap(world: str, rule: str) -> None:
    assert gap_closed(WORLDS[world], rule) >= WORLDS[world].least[rule] - 1e-9


@pytest.mark.parametrize("rule", WORLDS["parity"].least)
def test_on_a_plateau_every_rule_is_blind(rule: str) -> None:
    """The world that says where they honestly fail: a rule that closed it would know more than it was told."""
    assert abs(gap_closed(WORLDS["parity"], rule)) < 0.15


def test_the_text_without_its_guard_does_harm_where_things_are_forgotten() -> None:
    """The planted fault: paid for relearning, the rule ends far below uniform."""
    assert gap_closed(WORLDS["forgetting"], "second_order", guard=0.0) < -0.5


@pytest.mark.slow
@pytest.mark.parametrize("world", [name for name in WORLDS if name != "parity"])
def test_the_best_schedule_is_the_best(world: str) -> None:
    # Adam with 120 steps finds the constants to about a thousandth of a nat.
    assert best_schedule(WORLDS[world], steps=120) == pytest.approx(WORLDS[world].best, abs=2e-3)


def test_the_best_of_parity_is_three_of_four() -> None:
    """No gradient leads there; of even mixtures of n datasets three are best, and tokens are all that counts."""
    world = WORLDS["parity"]
    by_number = []
    for number in range(1, 5):
        weights = torch.tensor([1 / number] * number + [0.0] * (4 - number), dtype=torch.float64)
        by_number.append(float(world.follow(lambda update, skill, weights=weights: weights)))
    assert min(by_number) == by_number[2] == pytest.approx(world.best, abs=1e-4)


def test_a_schedule_beats_every_fixed_mixture_of_a_chain() -> None:
    assert best_schedule(replace(WORLDS["chain"]), pieces=1, steps=60) > WORLDS["chain"].best + 0.5


# --- a run of them ---------------------------------------------------------------------------------------------------

SETTINGS = ("planted.worlds=[chain, far]", "controls.rules=[uniform, targets, exp3]", "save_every=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "run"
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    assert main(["run", "curriculum", "--preset", "planted", "--threads", "1", "--out", str(folder), *sets]) == 0
    return folder


def test_a_run_says_what_each_rule_closes_and_what_it_must(finished: Path) -> None:
    written = json.loads((finished / "result.json").read_text())
    assert set(written["worlds"]["chain"]) == {"alignment", "uniform", "targets", "exp3"}
    assert set(written["worlds"]["far"]) == {"alignment", "uniform", "exp3"}  # it has no target to learn from
    chain = written["worlds"]["chain"]
    assert chain["uniform"]["mean"] == pytest.approx(0, abs=1e-9)
    assert (chain["alignment"]["must"], chain["alignment"]["holds"]) == (0.4, True)
    assert (chain["exp3"]["must"], chain["exp3"]["holds"]) == (None, None)
    assert written["verdict"].startswith("Every rule closes what it must of the gap, in 2 of 2 cases.")
    assert "Weights in chain: alignment" in [chart["title"] for chart in written["charts"]]


def test_a_rule_that_closes_too_little_is_named(finished: Path) -> None:
    written = json.loads((finished / "result.json").read_text())
    records = [
        {**record, "share": 0.1} if (record["arm"], record["item"]) == ("alignment", "far") else record
        for record in written["records"]
    ]
    verdict = result(records, config=written["config"], seeds=[0])["verdict"]
    assert verdict.startswith("1 of 2 shares of the gap are too small: alignment in far (0.10 of 0.65).")


def test_it_goes_on_bit_for_bit_and_is_played_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    assert main(["resume", str(folder), "--no-report"]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    config = load_config(CurriculumConfig, file=finished / "config.yaml")
    replayed = list(verify(config, finished, SERVICES))
    assert len(replayed) == 2 * 7
    assert all(entry.recorded == entry.recomputed for entry in replayed)


def test_every_world_is_described() -> None:
    assert set(curriculum_config.WORLDS) == set(WORLDS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("planted.worlds=[chains]", "did you mean 'chain'"),
        ("planted.worlds=[chain, chain]", "must be all different"),
        ("mixture.rule=aligment", "did you mean 'alignment'"),
        ("controls.rules=[exp3]", "must hold uniform"),
        ("mixture.rule=proportional", "needs datasets of its own"),
        ("tasks.tasks=[{name: a, source: add}]", "two kinds of run"),
    ],
)
def test_what_cannot_be_played(setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "curriculum", "--preset", "planted", "--out", str(tmp_path / "r"), "--set", setting]) == 2
    assert message in capsys.readouterr().err
