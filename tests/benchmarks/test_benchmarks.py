"""The benchmarks at tiny sizes: every way runs and agrees, rows and verdicts are right, the page is the history's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    decode,
    episodes,
    gpu,
    growth,
    kernels,
    log_probs,
    measurement,
    parts,
    passes,
    record,
    report,
    startup,
    update,
)
from benchmarks.measurement import Bar, Comparison, Spread
from preceptor.errors import NumericError

MODULES = (decode, episodes, gpu, growth, kernels, log_probs, parts, passes, startup, update)


@pytest.mark.filterwarnings("ignore")  # torchrl's own
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_every_comparison_runs_and_its_ways_agree(module: object) -> None:
    if module is parts:
        pytest.importorskip("torchrl", reason="a peer of the test extra")
    comparisons = list(module.comparisons(quick=True))  # type: ignore[attr-defined]
    assert comparisons
    for comparison in comparisons:
        row = json.loads(json.dumps(measurement.measure(comparison, rounds=1, threads=1)))
        assert row["seconds"].keys() == comparison.ways.keys()
        for clocks in row["seconds"].values():
            assert clocks["wall"]["median"] > 0
            assert clocks["cpu"]["median"] > 0
            assert all(clock["median"] >= 0 for clock in clocks.values())  # a part can be too short to be seen
        assert command.table(row).row_count == len(comparison.ways)
        assert len(command.verdicts(row)) == len(comparison.bars)


@pytest.mark.slow  # TRL takes seconds to import and builds a trainer a step
@pytest.mark.filterwarnings("ignore")
def test_the_grpo_step_runs_on_both_sides() -> None:
    pytest.importorskip("trl", reason="a peer of the test extra")
    from benchmarks import grpo

    (comparison,) = grpo.comparisons(quick=True)
    row = measurement.measure(comparison, rounds=1, threads=1)
    assert row["seconds"].keys() == {"ours", "ours, bfloat16", grpo.TRL}
    for clocks in row["seconds"].values():
        assert 0 < clocks["generation"]["median"] < clocks["wall"]["median"]


def test_a_ratio_is_time_per_unit_and_bars_are_judged_by_it() -> None:
    """Ours takes 2 s for 4 units, the peer 3 s for 2: three times as fast a unit."""
    seconds = {"ours": 2.0, "peer": 3.0}
    comparison = Comparison(
        benchmark="b",
        case="c",
        ways={name: (lambda value=value: {"wall": value, "cpu": 2 * value}) for name, value in seconds.items()},
        bars=(
            Bar("peer", at_least=3.0),
            Bar("peer", at_least=3.1),
            Bar("peer", memory_at_most=0.5),
            Bar("peer", limit_at_least=0.25),
            Bar("peer", limit_at_least=0.26),
        ),
        units={"ours": 4, "peer": 2},
        memory={"ours": 6.0, "peer": 10.0},
        ideal_seconds={"ours": 0.5},
    )
    row = measurement.measure(comparison, rounds=3, threads=1)
    assert row["seconds"]["ours"] == {
        "wall": {"median": 2.0, "minimum": 2.0, "maximum": 2.0},
        "cpu": {"median": 4.0, "minimum": 4.0, "maximum": 4.0},
    }
    assert row["speed_up"] == {"ours over peer": {"wall": 3.0, "cpu": 3.0}}
    assert [bar["holds"] for bar in row["bars"]] == [True, False, False, True, False]
    assert command.verdicts(row)[4] == "ours against peer: 25% of the limit; bar 26%: NOT met"
    assert row["share_of_limit"] == {"ours": 0.25}
    late = measurement.holds(Bar("peer", seconds_at_most=1.9), {"ours": {"wall": Spread(2, 2, 2)}}, {}, {}, {})
    assert late is False


def test_a_part_of_the_seconds_has_a_column_of_its_own() -> None:
    ways = {"ours": lambda: {"wall": 2.0, "cpu": 1.0, "in the kernel": 0.25}, "peer": lambda: {"wall": 1.0, "cpu": 1.0}}
    columns = command.table(measurement.measure(Comparison("b", "c", ways), rounds=1, threads=1)).columns
    (part,) = (column for column in columns if column.header == "in the kernel s")
    assert list(part.cells) == ["0.25", ""]


def test_ways_that_do_not_agree_are_not_timed() -> None:
    assert measurement.require_equal("x", 0.1, at_most=0.2) == 0.1
    for difference in (0.3, float("nan")):
        with pytest.raises(NumericError, match="x differ by"):
            measurement.require_equal("x", difference, at_most=0.2)


def test_a_wrong_log_probability_stops_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    found = log_probs.chosen_log_probs
    monkeypatch.setattr(log_probs, "chosen_log_probs", lambda states, weight, tokens: -found(states, weight, tokens))
    with pytest.raises(NumericError, match="log-probabilities differ"):
        log_probs.compare(64, 8, is_large=False)


def test_the_product_setting_is_put_back_and_only_ours_changes_it() -> None:
    before = torch.get_float32_matmul_precision()
    seen = measurement.measured_precision(torch.get_float32_matmul_precision)()
    assert seen in ("highest", "medium")
    assert torch.get_float32_matmul_precision() == before


def test_the_page_is_written_from_the_newest_rows(tmp_path: Path) -> None:
    def row(case: str, seconds: float, commit: str) -> str:
        comparison = Comparison(
            "decode",
            case,
            {"ours": lambda: {"wall": seconds, "cpu": seconds}, "peer": lambda: {"wall": 1.0, "cpu": 1.0}},
            bars=(Bar("peer", at_least=1.5),),
            ideal_seconds={"ours": 0.1, "peer": 0.1},
        )
        return json.dumps(measurement.measure(comparison, rounds=1, threads=1) | {"commit": commit, "dirty": False})

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    halves = Comparison(
        "grpo", "d", {name: lambda: {"wall": 1, "cpu": 1, "generation": 0.5} for name in ("ours", "peer")}
    )
    split = json.dumps(measurement.measure(halves, rounds=1, threads=1) | {"commit": "4" * 40, "dirty": False})
    lines = [
        row("a", 0.25, "1" * 40),
        row("b", 2.0, "2" * 40),
        row("a", 0.5, "3" * 40),
        '{"benchmark": "episode"}',
        split,
    ]
    (tmp_path / record.HISTORY).write_text("\n".join(lines) + "\n")
    page = tmp_path / report.PAGE
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1111111" not in text
    assert "| 2.00 | 20%, 10% | ≥ 1.5: met |" in text
    assert "| 0.50 (the peer is faster) | 5%, 10% | ≥ 1.5: **not met** |" in text
    assert "| 1 s (1–1), 50% of it generation |" in text
    report.write(tmp_path)
    assert page.read_text() == text


def test_the_fit_of_growth_finds_a_known_curve() -> None:
    pairs = [10, 20, 50, 200]
    a, b = growth.fit(pairs, [0.3 * n + 0.002 * n * n for n in pairs])
    assert (a, b) == pytest.approx((0.3, 0.002))
    assert growth.attention_dominates_from(a, b) == pytest.approx(150)
    assert growth.attention_dominates_from(1.0, 0.0) == float("inf")


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["decod"]) == 2
    assert "there is no benchmark 'decod'" in capsys.readouterr().err


def test_the_page_shows_the_newest_of_what_is_recorded(tmp_path: Path) -> None:
    for name in (record.HISTORY, report.PAGE, report.FIGURE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.ROOT / name, tmp_path / name)
    report.write(tmp_path)
    for name in (report.PAGE, report.FIGURE):
        assert (tmp_path / name).read_text() == (record.ROOT / name).read_text(), "run: python -m benchmarks.report"
