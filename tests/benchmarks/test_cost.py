"""The cost model against arithmetic by hand and the operations that benchmarks count; the counter of traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cost, cost_check, limits, scale, traffic
from benchmarks.models import starter
from preceptor.runs import world
from tests.worlds import in_world

SHAPE = cost.Shape(parameters=1_000, head=200, layers=2, width=10)
MACHINES = cost.Machines(processes=4, rate=1e4, decode_share=0.5, memory_bandwidth=1e6, network=1e5, decode_weight=4)


def test_a_pass_by_hand() -> None:
    """A token: 2 · 1,000 for the weights and 2 · 2 · 10 · 5 = 200 for attention over 5 tokens; 15 tokens."""
    assert SHAPE.forward(3, 5) == 15 * (2_000 + 200)
    assert SHAPE.forward(3, 5, scored=0.5) == 15 * (2_000 - 200 + 200)  # half of 2 · 200 is not wanted
    assert SHAPE.forward(3, 5, scored=0.0) == 15 * (2_000 - 400 + 200)


def test_operations_are_those_that_the_other_benchmarks_count() -> None:
    shape, _ = cost_check.predicted_update("reading")
    assert shape.forward(3, 50) == limits.forward_operations(starter(), 3, 50)
    assert shape.head == 4_096 * 256


def test_a_mixture_by_hand() -> None:
    """4 rows of 5 tokens: 3 · 44,000; 6 rows are measured every sixth update: 66,000 / 6."""
    update = cost.mixture_update(SHAPE, batch_tokens=20, row_tokens=5, datasets=2, samples=3, every=6, processes=4)
    assert update.passes == pytest.approx(132_000 + 11_000)
    assert update.serial == pytest.approx(4 * 8e-6)
    assert update.rows_bytes == 20 * 24
    alone = cost.mixture_update(SHAPE, batch_tokens=20, row_tokens=5, datasets=2, samples=3, every=6, processes=1)
    assert alone.rows_bytes == 0

    price = cost.cost(SHAPE, update, MACHINES)
    assert price.passes == pytest.approx(143_000 / 4e4)
    assert price.writing == 0
    assert price.optimizer == pytest.approx(28_000 / 1e6)
    assert price.sent_bytes == pytest.approx(2 * 3 / 4 * 4_000 + 480)
    assert price.traffic == pytest.approx(6_480 / 1e5)
    assert price.gradient_bytes == 4_000
    assert price.state_bytes == 16_000
    assert price.checkpoint_bytes == 12_000
    assert price.seconds == pytest.approx(3.575 + 0.000032 + 0.028 + 0.0648)


def test_reading_by_hand() -> None:
    """Contexts of 2 + 3 · (1 + 2) = 11 tokens, 3 of them written and 6 of them values; two episodes.

    A whole pass: 22 · (2,000 + 440) = 53,680. Written: 3/11 of it. Read: 8/11 of 22 · (1,600 + 440). Scored: 53,680
    less 5/11 of the head, 22 · 400 · 5/11 = 4,000; and the values alone, 16 · (2,000 + 320). Learned from and compared:
    4 · (53,680 less 8/11 of the head, 6,400).
    """
    update = cost.reading_update(SHAPE, episodes=2, prompt=2, pairs=3, query_tokens=1, value_tokens=2)
    assert update.tokens == 22
    assert update.decode == pytest.approx(14_640)
    assert update.decode_steps == 3
    assert update.passes == pytest.approx(32_640 + 49_680 + 37_120 + 4 * 47_280)
    price = cost.cost(SHAPE, update, MACHINES)
    assert price.state_bytes == (16 + 2 * 4) * 1_000
    assert price.checkpoint_bytes == 12_000


def test_a_curriculum_by_hand() -> None:
    """Two continuations of 2 tokens after 3: 10 tokens, of which 4 are scored, in two epochs of two minibatches."""
    documents = cost.Update(tokens=100, passes=1e6)
    update = cost.curriculum_update(
        SHAPE, documents, prompts=2, prompt_tokens=3, continuation_tokens=2, epochs=2, minibatches=2
    )
    assert update.decode == pytest.approx(22_000 * 0.4)
    # The prompts 6 · (1,600 + 120); then the frozen model once and two epochs of 3 · 10 · (2,000 - 240 + 200).
    assert update.passes == pytest.approx(1e6 + 10_320 + 7 * 19_600)
    assert update.tokens == 110
    price = cost.cost(SHAPE, update, MACHINES)
    assert price.gradient_bytes == 4 * 4_000  # an optimizer step for each minibatch
    assert price.checkpoint_bytes == 16_000  # the frozen model is saved


def test_writing_reads_all_weights_a_token_however_few_rows_there_are() -> None:
    many = cost.cost(SHAPE, cost.Update(tokens=1, passes=0, decode=2_000, decode_steps=3), MACHINES)
    assert many.writing == pytest.approx(2_000 / (4e4 * 0.5))
    few = cost.cost(SHAPE, cost.Update(tokens=1, passes=0, decode=20, decode_steps=3), MACHINES)
    assert few.writing == pytest.approx(3 * 4_000 / 1e6)


def test_the_forecast_counts_gpu_hours_and_the_bytes_of_all_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    update, price, number = cost.forecasts(gpus=10, tokens=1e9, rows=2)["mixture"]
    assert update.tokens == 10 * 2 * 4_096
    assert number == pytest.approx(1e9 / 81_920)
    assert cost.ROWS["GPU hours"](update, price, number, 10) == f"{number * price.seconds * 10 / 3_600:,.0f}"
    assert cost.main(["--gpus", "10", "--tokens", "1e9"]) == 0
    assert "4 GB" in capsys.readouterr().out  # 4 bytes each of 1e9 tokens
    with pytest.raises(SystemExit):
        cost.main(["--gpus", "0"])
    assert "--gpus, --tokens and --rows must be at least 1, got 0" in capsys.readouterr().err
    assert [cost.readable_bytes(number) for number in (999, 1_500, 2e12, 5e15)] == [
        "999 B",
        "1.5 kB",
        "2 TB",
        "5e+03 TB",
    ]


def test_the_page_quotes_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    quoted = page.split("<!-- python -m benchmarks.cost -->\n```text\n")[1].split("```")[0]
    assert cost.main([]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert quoted.splitlines() == [line for line in printed if line]
    assert len(quoted.splitlines()) == 2 + 1 + len(cost.ROWS)  # title, names, a rule, and the rows


def test_a_run_stands_beside_its_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def updates(system: str, overrides: Any, out: Path, *, size: int, module: Any) -> list[dict[str, float]]:
        saved = out / "checkpoints" / "step-000003"
        saved.mkdir(parents=True)
        (saved / "policy").write_bytes(bytes(700))
        (out / "checkpoints" / "step-000002").mkdir()
        Path(module[1]).write_text(json.dumps({"sums": [2_000] * 6 + [9_000]}))
        return [{"seconds": 1.0}, {"seconds": 2.0}]

    monkeypatch.setattr(scale, "updates", updates)
    price = cost.cost(SHAPE, cost.Update(tokens=1, passes=6e4), MACHINES)
    (tmp_path / "1").mkdir()
    alone = cost_check._measured("reading", [], tmp_path / "1", price, 1, sums=2)
    assert [each[1:] for each in alone] == [(price.seconds, 1.5), (12_000, 700)]
    (tmp_path / "2").mkdir()
    both = cost_check._measured("reading", [], tmp_path / "2", price, 2, sums=2)
    assert both[1] == ("reading, 2 processes: gradients summed an update", 4_000, 4_000)


def test_gradients_are_counted_apart_from_all_else() -> None:
    def counted(of: world.World) -> tuple[dict[str, dict[str, float]], list[float]]:
        counter = traffic.count()
        parameter = torch.nn.Parameter(torch.zeros(10))
        parameter.grad = torch.ones(10)
        of.sum_gradients([parameter])
        of.gather(2, torch.zeros(1, 3))
        of.sum(torch.zeros(2))
        return counter.counts, counter.sums

    for counts, sums in in_world(2, counted):
        # 8 bytes say which gradients there are, 40 are the gradient; a row of 12 bytes and a sum in float64.
        assert sums == [8 + 40]
        assert (counts["gradients"]["calls"], counts["gradients"]["bytes"]) == (2, 8 + 40)
        assert (counts["other"]["calls"], counts["other"]["bytes"]) == (2, 12 + 16)


def test_ways_of_scale_are_one_two_and_four_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def updates(system: str, overrides: Any, out: Path, *, size: int) -> list[dict[str, float]]:
        asked.append((system, size))
        return [{"seconds": 6.0 / size}]

    monkeypatch.setattr(scale, "updates", updates)
    for comparison in scale.comparisons():
        for way in comparison.ways.values():
            way()
        (bar,) = comparison.bars
        assert (bar.way, bar.against, bar.at_least) == (scale.TOGETHER, scale.ALONE, 1.6)
    assert asked == [(system, size) for system in ("reading", "curriculum") for size in (1, 2, 4)]
